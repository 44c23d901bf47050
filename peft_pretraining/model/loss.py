"""The forward pass and the loss: cross-entropy summed over tokens, computed without the logits of a whole micro-batch at once.

Shape letters: B sequences, T positions, N rows, C rows of one chunk, D model width, V vocabulary.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_pretraining.memory.counts import loss_chunk_rows
from sparse_lora.support import plain

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, LlamaModel

IGNORE_INDEX = -100


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_rows: int | None = None, num_counted: int | None = None
) -> Tensor:
    """Returns the sum over rows of -log softmax(hidden @ weight.T)[label], a float32 scalar.

    Args:
        hidden: (N, D).
        weight: (V, D), the output head, in hidden's dtype, which may be any floating dtype.
        labels: (N,) int64, -100 for ignored rows, which take no time.
        chunk_rows: number of rows whose logits exist at a time; default: memory.loss_chunk_rows of the device.
        num_counted: the exact number of rows that are not ignored, if known; None waits for the GPU to count them.

    The gradients of hidden and weight are computed chunk by chunk in the forward pass, while the logits exist, which saves one
    matrix product compared with recomputing the logits in backward. The weight's gradient is summed over chunks in float32 for
    every dtype. Differentiable once.
    """
    chunk_rows = chunk_rows or loss_chunk_rows(hidden.device.type)
    if not torch.compiler.is_compiling():
        # This shape depends on data; a compiled region keeps all rows and masks the ignored ones.
        counted = _positions(labels != IGNORE_INDEX, num_counted)
        hidden, labels = hidden[counted], labels[counted]
    with_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    total: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk_rows, with_gradients)
    return total


def _positions(flags: Tensor, number: int | None) -> Tensor:
    """Returns the indices of the set flags; `number` is their number, or None to count them on the device."""
    if number is None:
        return torch.nonzero(flags)[:, 0]
    return torch.nonzero_static(flags, size=number)[:, 0]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_rows: int, with_gradients: bool) -> Tensor:
        weight = plain(weight)
        # In float32 a running total of 4,096 chunks would be off by 4e-6.
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        chunks = list(zip(hidden.split(chunk_rows), labels.split(chunk_rows), strict=True))
        if not with_gradients:
            for h_CD, labels_C in chunks:
                total += _token_losses(_log_probabilities(h_CD, weight), labels_C).sum()
            return total.float()
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        for (h_CD, labels_C), grad_CD in zip(chunks, grad_hidden.split(chunk_rows), strict=True):
            loss, product = _chunk_gradients(h_CD, weight, labels_C, grad_CD)
            total += loss
            if grad_weight is None:
                # In bfloat16 a term below 1/256 of the sum would be lost, which late chunks are.
                grad_weight = product if len(chunks) == 1 else product.to(_wide(product))
            else:
                grad_weight += product
            # Frees the memory before the next chunk's logits are computed.
            del product
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total.float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden = _scaled(grad_hidden, grad_total, grad_hidden.dtype)
        return grad_hidden, _scaled(grad_weight, grad_total, ctx.weight_dtype), None, None, None


def _chunk_gradients(h_CD: Tensor, weight: Tensor, labels_C: Tensor, grad_CD: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sum of the chunk's losses and the head's gradient; writes the gradient of h_CD to grad_CD."""
    log_p_CV = _log_probabilities(h_CD, weight)
    loss = _token_losses(log_p_CV, labels_C).sum()
    grad_CV = _logit_gradients(log_p_CV, labels_C).to(h_CD.dtype)
    grad_CD.copy_(grad_CV @ weight)
    return loss, grad_CV.T @ h_CD


def _log_probabilities(h_CD: Tensor, weight: Tensor) -> Tensor:
    logits_CV = F.linear(h_CD, weight)
    logits_CV = logits_CV.to(_wide(logits_CV))
    return F.log_softmax(logits_CV, dim=-1)


