"""The report's figures as PNG: dark text, colours that the colour-blind tell apart, legends outside what they explain."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft_pretraining.report.groups import METHOD_NAMES, Group
from peft_pretraining.report.published import TABLE, THROUGHPUT, THROUGHPUT_MACHINE
from peft_pretraining.report.read import RunRecord

# Okabe & Ito's colours without the yellow, which is too light for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
METHOD_COLOURS = {
    "full": "#000000",
    "lowrank": "#E69F00",
    "relora": "#CC79A7",
    "galore": "#009E73",
    "sltrain": "#0072B2",
}
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
CLASS_COLOURS = {"parameters": "#0072B2", "support": "#D55E00", "optimizer": "#56B4E9", "rest": "#BBBBBB"}
CLASS_NAMES = {
    "parameters": "parameters",
    "support": "support (positions of S)",
    "optimizer": "optimizer (moments)",
    "rest": "gradients, activations and all else, up to the peak",
}
_STYLE: Any = {
    "font.size": 10.5,
    "axes.labelcolor": "#111111",
    "axes.edgecolor": "#444444",
    "text.color": "#111111",
    "xtick.color": "#111111",
    "ytick.color": "#111111",
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
}
DPI = 140


def draw_all(groups: Sequence[Group], out: Path) -> dict[str, Path]:
    """Every figure that the runs have something for, by name, as files of `out`."""
    import matplotlib

    matplotlib.use("Agg")
    figures: dict[str, Callable[[Sequence[Group], Path], Path | None]] = {
        "loss": draw_loss,
        "perplexity": draw_perplexity,
        "perplexity_memory": draw_perplexity_memory,
        "memory": draw_memory,
        "throughput": draw_throughput,
        "learning_rate": draw_learning_rate,
    }
    found = {}
    with matplotlib.rc_context(_STYLE):
        for name, draw in figures.items():
            path = draw(groups, out / f"{name}.png")
            if path is not None:
                found[name] = path
    return found


def _styles(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Colour, dashes and marker of each group: the method's own colour where every method is there once."""
    if len({group.method for group in groups}) == len(groups) and all(g.method in METHOD_COLOURS for g in groups):
        return [
            {"color": METHOD_COLOURS[group.method], "linestyle": "-", "marker": _MARKERS[number % len(_MARKERS)]}
            for number, group in enumerate(groups)
        ]
    return [
        {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": _DASHES[number // len(COLOURS) % len(_DASHES)],
            "marker": _MARKERS[(number + number // len(COLOURS)) % len(_MARKERS)],
        }
        for number in range(len(groups))
    ]


def _name(group: Group) -> str:
    return f"{group.label} ({len(group.runs)} seeds)" if len(group.runs) > 1 else group.label


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.wrap(label, 44))


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
    return path


def _legend(figure: Any, handles: Sequence[Any], labels: Sequence[str], widest: int = 4) -> None:
    """Below the panels, in as many columns as fit; the figure grows by its height, so that the panels keep theirs."""
    width, height = figure.get_size_inches()
    longest = max(map(len, labels))
    columns = max(1, min(widest, len(labels), int(11 * width) // (longest + 8)))
    figure.set_size_inches(width, height + 0.24 * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


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
    """A figure of three panels; (axis's name in RunRecord.axis, its panel, what a unit of it is worth)."""
    from matplotlib import pyplot

    runs = [run for group in groups for run in group.runs if run.updates]
    time, time_name = _time_unit(max((run.figures["training_seconds"] or 0.0 for run in runs), default=1.0))
    count, count_name = _count_unit(max((run.figures["tokens"] or 0 for run in runs), default=1))
    figure, panels = pyplot.subplots(1, 3, figsize=(14, height), layout="constrained", sharey=True)
    labels = ("update step", f"tokens seen{', ' if count_name else ''}{count_name}", f"training time, {time_name}")
    for panel, label in zip(panels, labels, strict=True):
        panel.set_xlabel(label)
    names = zip(("steps", "tokens", "seconds"), panels, (1.0, count, time), strict=True)
    return figure, list(names)


def draw_loss(groups: Sequence[Group], path: Path) -> Path | None:
    """Smoothed training loss of every run against update steps, tokens and time."""
    shown = [group for group in groups if any(run.updates for run in group.runs)]
    if not shown:
        return None
    figure, panels = _axes_by_position(shown, 4.4)
    handles = []
    for group, style in zip(shown, _styles(shown), strict=True):
        for number, run in enumerate(run for run in group.runs if run.updates):
            losses = smoothed([row["loss"] for row in run.updates])
            for name, panel, unit in panels:
                positions = [position / unit for position in run.axis(name)[0]]
                (line,) = panel.plot(
                    positions, losses, color=style["color"], linestyle=style["linestyle"], linewidth=1.5, alpha=0.9
                )
            if number == 0:
                handles.append(line)
    panels[0][1].set_ylabel("training loss (smoothed), nats per token")
    _legend(figure, handles, [_name(group) for group in shown])
    return _save(figure, path)


def draw_perplexity(groups: Sequence[Group], path: Path) -> Path | None:
    """Held-out perplexity of every run against update steps, tokens and time; logarithmic."""
    shown = [group for group in groups if any(run.evaluations for run in group.runs)]
    if not shown:
        return None
    figure, panels = _axes_by_position(shown, 4.4)
    handles = []
    for group, style in zip(shown, _styles(shown), strict=True):
        for number, run in enumerate(run for run in group.runs if run.evaluations):
            values = [row["final_eval_perplexity"] for row in run.evaluations]
            for name, panel, unit in panels:
                positions = [position / unit for position in run.axis(name)[1]]
                (line,) = panel.plot(positions, values, **style, markersize=4, linewidth=1.4, alpha=0.9)
            if number == 0:
                handles.append(line)
    for _, panel, _ in panels:
        panel.set_yscale("log")
        _plain_log_ticks(panel.yaxis)
    panels[0][1].set_ylabel("held-out perplexity")
    _legend(figure, handles, [_name(group) for group in shown])
    return _save(figure, path)


def _plain_log_ticks(axis: Any) -> None:
    """100 and 200 instead of 10^2 and 2 x 10^2; few enough to be read."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if low > 0 else 3.0
    subs = (
        (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)
        if decades < 0.7
        else (1.0, 2.0, 5.0)
        if decades < 3
        else (1.0,)
    )
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"))
    axis.set_minor_formatter(NullFormatter())


def draw_perplexity_memory(groups: Sequence[Group], path: Path) -> Path | None:
    """The paper's Fig. 1 (arXiv 2406.02214): perplexity against memory, circles whose area is the number of parameters.

    Left by the paper's convention, with the published results of the same configurations; right what parameters, support and
    moments really took. Whiskers: the 95 % interval over seeds.
    """
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    shown = [group for group in groups if group.perplexity is not None and group.figure("parameters")]
    if not shown:
        return None
    measured = any(group.figure("states_bytes") for group in shown)
    models = {group.first.model for group in shown}
    theirs = [entry for entry in TABLE if entry.model in models and entry.memory is not None]
    most = max(
        [group.figure("parameters") or 0.0 for group in shown] + [1e6 * (entry.parameters or 0) for entry in theirs]
    )
    styles = _styles(shown)
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
        return 900 * parameters / most

    unit, name = (
        (1e9, "10⁹") if max(group.first.paper_memory or 0 for group in shown) >= 0.1 or theirs else (1e6, "10⁶")
    )
    _circles(panels[0], shown, styles, area, lambda group: (group.first.paper_memory or 0) * 1e9 / unit)
    panels[0].set_xlabel(f"parameters and moments by the paper's convention (bfloat16), {name} bytes")
    panels[0].set_ylabel("final held-out perplexity")
    for entry in theirs:
        colour = METHOD_COLOURS[entry.method]
        panels[0].scatter(
            [(entry.memory or 0) * 1e9 / unit], [entry.perplexity], s=area(1e6 * (entry.parameters or 0)),
            facecolors="none", edgecolors=colour, linestyles="--", linewidths=1.5,
        )  # fmt: skip
    if measured:
        _circles(panels[1], shown, styles, area, lambda group: (group.figure("states_bytes") or 0) / 2**20)
        panels[1].set_xlabel("parameters, support and moments as measured, MiB")
    for panel in panels:
        panel.margins(0.18)
        panel.set_yscale("log")
        _plain_log_ticks(panel.yaxis)
    handles: list[Any] = [
        Line2D([], [], linestyle="", marker=style["marker"], color=style["color"], markersize=8) for style in styles
    ]
    labels = [_name(group) for group in shown]
    for method in dict.fromkeys(entry.method for entry in theirs):
        handles.append(
            Line2D([], [], linestyle="", marker="o", markerfacecolor="none", color=METHOD_COLOURS[method], markersize=9)
        )
        labels.append(f"published: {METHOD_NAMES[method]}")
    figure.suptitle("Circle area: number of parameters. Lower left is better.", fontsize=10.5)
    _legend(figure, handles, labels)
    return _save(figure, path)


def _circles(
    panel: Any,
    groups: Sequence[Group],
    styles: Sequence[dict[str, Any]],
    area: Callable[[float], float],
    position: Callable[[Group], float],
) -> None:
    for group, style in zip(groups, styles, strict=True):
        found, x = group.perplexity, position(group)
        if found is None or x <= 0:
            continue
        panel.scatter(
            [x], [found.mean], s=area(group.figure("parameters") or 0.0), color=style["color"], alpha=0.35, linewidths=0
        )
        panel.plot([x], [found.mean], color=style["color"], marker=style["marker"], markersize=6, linestyle="")
        if found.low is not None and found.high is not None:
            # A t-interval of two seeds can reach below 1, where no perplexity is.
            down = found.mean - max(found.low, 1.0)
            panel.errorbar([x], [found.mean], yerr=[[down], [found.high - found.mean]], color=style["color"], capsize=4)


def memory_parts(run: RunRecord, side: str) -> dict[str, int] | None:
    """Bytes of parameters, support, optimizer and the rest up to the peak; side: "predicted" or "measured". None: unknown."""
    read = run.predicted if side == "predicted" else run.measured
    found = {name: read(name) for name in ("parameters", "support", "optimizer")}
    peak = read("peak")
    known = {name: value for name, value in found.items() if value is not None}
    if peak is None and len(known) < len(found):
        return None
    rest = 0 if peak is None else max(0, peak - sum(known.values()))
    return {**{name: known.get(name, 0) for name in found}, "rest": rest}


def _has_peak(run: RunRecord, side: str) -> bool:
    return (run.predicted if side == "predicted" else run.measured)("peak") is not None


def draw_memory(groups: Sequence[Group], path: Path) -> Path | None:
    """Memory by class, predicted above measured, for each group (the paper's Fig. 3 shows such bars of the peak)."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    bars = [
        (group, side, parts)
        for group in groups
        for side in ("predicted", "measured")
        if (parts := memory_parts(group.first, side)) is not None
    ]
    if not bars:
        return None
    largest = max(sum(parts.values()) for _, _, parts in bars)
    unit, name = (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")
    figure, panel = pyplot.subplots(figsize=(11, 1.7 + 0.42 * len(bars)), layout="constrained")
    position, places, labels, last = 0.0, [], [], None
    for group, side, parts in bars:
        position += 1.0 if group is last else 1.5
        last, left = group, 0.0
        for kind, value in parts.items():
            whole = side == "measured" and group.first.measured("parameters") is None and kind == "rest"
            panel.barh(
                position, value / unit, left=left, height=0.8, color=CLASS_COLOURS[kind],
                hatch="///" if whole else None, edgecolor="white", linewidth=0.6,
            )  # fmt: skip
            left += value / unit
        known = f"{left:,.3g} {name}" + ("" if _has_peak(group.first, side) else ", the rest not predicted")
        panel.text(left + largest / unit * 0.008, position, known, va="center", fontsize=9)
        places.append(position)
        labels.append(f"{_wrapped(group.label)}: {side}")
    panel.set_yticks(places, labels)
    panel.invert_yaxis()
    panel.grid(axis="y", visible=False)
    panel.set_xlim(0, largest / unit * 1.12)
    panel.set_xlabel(f"memory of one process, {name}")
    handles = [Patch(color=CLASS_COLOURS[kind]) for kind in CLASS_COLOURS]
    names = [CLASS_NAMES[kind] for kind in CLASS_COLOURS]
    if any(group.first.measured("parameters") is None and side == "measured" for group, side, _ in bars):
        handles.append(Patch(facecolor=CLASS_COLOURS["rest"], hatch="///", edgecolor="white"))
        names.append("peak, not measured by class")
    _legend(figure, handles, names, widest=2)
    return _save(figure, path)


def draw_throughput(groups: Sequence[Group], path: Path) -> Path | None:
    """Median tokens per second of each group's runs, their mean and range, and the published figure for the configuration."""
    from matplotlib import pyplot

    shown = [(group, group.figure("tokens_per_second")) for group in groups]
    bars = [(group, rate) for group, rate in shown if rate is not None]
    if not bars:
        return None
    most = max(rate for _, rate in bars)
    figure, panel = pyplot.subplots(figsize=(11, 1.3 + 0.5 * len(bars)), layout="constrained")
    styles = _styles([group for group, _ in bars])
    for number, ((group, rate), style) in enumerate(zip(bars, styles, strict=True)):
        rates = [run.figures["tokens_per_second"] for run in group.counted or group.runs]
        rates = [value for value in rates if value is not None]
        panel.barh(number, rate, height=0.65, color=style["color"], alpha=0.75)
        if len(rates) > 1:
            panel.errorbar(rate, number, xerr=[[rate - min(rates)], [max(rates) - rate]], color="#444444", capsize=4)
        published = THROUGHPUT.get((group.first.model, group.method))
        beside = f"   (published: {published:,} on {THROUGHPUT_MACHINE[group.first.model]})" if published else ""
        panel.text(max(rates) + most * 0.015, number, f"{rate:,.0f}{beside}", va="center", fontsize=9.5)
    panel.set_yticks(range(len(bars)), [_wrapped(_name(group)) for group, _ in bars])
    panel.invert_yaxis()
    panel.grid(axis="y", visible=False)
    panel.set_xlim(0, most * 1.35)
    panel.set_xlabel("tokens of text per second (median over logged updates; whiskers: lowest and highest run)")
    return _save(figure, path)


def draw_learning_rate(groups: Sequence[Group], path: Path) -> Path | None:
    """Final perplexity against the learning rate: a line for each setting that was run at several; None where none was."""
    from matplotlib import pyplot

    lines: dict[str, list[Group]] = {}
    for group in groups:
        if group.perplexity is not None:
            others = {name: value for name, value in group.settings.items() if name != "lr"}
            lines.setdefault(json.dumps(others, sort_keys=True, default=str), []).append(group)
    swept = [sorted(members, key=lambda group: group.settings["lr"]) for members in lines.values() if len(members) > 1]
    if not swept:
        return None
    figure, panel = pyplot.subplots(figsize=(8.5, 5.0), layout="constrained")
    handles, labels = [], []
    for members, style in zip(swept, _styles([members[0] for members in swept]), strict=True):
        found = [group.perplexity for group in members]
        rates, means = [group.settings["lr"] for group in members], [value.mean for value in found if value]
        (line,) = panel.plot(rates, means, **style, markersize=6)
        halves = [(value.half or 0.0) if value else 0.0 for value in found]
        if any(halves):
            panel.errorbar(rates, means, yerr=halves, color=style["color"], linestyle="", capsize=4)
        handles.append(line)
        parts = [part for part in members[0].label.split(", ") if not part.startswith("lr = ")]
        labels.append(", ".join(parts))
    panel.set(xscale="log", yscale="log", xlabel="peak learning rate", ylabel="final held-out perplexity")
    rates_seen = sorted({group.settings["lr"] for members in swept for group in members})
    panel.set_xticks(rates_seen, [f"{rate:g}" for rate in rates_seen], rotation=45 if len(rates_seen) > 6 else 0)
    panel.minorticks_off()
    _plain_log_ticks(panel.yaxis)
    _legend(figure, handles, labels)
    return _save(figure, path)


def draw_curves(run: RunRecord, path: Path, title: str) -> Path:
    """One run: training loss and held-out perplexity against update steps; returns the path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = run.axis("steps")[0]
    losses = [row["loss"] for row in run.updates]
    with matplotlib.rc_context(_STYLE):
        figure, (loss_axis, perplexity_axis) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        figure.suptitle(title)
        loss_axis.plot(steps, losses, color=COLOURS[0], alpha=0.35, linewidth=0.8, label="each update")
        loss_axis.plot(steps, smoothed(losses), color=COLOURS[0], linewidth=1.8, label="smoothed")
        loss_axis.set(xlabel="update step", ylabel="training loss, nats per token")
        trained = [math.exp(min(loss, 50)) for loss in smoothed(losses)]
        perplexity_axis.plot(steps, trained, color=COLOURS[0], linewidth=1.2, label="training, smoothed")
        if run.evaluations:
            values = [row["final_eval_perplexity"] for row in run.evaluations]
            at = run.axis("steps")[1]
            perplexity_axis.plot(at, values, color=COLOURS[1], marker="o", markersize=5, label="held-out")
            perplexity_axis.annotate(
                f"{values[-1]:.1f}", (at[-1], values[-1]), textcoords="offset points", xytext=(-4, 9), ha="right"
            )
        perplexity_axis.set(xlabel="update step", ylabel="perplexity", yscale="log")
        _plain_log_ticks(perplexity_axis.yaxis)
        for axis in (loss_axis, perplexity_axis):
            axis.legend(frameon=False)
        return _save(figure, path)


def smoothed(values: Sequence[float], share: float = 0.03) -> list[float]:
    """Exponential moving average over about `share` of the series, without the bias of its start."""
    window = max(1.0, share * len(values))
    keep = 1.0 - 1.0 / window
    total = weight = 0.0
    result = []
    for value in values:
        total = keep * total + value
        weight = keep * weight + 1.0
        result.append(total / weight)
    return result
