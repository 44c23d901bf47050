"""Gradients of embedding and head that come in rows equal the whole ones, and an optimizer steps from them as from those."""

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_pretraining.distributed.world import World
from peft_pretraining.model import row_gradient
from peft_pretraining.model.loss import IGNORE_INDEX, HeadGradient, chunked_cross_entropy
from peft_pretraining.model.row_gradient import EmbeddingGradient, embed
from peft_pretraining.optim import adam8bit, moments
from peft_pretraining.optim import updates as module
from peft_pretraining.optim.accumulation import AccumulatingUpdate
from peft_pretraining.optim.build import build_optimizer
from peft_pretraining.optim.slices import StochasticRounding
from peft_pretraining.optim.updates import PerLayerUpdate

VOCABULARY, WIDTH, ROWS, CHUNK = 300, 48, 50, 16
# Elements of a slice; small matrices would not have quantised moments.
SLICE = 2**13


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and labels, some of which are ignored and some at the ends of the vocabulary."""
    torch.manual_seed(0)
    hidden, head = torch.randn(ROWS, WIDTH).to(dtype), torch.randn(VOCABULARY, WIDTH).to(dtype)
    labels = torch.randint(0, VOCABULARY, (ROWS,))
    labels[::7], labels[1], labels[2] = IGNORE_INDEX, 0, VOCABULARY - 1
    return hidden, head, labels


def loss_and_gradients(dtype: torch.dtype, head_gradient: str, factor: float = 0.37) -> tuple[Tensor, ...]:
    hidden, head, labels = case(dtype)
    hidden.requires_grad_()
    head.requires_grad_()
    loss = chunked_cross_entropy(hidden, head, labels, CHUNK, head_gradient=head_gradient)
    return loss, *torch.autograd.grad(loss * factor, (hidden, head))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13), (torch.bfloat16, 8e-3)])
def test_the_heads_gradient_in_slices_equals_the_whole_one(dtype, tolerance):
    loss, of_hidden, of_head = loss_and_gradients(dtype, "whole")
    sliced_loss, sliced_of_hidden, sliced_of_head = loss_and_gradients(dtype, "slices")
    assert torch.equal(loss, sliced_loss)
    assert torch.equal(of_hidden, sliced_of_hidden)
    assert sliced_of_head.dtype == dtype
    assert float((sliced_of_head - of_head).norm() / of_head.norm()) < tolerance


@pytest.mark.parametrize("cuts", [(0, 300), (0, 1, 2, 150, 299, 300)])
def test_rows_of_the_heads_gradient_do_not_depend_on_the_division(cuts):
    hidden, head, labels = case(torch.float64)
    normalisers = torch.logsumexp(hidden @ head.T, dim=1)
    gradient = HeadGradient(hidden, head, labels, normalisers, torch.tensor(2.0), 1000)
    parts = torch.cat([gradient.rows(start, stop) for start, stop in pairwise(cuts)])
    head.requires_grad_()
    expected = torch.autograd.grad(2.0 * F.cross_entropy(hidden @ head.T, labels, reduction="sum"), head)[0]
    assert float((parts - expected).abs().max()) < 1e-12
    part = slice(5 * WIDTH + 7, 9 * WIDTH + 3)
    assert torch.equal(gradient.elements(part), gradient.rows(5, 10).view(-1)[7 : 4 * WIDTH + 3])
    assert float(expected.norm()) <= float(gradient.norm_bound) < torch.inf


def test_a_row_that_two_parts_share_has_the_gradient_of_its_values_before_the_first_step():
    """The first half of the row is stepped before the gradient of the second half is asked for."""
    hidden, head, labels = case(torch.float32)
    normalisers = torch.logsumexp(hidden @ head.T, dim=1)
    cuts = [0, 5 * WIDTH + 7, 9 * WIDTH + 3, 9 * WIDTH + 40, 20 * WIDTH, VOCABULARY * WIDTH]
    found = []
    for change in (0.0, 1.0):
        weight = head.clone()
        gradient = HeadGradient(hidden, weight, labels, normalisers, torch.tensor(1.0), 10**6)
        found.append([])
        for start, stop in pairwise(cuts):
            found[-1].append(gradient.elements(slice(start, stop)).clone())
            weight.view(-1)[start:stop] += change
    for untouched, stepped in zip(*found, strict=True):
        assert torch.equal(untouched, stepped)


def test_all_labels_ignored_give_a_gradient_of_zero():
    hidden, head, labels = case(torch.float32)
    head.requires_grad_()
    loss = chunked_cross_entropy(hidden, head, torch.full_like(labels, IGNORE_INDEX), CHUNK, head_gradient="slices")
    assert not torch.autograd.grad(loss, head)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_embeddings_gradient_in_rows_has_the_bits_of_the_dense_one(dtype):
    torch.manual_seed(0)
    ids, grad = torch.randint(0, 40, (5, 30)), torch.randn(5, 30, WIDTH).to(dtype)
    table = torch.randn(VOCABULARY, WIDTH).to(dtype).requires_grad_()
    (dense,) = torch.autograd.grad(F.embedding(ids, table), table, grad)
    (ours,) = torch.autograd.grad(embed(table, ids), table, grad)
    assert torch.equal(embed(table, ids), F.embedding(ids, table))
    assert torch.equal(ours, dense)
    rows = EmbeddingGradient(table.detach(), ids, grad)
    assert torch.equal(rows.elements(slice(3 * WIDTH - 1, 41 * WIDTH + 5)), dense.view(-1)[3 * WIDTH - 1 : 41 * WIDTH + 5])
    assert float(rows.norm_bound) == pytest.approx(float(dense.float().norm()), rel=1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.fixture
def small_slices(monkeypatch):
    """Slices of 16 rows of the model below."""
    for owner in (module, adam8bit, moments):
        monkeypatch.setattr(owner, "SLICE_ELEMENTS", SLICE)
    monkeypatch.setattr(row_gradient, "_ASSEMBLED_ELEMENTS", SLICE)


class Model(nn.Module):
    """An embedding and a head of several slices."""

    def __init__(self, head_gradient: str):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Parameter(torch.randn(2 * SLICE // 512 + 9, 512).bfloat16())
        self.lm_head = nn.Parameter(torch.randn(2 * SLICE // 512 + 9, 512).bfloat16() / 20)
        self.head_gradient = head_gradient

    def forward(self, ids: Tensor, factor: float = 1.0) -> Tensor:
        hidden = embed(self.embed_tokens, ids) * factor
        return chunked_cross_entropy(hidden, self.lm_head, ids.roll(1), 8, head_gradient=self.head_gradient)


def optimizer_for(name: str, rounding: StochasticRounding | None):
    return lambda parameters: build_optimizer(name, parameters, lr=0.0, weight_decay=0.01, rounding=rounding)


def train(
    model: Model,
    name: str,
    by_rows: tuple[str, ...],
    num_micro_batches: int = 1,
    factors: tuple[float, ...] = (1.0, 1.0),
    in_moments: bool = False,
):
    """Makes updates; returns their outcomes. in_moments: accumulate gradients in moments."""
    rounding = None if name == "adam8bit" else StochasticRounding(3)
    kind = partial(AccumulatingUpdate, num_micro_batches=num_micro_batches, seed=0) if in_moments else PerLayerUpdate
    updates = kind(optimizer_for(name, rounding), dict(model.named_parameters()), World(), by_rows=by_rows)
    outcomes = []
    for number, factor in enumerate(factors):
        updates.begin(lr=0.01)
        for micro_batch in range(num_micro_batches):
            torch.manual_seed(10 * number + micro_batch)
            ids = torch.randint(0, len(model.lm_head), (20,))
            updates.before_backward(micro_batch == num_micro_batches - 1)
            loss = model(ids, factor)
            loss.backward()
        outcomes.append(updates.finish(loss))
        assert all(parameter.grad is None for parameter in model.parameters())
    return updates, outcomes


BOTH = ("embed_tokens", "lm_head")


@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("name", ["adam8bit", "adamw4bit", "adamw"])
def test_steps_from_rows_equal_those_from_whole_gradients(small_slices, monkeypatch, name, num_micro_batches):
    """With one micro-batch no gradient of the matrix's size exists; with several the whole one is accumulated as without it."""
    rows, whole = Model("slices"), Model("slices")
    _, expected = train(whole, name, (), num_micro_batches)
    if num_micro_batches == 1:
        monkeypatch.setattr(module.RowGradient, "whole", lambda self: pytest.fail("a whole gradient was assembled"))
    updates, outcomes = train(rows, name, BOTH, num_micro_batches)
    for left, right in zip(rows.parameters(), whole.parameters(), strict=True):
        assert torch.equal(left, right)
    assert all(set(updates.optimizer.state[parameter]) for parameter in rows.parameters())
    for ours, theirs in zip(outcomes, expected, strict=True):
        assert float(ours.gradnorm) == pytest.approx(float(theirs.gradnorm), rel=1e-5)
        assert float(ours.skipped) == 0


