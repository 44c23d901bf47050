"""The positions of a uniform support: their number, distribution, reproducibility and storage."""

import itertools
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_lora import generator_for
from sparse_lora import uniform as uniform_module
from sparse_lora.uniform import Layout, UniformSupport, _decode, encode, sample_positions

ROOT = Path(__file__).resolve().parents[2]


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(1, 30_000), st.integers(0, 2**40))
def test_positions_are_sorted_distinct_and_as_many_as_asked(data: st.DataObject, numel: int, seed: int) -> None:
    nnz = data.draw(st.integers(0, numel))
    positions = sample_positions(nnz, numel, generator_for(seed, "w"))
    assert positions.dtype == torch.int64
    assert positions.numel() == nnz
    assert (positions.diff() > 0).all()
    assert ((positions >= 0) & (positions < numel)).all()


def test_more_positions_than_entries_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot choose 5 of 4 positions"):
        sample_positions(5, 4, generator_for(0, "w"))


def chi_square(counts: list[int]) -> float:
    expected = sum(counts) / len(counts)
    return sum((count - expected) ** 2 for count in counts) / expected


def chi_square_limit(num_classes: int) -> float:
    """Mean plus six standard deviations of the chi-square distribution."""
    return num_classes - 1 + 6 * math.sqrt(2 * (num_classes - 1))


# permute_up_to = 4096 selects the permutation for these sizes; 6 selects the draws with rejection, as for real weights.
@pytest.mark.parametrize("permute_up_to", [4096, 6])
@pytest.mark.parametrize(("nnz", "numel"), [(1, 9), (3, 8), (2, 9), (6, 9)])
def test_every_subset_of_a_tiny_weight_is_equally_likely(
    monkeypatch: pytest.MonkeyPatch, permute_up_to: int, nnz: int, numel: int
) -> None:
    monkeypatch.setattr(uniform_module, "_PERMUTE_UP_TO", permute_up_to)
    generator = generator_for(1, "w")
    subsets = list(itertools.combinations(range(numel), nnz))
    drawn = Counter(tuple(sample_positions(nnz, numel, generator).tolist()) for _ in range(30 * len(subsets)))
    assert drawn.keys() <= set(subsets)
    assert chi_square([drawn[subset] for subset in subsets]) < chi_square_limit(len(subsets))


@pytest.mark.parametrize("density", [0.03, 0.4, 0.9])
def test_positions_of_a_large_weight_are_uniform_and_independent(density: float) -> None:
    """Bins have equal counts, and neighbouring pairs are as frequent as in a uniform subset: k (k - 1) / n on average."""
    numel, num_bins = 1_000_000, 100
    nnz = int(density * numel)
    positions = sample_positions(nnz, numel, generator_for(3, "w"))
    counts = torch.bincount(positions // (numel // num_bins), minlength=num_bins).tolist()
    assert chi_square(counts) < chi_square_limit(num_bins)
    neighbours = int((positions.diff() == 1).sum())
    expected = nnz * (nnz - 1) / numel
    assert abs(neighbours - expected) < 6 * math.sqrt(expected)


def test_a_sparse_draw_needs_no_temporary_of_the_weights_size() -> None:
    """No temporary tensor is larger than a small multiple of the number of positions."""

    class LargestTensor(TorchDispatchMode):
        num_bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.num_bytes = max(self.num_bytes, leaf.numel() * leaf.element_size())
            return result

    numel, nnz = 2_000_000, 20_000
    with LargestTensor() as largest:
        sample_positions(nnz, numel, generator_for(0, "w"))
    # n ln(n / (n - k)) + 4 sqrt(k) draws of 8 bytes: 1 % over k for the logarithm at this density, 3 % for the root.
    assert nnz * 8 <= largest.num_bytes < 1.1 * nnz * 8


def test_a_generator_depends_on_seed_and_name_only() -> None:
    """Generators are equal for equal (seed, name) and different otherwise, also for (1, "1x") and (11, "x")."""
    keys = [(seed, name) for seed in (0, 1, 11, -1, 2**70) for name in ("", "x", "1x", "a.b", "b.a")]
    first = {key: tuple(torch.rand(4, generator=generator_for(*key)).tolist()) for key in keys}
    again = {key: tuple(torch.rand(4, generator=generator_for(*key)).tolist()) for key in reversed(keys)}
    assert first == again
    assert len(set(first.values())) == len(keys)


def test_another_process_draws_the_same_numbers() -> None:
    """Python's string hash differs between processes; the generators must not."""
    code = (
        "from sparse_lora import generator_for; from sparse_lora.uniform import sample_positions;"
        "print(sample_positions(50, 10_000, generator_for(7, 'layer.support')).tolist())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "123", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == str(sample_positions(50, 10_000, generator_for(7, "layer.support")).tolist())


def test_drawing_ignores_the_default_device() -> None:
    support = UniformSupport(30, 40, 100)
    support.draw_(generator_for(0, "w"))
    expected = support.flat_indices().clone()
    with torch.device("meta"):
        support.draw_(generator_for(0, "w"))
    assert torch.equal(support.flat_indices(), expected)


@settings(deadline=None, max_examples=150)
@given(st.data(), st.sampled_from([5, 300, 70_000, 300_000, 20_000_000]), st.integers(0, 2**40))
def test_drawn_positions_are_read_back_exactly(data: st.DataObject, numel: int, seed: int) -> None:
    """For densities from one position in millions (stored plain) to all, and weights of very different sizes."""
    share = data.draw(st.floats(0, 1)) ** 4
    nnz = min(int(share * numel), 50_000)
    support = UniformSupport(1, numel, nnz)
    support.draw_(generator_for(seed, "w"))
    positions = sample_positions(nnz, numel, generator_for(seed, "w"))
    assert torch.equal(support.flat_indices(), positions)
    assert support.code.numel() == support.layout.nbytes


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 3 * 2**24), max_size=40), st.sampled_from([1, 2, 4, 8]))
def test_any_set_is_stored_exactly_or_refused(numbers: list[int], width: int) -> None:
    """Sets that no uniform draw gives: gaps of every size, no gaps, or more long gaps than there is room for."""
    positions = torch.tensor(sorted(set(numbers)), dtype=torch.int64)
    inner = Layout(8, 40, 4)
    layout = Layout(40, 2**26, width, inner if width < 4 else None)
    code = encode(positions, layout)
    gaps = positions.diff(prepend=positions.new_zeros(1))
    fits = width >= 4 or (int((gaps >= 256**width).sum()) <= 8 and bool((gaps < 256 ** (width + 1)).all()))
    assert (code is not None) == fits
    if code is not None:
        decoded = _decode(code, layout, torch.int64)
        assert torch.equal(decoded[: len(positions)].long(), positions)


