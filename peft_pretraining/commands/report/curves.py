"""Draws loss and perplexity against update steps, tokens and training time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft_pretraining.commands.report.drawing import (
    COLOURS,
    STYLE,
    WHITE,
    legend,
    line_styles,
    name_of,
    plain_log_ticks,
    save,
    whole_ticks,
)
from peft_pretraining.commands.report.groups import Group
from peft_pretraining.commands.report.read import RunRecord


def draw_loss(groups: Sequence[Group], path: Path) -> Path | None:
    """Draws the smoothed training loss of every run against update steps, tokens and time."""
    shown = [group for group in groups if any(run.updates for run in group.runs)]
    if not shown:
        return None
    styles = [{"color": s["color"], "linestyle": s["linestyle"], "linewidth": 1.5} for s in line_styles(shown)]
    figure, panels = _lines_by_position(shown, styles, 0, lambda run: smoothed([row["loss"] for row in run.updates]))
    ends = [row["loss"] for group in shown for run in group.runs for row in run.updates[-1:]]
    _cut_above(panels[0], min(ends) + 3.0)
    panels[0].set_ylabel("training loss (smoothed), nats per token")
    return save(figure, path)


def draw_perplexity(groups: Sequence[Group], path: Path) -> Path | None:
    """Draws the held-out perplexity of every run against update steps, tokens and time, on a logarithmic scale."""
    shown = [group for group in groups if any(run.evaluations for run in group.runs)]
    if not shown:
        return None
    styles = [{**style, "markersize": 4, "linewidth": 1.4} for style in line_styles(shown)]
    figure, panels = _lines_by_position(shown, styles, 1, lambda run: [row["final_eval_perplexity"] for row in run.evaluations])
    ends = [row["final_eval_perplexity"] for group in shown for run in group.runs for row in run.evaluations[-1:]]
    for panel in panels:
        panel.set_yscale("log")
    _cut_above(panels[0], 12 * min(ends))
    for panel in panels:
        plain_log_ticks(panel.yaxis)
    panels[0].set_ylabel("held-out perplexity")
    return save(figure, path)


def _lines_by_position(
    groups: Sequence[Group], styles: Sequence[dict[str, Any]], kind: int, values_of: Callable[[RunRecord], list[float]]
) -> tuple[Any, list[Any]]:
    """Draws a line for every run with values against update steps, tokens and time; returns the figure and its three panels.

    kind: of the positions in RunRecord.axis, 0 of updates and 1 of evaluations.
    """
    figure, panels = _axes_by_position(groups, 4.4)
    handles = []
    for group, style in zip(groups, styles, strict=True):
        lines = []
        for run in group.runs:
            if values := values_of(run):
                for name, panel, unit in panels:
                    lines += panel.plot([position / unit for position in run.axis(name)[kind]], values, alpha=0.9, **style)
        handles.append(lines[0])
    for _, panel, _ in panels:
        # Also if the first evaluation came late.
        panel.set_xlim(left=0)
    legend(figure, handles, [name_of(group) for group in groups])
    return figure, [panel for _, panel, _ in panels]


def draw_curves(run: RunRecord, path: Path, title: str) -> Path:
    """Draws one run's training loss and held-out perplexity against update steps; returns the path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = run.axis("steps")[0]
    losses = [row["loss"] for row in run.updates]
    with matplotlib.rc_context(STYLE):
        figure, (loss_axis, perplexity_axis) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        figure.suptitle(title)
        loss_axis.plot(steps, losses, color=COLOURS[0], alpha=0.35, linewidth=0.8, label="each update")
        loss_axis.plot(steps, smoothed(losses), color=COLOURS[0], linewidth=1.8, label="smoothed")
        loss_axis.set(xlabel="update step", ylabel="training loss, nats per token")
        trained = [math.exp(min(loss, 50)) for loss in smoothed(losses)]
        perplexity_axis.plot(steps, trained, color=COLOURS[0], linewidth=1.2, label="training, smoothed")
        if run.evaluations:
            values = [row["final_eval_perplexity"] for row in run.evaluations]
            evaluated_steps = run.axis("steps")[1]
            perplexity_axis.plot(evaluated_steps, values, color=COLOURS[1], marker="o", markersize=5, label="held-out")
            if run.final_perplexity is not None:
                # To the right of the last point, where the lines have ended.
                perplexity_axis.annotate(
                    f"{values[-1]:.1f}",
                    (evaluated_steps[-1], values[-1]),
                    textcoords="offset points",
                    xytext=(7, 0),
                    va="center",
                    bbox=WHITE,
                )
        perplexity_axis.set(xlabel="update step", ylabel="perplexity", yscale="log")
        plain_log_ticks(perplexity_axis.yaxis)
        for axis in (loss_axis, perplexity_axis):
            whole_ticks(axis.xaxis)
            # Above the panel, where no line runs.
            axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
        return save(figure, path)


def _time_unit(seconds: float) -> tuple[float, str]:
    return next(
        (size, unit)
        for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
        if seconds >= 2 * size or unit == "seconds"
    )


def _count_unit(count: float) -> tuple[float, str]:
    return next(
        (size, unit)
        for size, unit in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"), (1.0, ""))
        if count >= size or size == 1.0
    )


def _axes_by_position(groups: Sequence[Group], height: float) -> tuple[Any, list[tuple[str, Any, float]]]:
    """Makes a figure of three panels; returns it with (axis name in RunRecord.axis, panel, size of the axis's unit) of each."""
    from matplotlib import pyplot

    runs = [run for group in groups for run in group.runs if run.updates]
    time, time_name = _time_unit(max((run.figures["training_seconds"] or 0.0 for run in runs), default=1.0))
    count, count_name = _count_unit(max((run.figures["tokens"] or 0 for run in runs), default=1))
    figure, panels = pyplot.subplots(1, 3, figsize=(14, height), layout="constrained", sharey=True)
    labels = ("update step", f"tokens seen{', ' if count_name else ''}{count_name}", f"training time, {time_name}")
    for panel, label in zip(panels, labels, strict=True):
        panel.set_xlabel(label)
    whole_ticks(panels[0].xaxis)
    names = zip(("steps", "tokens", "seconds"), panels, (1.0, count, time), strict=True)
    return figure, list(names)


def _cut_above(panel: Any, limit: float) -> None:
    """Cuts the shared vertical axis at `limit`, as the high values at the start of a run would take up most of it."""
    low, high = panel.get_ylim()
    panel.set_ylim(low, min(high, max(limit, low)))


def smoothed(values: Sequence[float], share: float = 0.03) -> list[float]:
    """Exponential moving average over about `share` of the series, corrected for its bias at the start."""
    window = max(1.0, share * len(values))
    keep = 1.0 - 1.0 / window
    total = weight = 0.0
    result = []
    for value in values:
        total = keep * total + value
        weight = keep * weight + 1.0
        result.append(total / weight)
    return result
