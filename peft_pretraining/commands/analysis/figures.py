"""Draws spectra as PNG files: one file per kind of linear, with a row for each of up to four decoder layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_pretraining.commands.report.drawing import whole_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

# Pictures "weight" and "residual" of each dense linear, by its name.
Images = dict[str, dict[str, "Tensor"]]

_MOST_ROWS = 4
_STYLES = {
    "weight": ("W", "black"),
    "low_rank": ("low-rank part", "tab:blue"),
    "sparse": ("S", "tab:orange"),
}


def drawn_names(names: Iterable[str]) -> set[str]:
    """Names of the linears to draw: up to four per kind, evenly spread over the decoder layers, first and last included."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind_and_layer(name)[0], []).append(name)
    drawn = set()
    for members in kinds.values():
        rows = min(_MOST_ROWS, len(members))
        drawn |= {members[round(row * (len(members) - 1) / max(1, rows - 1))] for row in range(rows)}
    return drawn


def kind_and_layer(name: str) -> tuple[str, int]:
    """("self_attn.q_proj", 3) of model.layers.3.self_attn.q_proj; the whole name and 0 if it has no layer number."""
    match = re.fullmatch(r".*\blayers\.(\d+)\.(.+)", name)
    return (match[2], int(match[1])) if match else (name, 0)


def plot_spectra(figures: Sequence[Mapping[str, Any]], images: Images, folder: Path, title: str) -> list[Path]:
    """Draws spectra-KIND.png for each kind of linear; returns the paths.

    figures: results of `decompose.linear_figures`, each with its "name". images: of the dense linears in `drawn_names`.
    """
    drawn = drawn_names(linear["name"] for linear in figures)
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for linear in figures:
        if linear["name"] in drawn:
            kinds.setdefault(kind_and_layer(linear["name"])[0], []).append(linear)
    return [_plot_kind(linears, images, folder / f"spectra-{kind}.png", f"{kind}: {title}") for kind, linears in kinds.items()]


def _plot_kind(linears: Sequence[Mapping[str, Any]], images: Images, path: Path, title: str) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dense = "residual" in linears[0]
    columns = 4 if dense else 2
    figure, axes = pyplot.subplots(
        len(linears), columns, figsize=(3.9 * columns if dense else 11, 3.3 * len(linears) + 0.5), squeeze=False,
        constrained_layout=True,
    )  # fmt: skip
    figure.suptitle(title, parse_math=False)
    for row, linear in zip(axes, linears, strict=True):
        layer = f"layer {kind_and_layer(linear['name'])[1]}, {linear['shape'][0]} x {linear['shape'][1]}"
        _singular_values(row[0], linear, layer)
        if dense:
            pictures = images[linear["name"]]
            top = float(pictures["weight"].max())
            for axis, which, label in ((row[1], "weight", "|W|"), (row[2], "residual", f"|W - W_{_rank(linear)}|")):
                shown = axis.imshow(pictures[which].numpy(), cmap="viridis", vmin=0, vmax=top, aspect="auto")
                axis.set(title=label, xticks=[], yticks=[], xlabel="inputs", ylabel="outputs")
                figure.colorbar(shown, ax=axis)
            _magnitudes(row[3], linear)
        else:
            _contributions(row[1], linear)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _rank(linear: Mapping[str, Any]) -> int:
    """The rank of the low-rank part, or of a dense weight's approximation."""
    return int(linear["residual"]["rank"] if "residual" in linear else linear["rank"])


def _singular_values(axis: Axes, linear: Mapping[str, Any], title: str) -> None:
    spectra = linear["singular_values"]
    for part, values in spectra.items():
        label, color = _STYLES[part]
        axis.plot(range(1, len(values) + 1), values, color=color, label=label, linewidth=1.6)
    largest = max(values[0] for values in spectra.values())
    # The axis ends above rounding errors of float64, which are all that is left where W has low rank.
    visible = [value for values in spectra.values() for value in values if value > 1e-7 * largest]
    axis.set(title=title, xlabel="index", ylabel="singular value")
    if visible:
        axis.set(yscale="log", ylim=(min(visible) / 1.5, largest * 1.5))
    _finish(axis, linear)


def _contributions(axis: Axes, linear: Mapping[str, Any]) -> None:
    weight = linear["singular_values"]["weight"]
    axis.plot(range(1, len(weight) + 1), weight, color="black", label="W", linewidth=1.6)
    for part, values in linear["contributions"].items():
        label, color = _STYLES[part]
        axis.plot(range(1, len(values) + 1), values, color=color, label=label, linewidth=1.2)
    axis.set(title="contributions to W's singular values", xlabel="index", ylabel="contribution")
    _finish(axis, linear)


def _magnitudes(axis: Axes, linear: Mapping[str, Any]) -> None:
    residual = linear["residual"]
    edges, below = residual["edges"], residual["below"]
    shares = [upper - lower for lower, upper in zip([0.0, *below[1:-1]], below[1:], strict=True)]
    axis.bar(edges[:-1], shares, width=edges[1] or 1.0, align="edge", color="tab:blue", alpha=0.5)
    axis.set(
        title=f"{1 - residual['share']:.4g} of the entries: at most {residual['cut']:.3g}",
        xlabel=f"|W - W_{residual['rank']}|",
        ylabel="share of entries (bars)",
    )
    cumulative = axis.twinx()
    cumulative.plot(edges, below, color="tab:red", linewidth=1.6)
    cumulative.axvline(residual["cut"], color="gray", linestyle="--", linewidth=1)
    cumulative.set(ylim=(0, 1.03), ylabel="cumulative share (line)")


def _finish(axis: Axes, linear: Mapping[str, Any]) -> None:
    if (rank := _rank(linear)) < len(linear["singular_values"]["weight"]):
        axis.axvline(rank, color="gray", linestyle="--", linewidth=1, label=f"r = {rank}")
    whole_ticks(axis.xaxis)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