def _token_losses(log_p_CV: Tensor, labels_C: Tensor) -> Tensor:
    picked = log_p_CV.gather(1, labels_C.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels_C == IGNORE_INDEX, 0.0, -picked)


def _logit_gradients(log_p_CV: Tensor, labels_C: Tensor) -> Tensor:
    """Returns softmax - onehot(label), and 0 in ignored rows; overwrites the log probabilities."""
    counted_C1 = (labels_C != IGNORE_INDEX)[:, None]
    grad_CV = log_p_CV.exp_()
    grad_CV.scatter_add_(1, labels_C.clamp(min=0)[:, None], torch.full_like(counted_C1, -1.0, dtype=grad_CV.dtype))
    return grad_CV.mul_(counted_C1)


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype, block_rows: int = 1024) -> Tensor:
    """Returns gradient * scale, multiplied in float32 by blocks; a scale rounded to bfloat16 would bias every gradient."""
    out = torch.empty_like(gradient, dtype=dtype)
    for source, target in zip(gradient.split(block_rows), out.split(block_rows), strict=True):
        target.copy_(source.to(_wide(source), copy=True).mul_(scale))
    return out


def _wide(tensor: Tensor) -> torch.dtype:
    """Returns float32, or the tensor's dtype if that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


# --- The forward pass, on transformers' own modules ---
#
# transformers' `LlamaModel.forward` is not used, because every call waits for the device to check whether positions restart.


def hidden_states(model: "LlamaModel", input_ids: Tensor, document_end: int | None = None) -> Tensor:
    """Returns the last hidden states (B, T, D) of `model` for input_ids (B, T), with causal attention.

    document_end: the token id that ends documents, to which attention and positions are then limited; None treats each sequence
    as one document.
    """
    hidden: Tensor = model.embed_tokens(input_ids)
    # None selects the attention kernels' built-in causal mask, which takes no time or memory.
    mask = None
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
    """Returns the position in the sequence at which each token's document begins, (B, T) int64.

    A document ends with `document_end`; the first one of a sequence may have begun in an earlier sequence.
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    ended_before = torch.zeros_like(input_ids, dtype=torch.bool)
    ended_before[:, 1:] = input_ids[:, :-1] == document_end
    return torch.where(ended_before, positions, 0).cummax(dim=1).values


def document_mask(begins: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the mask (B, 1, T, T) to add to attention scores: 0 from the start of a token's document to the token, else -inf.

    It has the dtype of queries and keys, because every layer would convert a boolean mask and keep its own copy for backward.
    """
    keys = torch.arange(begins.shape[1], device=begins.device)
    hidden = (keys < begins[:, :, None]) | (keys > keys[:, None])
    mask = torch.zeros(hidden.shape, dtype=dtype, device=begins.device)
    return mask.masked_fill_(hidden, -torch.inf)[:, None]


class TokenLoss(nn.Module):
    """A causal language model with its loss; data parallelism wraps this module, and the training step calls it."""

    def __init__(self, model: "LlamaForCausalLM", chunk_rows: int | None = None, document_end: int | None = None) -> None:
        """chunk_rows: see chunked_cross_entropy. document_end: see hidden_states."""
        super().__init__()
        self.model = model
        self.chunk_rows = chunk_rows
        self.document_end = document_end

    def forward(self, input_ids: Tensor, labels: Tensor, num_targets: int | None = None) -> Tensor:
        """Returns the sum of the losses of all target tokens, a float32 scalar.

        input_ids, labels: (B, T); labels as in transformers, unshifted, -100 is ignored. Padding needs no attention mask, because
        it is on the right and attention is causal. num_targets: the number of target tokens, if known; None waits for the GPU to
        count them.
        """
        hidden = hidden_states(self.model.model, input_ids, self.document_end)
        # Shifts the labels instead of the hidden states, which stay contiguous. The last position has no target.
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        return chunked_cross_entropy(
            hidden.flatten(0, 1), self.model.lm_head.weight, targets.flatten(), self.chunk_rows, num_targets
        )
