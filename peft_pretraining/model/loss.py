"""The forward pass and the loss: cross-entropy summed over tokens, computed without the logits of a whole micro-batch at once.

Shape letters: B sequences, T positions, N rows, C rows of one chunk, D model width, V vocabulary.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_pretraining.memory.counts import loss_chunk_rows
from peft_pretraining.model.row_gradient import RowGradient, deliver, embed

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, LlamaModel

IGNORE_INDEX = -100


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_rows: int | None = None,
    num_counted: int | None = None,
    *,
    head_gradient: str = "whole",
) -> Tensor:
    """Returns the sum over rows of -log softmax(hidden @ weight.T)[label], a float32 scalar.

    Args:
        hidden: (N, D).
        weight: (V, D), the output head, in hidden's dtype, which may be any floating dtype.
        labels: (N,) int64, -100 for ignored rows, which take no time.
        chunk_rows: number of rows whose logits exist at a time; default: memory.loss_chunk_rows of the device.
        num_counted: the exact number of rows that are not ignored, if known; None waits for the GPU to count them.
        head_gradient: "whole" or "slices", see below.

    The gradients of hidden and weight are computed chunk by chunk in the forward pass, while the logits exist, which saves one
    matrix product compared with recomputing the logits in backward. The weight's gradient is summed over chunks in float32 for
    every dtype. With head_gradient "slices" the weight's gradient is computed in the backward pass, from recomputed logits of a
    slice of the vocabulary at a time: one more product, but no float32 sum of the weight's size, and with `take_rows`
    (model.row_gradient) no gradient of its size. Differentiable once.
    """
    chunk_rows = chunk_rows or loss_chunk_rows(hidden.device.type)
    if not torch.compiler.is_compiling():
        # This shape depends on data; a compiled region keeps all rows and masks the ignored ones.
        counted = _positions(labels != IGNORE_INDEX, num_counted)
        hidden, labels = hidden[counted], labels[counted]
    with_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if with_gradients and head_gradient == "slices":
        sliced: Tensor = _SlicedCrossEntropy.apply(hidden, weight, labels, chunk_rows)
        return sliced
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
        # In float32 a running total of 4,096 chunks would be off by 4e-6.
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        chunks = list(zip(hidden.split(chunk_rows), labels.split(chunk_rows), strict=True))
        if not with_gradients:
            for h_CD, labels_C in chunks:
                total += _token_losses(_log_probabilities(h_CD, weight), labels_C).sum()
            return total.float()
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        for (h_CD, labels_C), grad_CD in zip(chunks, grad_hidden.split(chunk_rows), strict=True):
            log_p_CV = _log_probabilities(h_CD, weight)
            total += _token_losses(log_p_CV, labels_C).sum()
            grad_CV = _logit_gradients(log_p_CV, labels_C).to(h_CD.dtype)
            del log_p_CV
            grad_CD.copy_(_times_head(grad_CV, weight))
            product = grad_CV.T @ h_CD
            if grad_weight is None:
                # In bfloat16 a term below 1/256 of the sum would be lost, which late chunks are.
                grad_weight = product if len(chunks) == 1 else product.to(_wide(product))
            else:
                grad_weight += product
            # Frees the memory before the next chunk's logits are computed.
            del product, grad_CV
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total.float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden = _scaled(grad_hidden, grad_total, grad_hidden.dtype)
        return grad_hidden, _scaled(grad_weight, grad_total, ctx.weight_dtype), None, None, None


class _SlicedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_rows: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        normalisers = torch.empty(len(hidden), dtype=_wide(hidden), device=hidden.device)
        for h_CD, labels_C, grad_CD, normalisers_C in zip(
            *(tensor.split(chunk_rows) for tensor in (hidden, labels, grad_hidden, normalisers)), strict=True
        ):
            logits_CV = _logits(h_CD, weight)
            normalisers_C.copy_(_label_column(logits_CV, labels_C))
            log_p_CV = F.log_softmax(logits_CV, dim=-1)
            del logits_CV
            # A token's logit is its log probability plus the normaliser.
            normalisers_C.sub_(_label_column(log_p_CV, labels_C))
            total += _token_losses(log_p_CV, labels_C).sum()
            grad_CV = _logit_gradients(log_p_CV, labels_C).to(h_CD.dtype)
            del log_p_CV
            grad_CD.copy_(_times_head(grad_CV, weight))
            del grad_CV
        ctx.chunk_rows, ctx.take_rows = chunk_rows, getattr(weight, "take_rows", None)
        ctx.save_for_backward(hidden, weight, labels, normalisers, grad_hidden)
        return total.float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, normalisers, grad_hidden = ctx.saved_tensors
        gradient = None
        if ctx.needs_input_grad[1]:
            head = HeadGradient(hidden, weight, labels, normalisers, grad_total, ctx.chunk_rows * len(weight))
            gradient = deliver(head, ctx.take_rows)
        return _scaled(grad_hidden, grad_total, grad_hidden.dtype), gradient, None, None


class HeadGradient(RowGradient):
    """The gradient of the output head (V, D) from N rows of hidden states, whose logits are recomputed for some rows of the head.

    Rows of the head may be stepped as soon as `elements` has returned their gradient, because logits of other rows do not depend
    on them.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, labels: Tensor, normalisers: Tensor, scale: Tensor, block_elements: int):
        """hidden: (N, D). labels, normalisers: (N,), see chunked_cross_entropy, and each row's log of the sum of exp(logits).

        scale: gradient of the summed loss. block_elements: the most logits that are computed at a time.
        """
        self._hidden, self._weight, self._labels, self._normalisers = hidden, weight, labels, normalisers
        self._scale, self._block_elements = scale, block_elements
        # |P^T H| <= |P| |H| in Frobenius norms, and a row of P = softmax - onehot has a norm of at most the root of 2.
        bound = torch.linalg.vector_norm(hidden, dtype=_wide(hidden)) * scale.abs() * (2 * len(hidden)) ** 0.5
        super().__init__(weight, torch.where(torch.isfinite(normalisers).all(), bound, torch.inf))

    def rows(self, start: int, stop: int) -> Tensor:
        """Returns rows start to stop of the gradient, (stop - start, D), in the head's dtype."""
        weight = self._weight[start:stop]
        total: Tensor | None = None
        size = max(1, self._block_elements // (stop - start))
        for h_CD, labels_C, normalisers_C in zip(
            *(tensor.split(size) for tensor in (self._hidden, self._labels, self._normalisers)), strict=True
        ):
            log_p_CV = F.linear(h_CD, weight).to(_wide(h_CD)).sub_(normalisers_C[:, None])
            product = _logit_gradients(log_p_CV, labels_C, start).to(h_CD.dtype).T @ h_CD
            total = product.to(_wide(product)) if total is None else total.add_(product)
            # Frees the memory before the next block's logits are computed.
            del log_p_CV, product
        assert total is not None  # an empty tensor is split into one empty chunk
        return total.mul_(self._scale).to(self.dtype)


def _head_slices(weight: Tensor) -> list[tuple[int, int]]:
    """Returns the slices of rows, `weight[start:stop]`, in which a forward pass reads the head.

    A plain head is read whole, as one product is fastest; of one stored as int8 (model.int8) values are computed slice by slice.
    """
    size = getattr(weight, "rows_at_a_time", len(weight))
    return [(start, min(start + size, len(weight))) for start in range(0, len(weight), size)]


def _logits(h_CD: Tensor, weight: Tensor) -> Tensor:
    """Returns the logits (C, V) in float32 or wider."""
    slices = _head_slices(weight)
    if len(slices) == 1:
        logits_CV = F.linear(h_CD, weight[: len(weight)])
    else:
        logits_CV = h_CD.new_empty(len(h_CD), len(weight))
        for start, stop in slices:
            logits_CV[:, start:stop] = F.linear(h_CD, weight[start:stop])
    return logits_CV.to(_wide(logits_CV))


def _times_head(grad_CV: Tensor, weight: Tensor) -> Tensor:
    """Returns grad_CV @ weight; products with several slices of the head are summed in float32 or wider."""
    products = (grad_CV[:, start:stop] @ weight[start:stop] for start, stop in _head_slices(weight))
    total = next(products)
    for product in products:
        total = total.to(_wide(total)).add_(product)
    return total


def _log_probabilities(h_CD: Tensor, weight: Tensor) -> Tensor:
    return F.log_softmax(_logits(h_CD, weight), dim=-1)


def _label_column(values_CV: Tensor, labels_C: Tensor) -> Tensor:
    """Returns each row's value at its label; at column 0 in ignored rows."""
    return values_CV.gather(1, labels_C.clamp(min=0)[:, None])[:, 0]


def _token_losses(log_p_CV: Tensor, labels_C: Tensor) -> Tensor:
    return torch.where(labels_C == IGNORE_INDEX, 0.0, -_label_column(log_p_CV, labels_C))


def _logit_gradients(log_p_CV: Tensor, labels_C: Tensor, first: int = 0) -> Tensor:
    """Returns softmax - onehot(label), and 0 in ignored rows; overwrites the log probabilities.

    first: the token id of the first column, if the columns are a slice of the vocabulary.
    """
    columns_C = labels_C - first
    inside_C = (columns_C >= 0) & (columns_C < log_p_CV.shape[1])
    grad_CV = log_p_CV.exp_()
    columns_C = columns_C.clamp(0, log_p_CV.shape[1] - 1)
    grad_CV.scatter_add_(1, columns_C[:, None], -inside_C[:, None].to(grad_CV.dtype))
    return grad_CV.mul_((labels_C != IGNORE_INDEX)[:, None])


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype, block_rows: int = 1024) -> Tensor:
    """Returns gradient * scale, multiplied in float32 by blocks; a scale rounded to bfloat16 would bias every gradient.

    In place if the dtype stays; using the saved gradient a second time is then an error that torch reports.
    """
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
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
    table = model.embed_tokens.weight
    hidden: Tensor = model.embed_tokens(input_ids) if getattr(table, "take_rows", None) is None else embed(table, input_ids)
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

    def __init__(
        self,
        model: "LlamaForCausalLM",
        chunk_rows: int | None = None,
        document_end: int | None = None,
        head_gradient: str = "whole",
    ) -> None:
        """chunk_rows, head_gradient: see chunked_cross_entropy. document_end: see hidden_states."""
        super().__init__()
        self.model = model
        self.chunk_rows = chunk_rows
        self.document_end = document_end
        self.head_gradient = head_gradient

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
            hidden.flatten(0, 1),
            self.model.lm_head.weight,
            targets.flatten(),
            self.chunk_rows,
            num_targets,
            head_gradient=self.head_gradient,
        )
