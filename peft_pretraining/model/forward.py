"""The forward pass in training and evaluation, on transformers' own modules: no cache, and nothing that waits for the device.

transformers' `LlamaModel.forward` asks the device in every call whether positions restart anywhere, and a GPU is waited for.

Shape letters: B sequences, T positions, D model width.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaModel


def hidden_states(model: "LlamaModel", input_ids: Tensor, document_end: int | None = None) -> Tensor:
    """What `model` gives as last_hidden_state, (B, T, D), for input_ids (B, T), with causal attention.

    document_end: the id that ends documents, each of which is then seen as if it stood alone; None where a sequence is taken
    as one.
    """
    hidden: Tensor = model.embed_tokens(input_ids)
    mask = None  # the attention kernels' own causal mask, which costs nothing
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    if document_end is not None:
        begins = document_begins(input_ids, document_end)
        mask = document_mask(begins, hidden.dtype)
        positions = positions - begins
    rotations = model.rotary_emb(hidden, position_ids=positions)
    for layer in model.layers:
        hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotations)
    last: Tensor = model.norm(hidden)
    return last


def document_begins(input_ids: Tensor, document_end: int) -> Tensor:
    """(B, T) int64: the position at which each token's document begins in its sequence.

    A document ends with `document_end`; the first one may have begun in an earlier sequence.
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    ended_before = torch.zeros_like(input_ids, dtype=torch.bool)
    ended_before[:, 1:] = input_ids[:, :-1] == document_end
    return torch.where(ended_before, positions, 0).cummax(dim=1).values


def document_mask(begins: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, T, T) to be added to attention's scores: 0 from a token's document's begin up to the token itself, else -inf.

    In the dtype of queries and keys: of a mask of flags every layer would make such a one of its own, and keep it for backward.
    """
    keys = torch.arange(begins.shape[1], device=begins.device)
    hidden = (keys < begins[:, :, None]) | (keys > keys[:, None])
    mask = torch.zeros(hidden.shape, dtype=dtype, device=begins.device)
    return mask.masked_fill_(hidden, -torch.inf)[:, None]