@pytest.mark.parametrize("name", ["adam8bit", "adamw4bit", "adamw"])
def test_moments_accumulate_rows_as_whole_gradients(small_slices, monkeypatch, name):
    """In every micro-batch no gradient of the matrix's size exists; one that is not finite is left out."""
    rows, whole = Model("slices"), Model("slices")
    factors = (1.0, 1.0, torch.inf)
    _, expected = train(whole, name, (), 2, factors, in_moments=True)
    monkeypatch.setattr(module.RowGradient, "whole", lambda self: pytest.fail("a whole gradient was assembled"))
    _, outcomes = train(rows, name, BOTH, 2, factors, in_moments=True)
    for left, right in zip(rows.parameters(), whole.parameters(), strict=True):
        assert torch.equal(left, right)
    for ours, theirs in zip(outcomes[:2], expected[:2], strict=True):
        assert float(ours.gradnorm) == pytest.approx(float(theirs.gradnorm), rel=1e-5)
    assert [float(one.skipped) for one in outcomes] == [float(one.skipped) for one in expected] == [0, 0, 2]


@pytest.mark.parametrize("factor", [torch.inf, 1e30])
def test_a_gradient_that_is_not_finite_steps_no_slice(small_slices, factor):
    """1e30: hidden states are finite, the gradient's squares are not."""
    model = Model("slices")
    updates, _ = train(model, "adamw4bit", BOTH, factors=(1.0,))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    states = {name: updates.optimizer.state[p]["codes1"].clone() for name, p in model.named_parameters()}
    updates.begin(lr=0.01)
    updates.before_backward(last=True)
    loss = model(torch.arange(20), factor)
    loss.backward()
    outcome = updates.finish(loss)
    assert not torch.isfinite(outcome.gradnorm)
    assert float(outcome.skipped) == 2
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert torch.equal(updates.optimizer.state[parameter]["codes1"], states[name])
        assert updates.optimizer.state[parameter]["step"] == 1


def test_an_optimizer_that_needs_whole_gradients_gets_them(small_slices):
    model = Model("slices")
    before = model.lm_head.detach().clone()
    updates = PerLayerUpdate(optimizer_for("adamw", None), dict(model.named_parameters()), World(), by_rows=BOTH)
    assert not hasattr(model.lm_head, "take_rows")
    updates.begin(lr=0.01)
    updates.before_backward(last=True)
    model(torch.arange(20)).backward()
    assert not torch.equal(model.lm_head, before)
