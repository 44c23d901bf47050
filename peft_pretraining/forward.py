"""The forward pass in training and evaluation, on transformers' own modules: no cache, and nothing that waits for the device.

transformers' `LlamaModel.forward` asks the device in every call whether positions restart anywhere, and a GPU is waited for.

Shape letters: B sequences, T positions, D model width.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaModel


def hidden_states(model: "LlamaModel", input_ids: Tensor) -> Tensor:
    """What `model` gives as last_hidden_state, (B, T, D), for input_ids (B, T): attention is causal, nothing is masked."""
    hidden: Tensor = model.embed_tokens(input_ids)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    rotations = model.rotary_emb(hidden, position_ids=positions)
    for layer in model.layers:
        hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotations)
    last: Tensor = model.norm(hidden)
    return last
