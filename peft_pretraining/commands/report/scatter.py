"""Draws final perplexity against memory (the paper's Fig. 1) and against the learning rate."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft_pretraining.commands.report.drawing import (
    legend,
    line_styles,
    name_of,
    plain_log_ticks,
    save,
    whiskers,
)
from peft_pretraining.commands.report.groups import Group, method_title
from peft_pretraining.commands.report.published import TABLE
from peft_pretraining.methods import METHODS


def draw_perplexity_memory(groups: Sequence[Group], path: Path) -> Path | None:
    """Draws the paper's Fig. 1 (arXiv 2406.02214): perplexity against memory; a circle's area is the number of parameters.

    Left: memory by the paper's convention, with the published results of the same configurations. Right: measured memory of
    parameters, support and moments. Whiskers: the 95 % interval over seeds.
    """
    from matplotlib import pyplot

    shown = [group for group in groups if group.perplexity is not None and group.figure("parameters")]
    if not shown:
        return None
    measured = any(group.figure("states_bytes") for group in shown)
    models = {group.first.model for group in shown}
    published = [entry for entry in TABLE if entry.model in models and entry.memory is not None]
    largest = max([group.figure("parameters") or 0.0 for group in shown] + [1e6 * (entry.parameters or 0) for entry in published])
    styles = line_styles(shown)
    figure, row = pyplot.subplots(
        1,
        1 + measured,
        figsize=(6.8 * (1 + measured), 4.8),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    panels = list(row[0])

    def area(parameters: float) -> float:
        return 900 * parameters / largest

    unit, name = (1e9, "10⁹") if max(group.first.paper_memory or 0 for group in shown) >= 0.1 or published else (1e6, "10⁶")
    _circles(panels[0], shown, styles, area, lambda group: (group.first.paper_memory or 0) * 1e9 / unit)
    panels[0].set_xlabel(f"parameters and moments by the paper's convention (bfloat16), {name} bytes")
    panels[0].set_ylabel("final held-out perplexity")
    for entry in published:
        colour = METHODS[entry.method].colour
        panels[0].scatter(
            [(entry.memory or 0) * 1e9 / unit], [entry.perplexity], s=area(1e6 * (entry.parameters or 0)),
            facecolors="none", edgecolors=colour, linestyles="--", linewidths=1.5,
        )  # fmt: skip
    if measured:
        _circles(panels[1], shown, styles, area, lambda group: (group.figure("states_bytes") or 0) / 2**20)
        panels[1].set_xlabel("parameters, support and moments as measured, MiB")
    for panel in panels:
        panel.margins(0.18)
        _widen(panel)
        panel.set_yscale("log")
        plain_log_ticks(panel.yaxis)
    handles, labels = _entries(shown, styles, list(dict.fromkeys(entry.method for entry in published)))
    figure.suptitle("Circle area: number of parameters. Lower left is better.", fontsize=10.5)
    legend(figure, handles, labels)
    return save(figure, path)


def _widen(panel: Any) -> None:
    """Widens the memory axis to at least 5 % of its middle, so that tiny differences of memory do not look large."""
    low, high = panel.get_xlim()
    padding = 0.05 * (low + high) / 2 - (high - low) / 2
    if padding > 0:
        panel.set_xlim(low - padding, high + padding)
    panel.ticklabel_format(axis="x", useOffset=False, style="plain")


def _entries(shown: Sequence[Group], styles: Sequence[dict[str, Any]], published: Sequence[str]) -> tuple[list[Any], list[str]]:
    """The legend's handles and labels: groups, then the methods that have published results."""
    from matplotlib.lines import Line2D

    handles: list[Any] = [
        Line2D([], [], linestyle="", marker=style["marker"], color=style["color"], markersize=8) for style in styles
    ]
    handles += [
        Line2D([], [], linestyle="", marker="o", markerfacecolor="none", color=METHODS[method].colour, markersize=9)
        for method in published
    ]
    return handles, [name_of(group, counted=True) for group in shown] + [
        f"published: {method_title(method)}" for method in published
    ]


