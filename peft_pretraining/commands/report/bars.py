"""Draws memory by class, predicted and measured, and throughput."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_pretraining.commands.report.drawing import WHITE, digits, legend, line_styles, name_of, save, wrapped
from peft_pretraining.commands.report.groups import Group
from peft_pretraining.commands.report.published import THROUGHPUT, THROUGHPUT_MACHINE

CLASS_COLOURS = {"parameters": "#0072B2", "support": "#D55E00", "optimizer": "#56B4E9", "rest": "#BBBBBB"}
CLASS_NAMES = {
    "parameters": "parameters",
    "support": "support (positions of S)",
    "optimizer": "optimizer (moments)",
    "rest": "gradients, activations and all else, up to the peak",
}


def memory_parts(group: Group, side: str) -> dict[str, int] | None:
    """Returns bytes of parameters, support, optimizer and the rest up to the peak; None if unknown.

    side: "predicted", or "measured" (the mean over runs).
    """
    read = group.first.predicted if side == "predicted" else group.measured
    sizes = {name: read(name) for name in ("parameters", "support", "optimizer")}
    peak = read("peak")
    known = {name: value for name, value in sizes.items() if value is not None}
    if peak is None and len(known) < len(sizes):
        return None
    rest = 0 if peak is None else max(0, peak - sum(known.values()))
    return {**{name: known.get(name, 0) for name in sizes}, "rest": rest}


def draw_memory(groups: Sequence[Group], path: Path) -> Path | None:
    """Draws memory by class, predicted above measured, for each group (as the paper's Fig. 3 does for the peak)."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    bars = [
        (group, side, parts)
        for group in groups
        for side in ("predicted", "measured")
        if (parts := memory_parts(group, side)) is not None
    ]
    if not bars:
        return None
    figure, panels = pyplot.subplots(
        1, 2, figsize=(14, 1.7 + 0.42 * len(bars)), layout="constrained", sharey=True, width_ratios=(2, 3)
    )
    places, position, last = [], 0.0, None
    for group, _, _ in bars:
        position += 1.0 if group is last else 1.5
        last = group
        places.append(position)
    _stacks(panels[0], places, bars, ("parameters", "support", "optimizer"), "parameters, support and moments")
    _stacks(panels[1], places, bars, tuple(CLASS_COLOURS), "peak of one process")
    _name_groups(panels[0], places, [group for group, _, _ in bars])
    handles = [Patch(color=CLASS_COLOURS[kind]) for kind in CLASS_COLOURS]
    names = [CLASS_NAMES[kind] for kind in CLASS_COLOURS]
    if any(group.measured("parameters") is None and side == "measured" for group, side, _ in bars):
        handles.append(Patch(facecolor=CLASS_COLOURS["rest"], hatch="///", edgecolor="white"))
        names.append("peak, not measured by class")
    legend(figure, handles, names, widest=3)
    return save(figure, path)


def _name_groups(panel: Any, places: Sequence[float], groups: Sequence[Group]) -> None:
    """Puts one label at the middle of each group's bars: long labels beside every bar would overlap."""
    middles = {}
    for group in groups:
        bars = [place for place, owner in zip(places, groups, strict=True) if owner is group]
        middles[sum(bars) / len(bars)] = wrapped(group.label)
    panel.set_yticks(list(middles), list(middles.values()))
    panel.invert_yaxis()


def _has_peak(group: Group, side: str) -> bool:
    return (group.first.predicted if side == "predicted" else group.measured)("peak") is not None


def _stacks(
    panel: Any,
    places: Sequence[float],
    bars: Sequence[tuple[Group, str, dict[str, int]]],
    kinds: Sequence[str],
    quantity: str,
) -> None:
    """Draws each bar as a stack of `kinds`, with its sum and whether it is predicted or measured written beside it."""
    largest = max(sum(parts[kind] for kind in kinds) for _, _, parts in bars)
    unit, name = (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")
    for place, (group, side, parts) in zip(places, bars, strict=True):
        left = 0.0
        for kind in kinds:
            undivided = side == "measured" and group.measured("parameters") is None and kind == "rest"
            width = parts[kind] / unit
            hatch = "///" if undivided else None
            panel.barh(
                place,
                width,
                left=left,
                height=0.8,
                color=CLASS_COLOURS[kind],
                hatch=hatch,
                edgecolor="white",
                linewidth=0.6,
            )
            left += width
        label = f"{side} {digits(left)} {name}" if left else f"not {side}"
        label += "" if "rest" not in kinds or _has_peak(group, side) else ", the rest not predicted"
        panel.text(left + largest / unit * 0.01, place, label, va="center", fontsize=9.5, bbox=WHITE)
    panel.grid(axis="y", visible=False)
    panel.set_xlim(0, largest / unit * 1.45)
    panel.set_xlabel(f"{quantity}, {name}")


def draw_throughput(groups: Sequence[Group], path: Path) -> Path | None:
    """Draws the median tokens per second of each group's runs, with mean and range, and the configuration's published figure."""
    from matplotlib import pyplot

    shown = [(group, group.figure("tokens_per_second")) for group in groups]
    bars = [(group, rate) for group, rate in shown if rate is not None]
    if not bars:
        return None
    rates_of = [[run.figures["tokens_per_second"] for run in group.counted or group.runs] for group, _ in bars]
    spread = [[rate for rate in rates if rate is not None] for rates in rates_of]
    highest = max(map(max, spread))
    figure, panel = pyplot.subplots(figsize=(11, 1.3 + 0.5 * len(bars)), layout="constrained")
    styles = line_styles([group for group, _ in bars])
    for number, ((group, rate), rates, style) in enumerate(zip(bars, spread, styles, strict=True)):
        panel.barh(number, rate, height=0.65, color=style["color"], alpha=0.6)
        if len(rates) > 1:
            panel.errorbar(
                rate, number, xerr=[[rate - min(rates)], [max(rates) - rate]], color="#000000", capsize=4, capthick=1.5
            )
        published = THROUGHPUT.get((group.first.model, group.method)) if group.published else None
        comparison = f"   (published: {published:,} on {THROUGHPUT_MACHINE[group.first.model]})" if published else ""
        panel.text(max(rates) + highest * 0.015, number, f"{rate:,.0f}{comparison}", va="center", fontsize=9.5, bbox=WHITE)
    panel.set_yticks(range(len(bars)), [wrapped(name_of(group)) for group, _ in bars])
    panel.invert_yaxis()
    panel.grid(axis="y", visible=False)
    panel.set_xlim(0, highest * 1.35)
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.set_xlabel("tokens of text per second (median over logged updates; whiskers: lowest and highest run)")
    return save(figure, path)
