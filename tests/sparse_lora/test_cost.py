"""The choice between the two paths by their number of multiplications, and where the paths cross."""

import pytest

from sparse_lora import SparseLowRankLinear
from sparse_lora.functional import cheaper_path, multiplications


def count(path: str, kind: str = "none", nnz: int = 0) -> float:
    """Returns the multiplications for 10 rows and a 4 x 6 weight at rank 2 on the CPU."""
    return multiplications(path, 10, 4, 6, 2, kind, nnz, "cpu", 2)


def test_multiplications_equal_those_counted_by_hand() -> None:
    """A dense product takes 10 * 4 * 6 = 240, building W 2 * 4 * 6 = 48, both factors 10 * 2 * (4 + 6) = 200. Blocks also move
    6 + 4 elements of each row in a product, and 4 to reorder the outputs."""
    assert count("materialised") == 3 * 240 + 4 * 48
    assert count("factored") == 3 * 200
    assert count("factored", "uniform", 5) == 3 * (200 + 240)
    assert count("factored", "block", 5) - 3 * 200 == 3 * 10 * (5 + 100 * (6 + 4 + 4))


@pytest.mark.parametrize(("out_features", "in_features", "rank"), [(512, 512, 128), (2048, 5461, 512), (11008, 4096, 1024)])
def test_a_uniform_support_is_factored_for_fewer_rows_than_the_crossover(out_features: int, in_features: int, rank: int) -> None:
    """3 T r (d + p) equals 4 r d p at T = 4 / 3 d p / (d + p), for every rank."""
    crossover = 4 * out_features * in_features / (3 * (out_features + in_features))
    for num_rows, expected in ((int(crossover), "factored"), (int(crossover) + 1, "materialised")):
        assert cheaper_path(num_rows, out_features, in_features, rank, "uniform", 1000, "cpu", 2) == expected


def test_a_large_rank_is_materialised() -> None:
    """Without a sparse part the factored path is slower if 3 T r (d + p) > 3 T d p + 4 r d p."""
    assert cheaper_path(4096, 512, 512, 128, "none", 0, "cpu", 2) == "factored"
    assert cheaper_path(4096, 512, 512, 1024, "none", 0, "cpu", 2) == "materialised"
    assert cheaper_path(1, 512, 512, 1024, "none", 0, "cpu", 2) == "factored"


def test_large_blocks_are_always_factored_and_small_ones_for_few_rows_only() -> None:
    """512 x 512 in 33 blocks of 15 x 15 takes 1.2 to 1.4 times nn.Linear's time factored, 1.1 times materialised (CPU)."""
    for num_rows in (1, 64, 2048, 32768):
        for shape, rank in (((1024, 2736), 256), ((5461, 2048), 512), ((4096, 11008), 1024)):
            assert cheaper_path(num_rows, *shape, rank, "block", shape[0] * shape[1] // 20, "cpu", 2) == "factored"
        thin = cheaper_path(num_rows, 512, 512, 128, "block", 512 * 512 // 33, "cpu", 2)
        assert thin == ("factored" if num_rows <= 64 else "materialised")


def test_float32_blocks_of_60m_are_factored() -> None:
    """There 33 blocks of 15 x 15 take .87 of nn.Linear's time factored and 1.06 materialised (AVX2)."""
    for device in ("cpu", "cuda"):
        chosen = [cheaper_path(4096, 512, 512, 128, "block", 512 * 512 // 33, device, width) for width in (2, 4, 8)]
        assert chosen == ["materialised", "factored", "factored"]


def test_on_a_gpu_blocks_are_factored_for_few_rows_or_large_weights_only() -> None:
    """Predicted from the card's bandwidth: for 16,384 rows the square weights of 350m and 1b are built, those of 7b are not."""
    chosen = {
        (size, rank): cheaper_path(16_384, size, size, rank, "block", size * size // 32, "cuda", 2)
        for size, rank in ((1024, 256), (2048, 512), (4096, 1024))
    }
    assert list(chosen.values()) == ["materialised", "materialised", "factored"]
    assert cheaper_path(64, 1024, 1024, 256, "block", 1024 * 1024 // 32, "cuda", 2) == "factored"


def test_auto_takes_the_cheaper_path(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from sparse_lora import functional

    taken = []
    output = functional._output

    def spy(*arguments: object) -> object:
        taken.append(arguments[-1])
        return output(*arguments)

    monkeypatch.setattr(functional, "_output", spy)
    layer = SparseLowRankLinear(64, 80, 4, 0.1, seed=0)
    crossover = 4 * 64 * 80 / (3 * (64 + 80))
    for num_rows in (int(crossover), int(crossover) + 1):
        layer(torch.randn(num_rows, 64))
    layer.path = "factored"
    layer(torch.randn(1000, 64))
    assert taken == [True, False, True]