def _circles(
    panel: Any,
    groups: Sequence[Group],
    styles: Sequence[dict[str, Any]],
    area: Callable[[float], float],
    position: Callable[[Group], float],
) -> None:
    from matplotlib.transforms import ScaledTranslation

    shown = [
        (group, style, x, perplexity)
        for group, style in zip(groups, styles, strict=True)
        if (perplexity := group.perplexity) is not None and (x := position(group)) > 0
    ]
    offsets = _offsets([(x, perplexity.mean) for _, _, x, perplexity in shown])
    for (group, style, x, perplexity), points in zip(shown, offsets, strict=True):
        shifted = panel.transData + ScaledTranslation(points / 72, 0, panel.figure.dpi_scale_trans)
        panel.scatter(
            [x], [perplexity.mean], s=area(group.figure("parameters") or 0.0), color=style["color"], alpha=0.35, linewidths=0
        )
        marker = {"color": style["color"], "marker": style["marker"], "transform": shifted}
        panel.plot([x], [perplexity.mean], markersize=6, linestyle="", **marker)
        whiskers(panel, x, perplexity, style["color"], transform=shifted)


def _offsets(places: Sequence[tuple[float, float]], step: float = 9.0) -> list[float]:
    """Returns horizontal offsets, in points, that draw overlapping markers side by side.

    places: memory and perplexity. Markers overlap if their memory is the same and their perplexities are within 3 %.
    """
    offsets = [0.0] * len(places)
    remaining = list(range(len(places)))
    while remaining:
        x, y = places[remaining[0]]
        overlapping = [n for n in remaining if abs(places[n][0] - x) <= 1e-3 * x and abs(places[n][1] - y) <= 0.03 * y]
        for rank, number in enumerate(overlapping):
            offsets[number] = step * (rank - (len(overlapping) - 1) / 2)
        remaining = [number for number in remaining if number not in overlapping]
    return offsets


def draw_learning_rate(groups: Sequence[Group], path: Path) -> Path | None:
    """Draws final perplexity against the learning rate, a line per setting run at several rates; None without one."""
    from matplotlib import pyplot

    lines: dict[str, list[Group]] = {}
    for group in groups:
        if group.perplexity is not None:
            other_settings = {name: value for name, value in group.settings.items() if name != "lr"}
            lines.setdefault(json.dumps(other_settings, sort_keys=True, default=str), []).append(group)
    swept = [sorted(members, key=lambda group: group.settings["lr"]) for members in lines.values() if len(members) > 1]
    if not swept:
        return None
    figure, panel = pyplot.subplots(figsize=(8.5, 5.0), layout="constrained")
    handles, labels = [], []
    rates_seen = sorted({group.settings["lr"] for members in swept for group in members})
    for number, (members, style) in enumerate(zip(swept, line_styles([members[0] for members in swept]), strict=True)):
        # Side by side by 1 % of the axis, so that the ends of all whiskers are seen.
        shift = (rates_seen[-1] / rates_seen[0]) ** (0.01 * (number - (len(swept) - 1) / 2))
        points = [(shift * group.settings["lr"], group.perplexity) for group in members if group.perplexity is not None]
        (line,) = panel.plot([rate for rate, _ in points], [perplexity.mean for _, perplexity in points], **style, markersize=6)
        for rate, perplexity in points:
            whiskers(panel, rate, perplexity, style["color"])
        handles.append(line)
        parts = [part for part in members[0].label.split(", ") if not part.startswith("lr = ")]
        labels.append(", ".join(parts))
    panel.set(xscale="log", yscale="log", xlabel="peak learning rate", ylabel="final held-out perplexity")
    panel.set_xticks(rates_seen, [f"{rate:g}" for rate in rates_seen], rotation=45 if len(rates_seen) > 6 else 0)
    panel.minorticks_off()
    plain_log_ticks(panel.yaxis)
    legend(figure, handles, labels)
    return save(figure, path)
