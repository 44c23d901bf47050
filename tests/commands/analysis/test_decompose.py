"""Spectra equal those of plain torch.linalg, and have the properties of singular values."""

import math

import pytest
import torch
from torch import Tensor, nn

from peft_pretraining.commands.analysis.decompose import (
    Decomposition,
    check_rank,
    decompose,
    image,
    linear_figures,
    residual_figures,
    target_linears,
    weight_parts,
)
from sparse_lora import SparseLowRankLinear

OUT, IN, R = 24, 40, 6


def layer(**settings) -> SparseLowRankLinear:
    made = SparseLowRankLinear(IN, OUT, R, **{"sparsity": 0.1, "alpha": 9.0, "seed": 4, **settings})
    with torch.no_grad():
        made.lora_B.normal_(generator=torch.Generator().manual_seed(5))
    return made


def dense(out_features: int = OUT, in_features: int = IN) -> nn.Linear:
    linear = nn.Linear(in_features, out_features, bias=False)
    with torch.no_grad():
        linear.weight.normal_(generator=torch.Generator().manual_seed(6))
    return linear


def parts_by_hand(made: SparseLowRankLinear, scale: float) -> tuple[Tensor, Tensor]:
    low_rank = scale * made.lora_B.detach().double() @ made.lora_A.detach().double()
    sparse = torch.zeros(OUT * IN, dtype=torch.float64)
    assert made.support is not None
    assert made.sparse_value is not None
    for position, value in zip(made.support.flat_indices().tolist(), made.sparse_value.tolist(), strict=True):
        sparse[position] = value
    return low_rank, sparse.view(OUT, IN)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 9 / R),
        ({"support": "block"}, 9 / R),
        ({"trainable_scaling": True}, math.tanh(1.0)),
        ({"dtype": torch.bfloat16}, 9 / R),
    ],
    ids=["uniform", "block", "trained scaling", "bfloat16"],
)
def test_parts_spectra_and_contributions_equal_those_by_torch_linalg(settings: dict, scale: float) -> None:
    made = layer(**settings)
    low_rank, sparse = parts_by_hand(made, scale)
    figures, pictures = linear_figures(made, None, 0.03, draw=True)
    found, contributions = figures["singular_values"], figures["contributions"]
    U, s, Vh = torch.linalg.svd(low_rank + sparse, full_matrices=False)
    assert found["weight"] == pytest.approx(s.tolist(), rel=1e-6)
    assert found["low_rank"] == pytest.approx(torch.linalg.svdvals(low_rank)[:R].tolist(), rel=1e-6)
    assert found["sparse"] == pytest.approx(torch.linalg.svdvals(sparse).tolist(), rel=1e-6)
    for name, part in (("low_rank", low_rank), ("sparse", sparse)):
        assert contributions[name] == pytest.approx((U.T @ part @ Vh.T).diagonal().tolist(), abs=1e-6 * float(s[0]))
    # The contributions of the parts add up to the singular values of W.
    both = [a + b for a, b in zip(contributions["low_rank"], contributions["sparse"], strict=True)]
    assert both == pytest.approx(found["weight"], rel=1e-12)
    assert figures["sparse_share"]["first_r"] == pytest.approx(sum(contributions["sparse"][:R]) / float(s[:R].sum()))
    assert figures["sparse_share"]["rest"] == pytest.approx(sum(contributions["sparse"][R:]) / float(s[R:].sum()))
    assert figures["stable_rank"] == pytest.approx(float((s**2).sum() / s[0] ** 2))
    assert (figures["shape"], figures["rank"]) == ([OUT, IN], R)
    assert figures["nonzeros"] == int((sparse != 0).sum())
    assert pictures == {}


def test_parts_add_up_to_the_weight_that_the_layer_applies() -> None:
    made = layer()
    assert torch.allclose(sum(weight_parts(made).values()), made.dense_weight().detach().double(), atol=1e-6)


def test_a_low_rank_weight_has_only_a_low_rank_part() -> None:
    made = layer(sparsity=0.0)
    figures, _ = linear_figures(made, None, 0.03, draw=False)
    s = figures["singular_values"]["weight"]
    assert figures["contributions"]["low_rank"] == pytest.approx(s, abs=1e-12 * s[0])
    assert max(s[R:]) < 1e-12 * s[0] < s[R - 1]
    assert len(figures["singular_values"]["low_rank"]) == R
    assert figures["nonzeros"] is None
    assert "sparse_share" not in figures


def test_a_share_of_zero_singular_values_is_none() -> None:
    """If W has rank r, the share of S in the singular values beyond r would be 0 / 0."""
    made = layer()
    with torch.no_grad():
        assert made.sparse_value is not None
        made.sparse_value.zero_()
    figures, _ = linear_figures(made, None, 0.03, draw=False)
    assert figures["sparse_share"] == {"first_r": 0.0, "rest": None}