def test_positions_beyond_int32_are_kept() -> None:
    support = UniformSupport(2**16 + 1, 2**15, 5000)
    support.draw_(generator_for(0, "w"))
    positions = sample_positions(5000, support.numel, generator_for(0, "w"))
    assert positions[-1] > 2**31 - 1
    assert torch.equal(support.flat_indices(), positions)


@pytest.mark.parametrize(
    ("shape", "sparsity", "limit"),
    [((4096, 11008), 0.05, 1.001), ((512, 1376), 0.03, 1.01), ((4096, 4096), 0.01, 1.2), ((4096, 4096), 0.001, 2.01)],
)
def test_a_position_takes_about_one_byte(shape: tuple[int, int], sparsity: float, limit: float) -> None:
    """The published code stores 8 bytes per position."""
    nnz = int(sparsity * shape[0] * shape[1])
    assert UniformSupport(*shape, nnz, device="meta").nbytes <= limit * nnz


def test_a_draw_that_does_not_fit_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The case is constructed: by chance it does not occur, as the room is 12 standard deviations above the mean."""
    first = torch.arange(1000) * 300  # every gap of 300 needs an entry in the list of long gaps
    second = sample_positions(1000, 300_000, generator_for(0, "w"))
    layout = Layout(1000, 300_000, 1, Layout(600, 1000, 4))
    draws = iter([first, second])
    monkeypatch.setattr(uniform_module, "sample_positions", lambda *_: next(draws))
    monkeypatch.setattr(uniform_module, "layout_for", lambda *_: layout)
    support = UniformSupport(300, 1000, 1000)
    support.draw_(generator_for(0, "w"))
    assert torch.equal(support.flat_indices(), second)


def test_positions_are_saved_in_the_state_dict() -> None:
    support = UniformSupport(30, 40, 100)
    support.draw_(generator_for(0, "w"))
    other = UniformSupport(30, 40, 100)
    other.load_state_dict(support.state_dict())
    assert support.flat_indices().dtype == torch.int64
    assert torch.equal(other.flat_indices(), support.flat_indices())


def test_casting_a_model_does_not_change_positions() -> None:
    support = UniformSupport(300, 400, 1000)
    support.draw_(generator_for(0, "w"))
    expected = support.flat_indices().clone()
    assert torch.equal(support.to(torch.bfloat16).flat_indices(), expected)


def test_a_support_larger_than_its_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nnz = 7 does not fit a 2 x 3 weight"):
        UniformSupport(2, 3, 7)