@pytest.mark.parametrize("rank", [1, 7, 23])
def test_the_best_approximation_leaves_the_other_singular_values(rank: int) -> None:
    """Eckart-Young: ||W - W_r||_F^2 is the sum of squared singular values beyond r; other matrices of rank r leave more."""
    weight = dense().weight.detach().double()
    s = torch.linalg.svdvals(weight)
    found = decompose(weight)
    B, A = found.factors(rank)
    assert (B.shape, A.shape) == ((OUT, rank), (rank, IN))
    assert torch.allclose(B @ A, found.best(rank))
    left = float((weight - found.best(rank)).norm())
    assert left == pytest.approx(float(s[rank:].square().sum().sqrt()))
    generator = torch.Generator().manual_seed(8)
    for _ in range(20):
        step = 0.1 * torch.randn(B.shape, dtype=torch.float64, generator=generator)
        assert left < float((weight - (B + step) @ A).norm())


@pytest.mark.parametrize("share", [0.01, 0.03, 0.5])
def test_residual_figures_equal_those_of_sorted_magnitudes(share: float) -> None:
    linear = dense()
    weight = linear.weight.detach().double()
    residual = weight - decompose(weight).best(R)
    found = residual_figures(residual, weight, R, share)
    magnitudes = residual.abs().flatten()
    assert int((magnitudes > found.cut).sum()) == int(share * OUT * IN)
    top = magnitudes.topk(int(share * OUT * IN)).values
    assert found.top_energy == pytest.approx(float(top.square().sum() / magnitudes.square().sum()))
    assert found.norm == pytest.approx(float(residual.norm()))
    assert found.weight_norm == pytest.approx(float(weight.norm()))
    assert found.below == [float((magnitudes <= edge).sum()) / (OUT * IN) for edge in found.edges]
    assert (found.edges[0], found.edges[-1], found.below[-1]) == (0.0, float(magnitudes.max()), 1.0)


def test_a_dense_linear_has_residual_figures_at_the_default_rank() -> None:
    """The default rank is a quarter of the shorter side, as 128 of 512."""
    linear = dense()
    weight = linear.weight.detach().double()
    figures, pictures = linear_figures(linear, None, 0.03, draw=True)
    assert figures["residual"]["rank"] == OUT // 4
    assert figures["rank"] is None
    assert figures["singular_values"] == {"weight": pytest.approx(torch.linalg.svdvals(weight).tolist())}
    assert figures["contributions"] == {}
    assert torch.allclose(pictures["weight"], weight.abs().float())
    assert torch.allclose(pictures["residual"], (weight - decompose(weight).best(OUT // 4)).abs().float(), atol=1e-6)
    assert linear_figures(linear, 3, 0.03, draw=False)[0]["residual"]["rank"] == 3


def test_pictures_of_large_weights_show_means() -> None:
    matrix = torch.arange(-512 * 768, 512 * 768, dtype=torch.float64).view(1024, 768)
    shown = image(matrix)
    assert shown.shape == (256, 256)
    assert float(shown[3, 5]) == pytest.approx(float(matrix.abs()[12:16, 15:18].mean()))


def test_a_layer_of_another_kind_is_analysed_by_its_dense_weight() -> None:
    """For example a layer that adds a low-rank part to a frozen weight."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.rank = dense().weight, 2
            self.in_features, self.out_features = IN, OUT

        def dense_weight(self) -> Tensor:
            return 2 * self.frozen

    model = nn.ModuleDict({"attn": nn.ModuleDict({"q": Adapted()}), "mlp": dense(), "lm_head": dense()})
    found = target_linears(model)
    assert list(found) == ["attn.q", "mlp"]
    assert list(target_linears(model, ["q", "nothing"])) == ["attn.q"]
    figures, _ = linear_figures(found["attn.q"], None, 0.03, draw=False)
    expected = 2 * torch.linalg.svdvals(dense().weight.detach().double())
    assert figures["singular_values"]["weight"] == pytest.approx(expected.tolist())


def test_invalid_ranks_names_and_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="non-finite weights"):
        decompose(torch.tensor([[1.0, math.nan]]))
    with pytest.raises(ValueError, match=r"--rank 24: leaves no residual of b, whose shorter side is 24"):
        check_rank({"a": dense(30, 40), "b": dense()}, 24)
    check_rank({"a": dense(30, 40), "b": dense()}, 23)
    with pytest.raises(ValueError, match="--only z: matches none of the model's 1 linears; names are mlp"):
        target_linears(nn.ModuleDict({"mlp": dense()}), ["z"])


def test_contributions_of_a_zero_part_are_zero() -> None:
    weight = dense().weight.detach().double()
    found = decompose(weight)
    assert isinstance(found, Decomposition)
    assert found.contribution(torch.zeros_like(weight)).tolist() == [0.0] * OUT
    assert found.contribution(weight).tolist() == pytest.approx(found.s.tolist())
