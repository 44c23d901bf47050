"""Style shared by the report's figures: dark text, colours that are distinct to the colour-blind, legends below the panels."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_pretraining.commands.report.groups import Group
from peft_pretraining.methods import METHODS
from peft_pretraining.record.intervals import Interval

# Okabe & Ito's colours without the yellow, which is too light for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE: Any = {
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


def line_styles(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Returns the colour, dashes and marker of each group.

    With several methods of a few settings each, colour stands for the method and dashes for the setting; otherwise each group
    gets a different colour until the colours run out.
    """
    methods = [group.method for group in groups]
    ranks_within_method = [methods[:number].count(method) for number, method in enumerate(methods)]
    all_known = all(method in METHODS for method in methods)
    if all_known and max(ranks_within_method, default=0) < len(_DASHES) and (len(set(methods)) > 1 or len(methods) == 1):
        return [
            {"color": METHODS[method].colour, "linestyle": _DASHES[dashes], "marker": _MARKERS[number % len(_MARKERS)]}
            for number, (method, dashes) in enumerate(zip(methods, ranks_within_method, strict=True))
        ]
    return [
        {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": _DASHES[number // len(COLOURS) % len(_DASHES)],
            "marker": _MARKERS[(number + number // len(COLOURS)) % len(_MARKERS)],
        }
        for number in range(len(groups))
    ]


def name_of(group: Group, counted: bool = False) -> str:
    """The group's label and number of seeds; counted: only seeds that enter the mean."""
    seeds = len({run.seed for run in (group.counted if counted else group.runs)})
    return f"{group.label} ({seeds} seeds)" if seeds > 1 else group.label


def wrapped(label: str) -> str:
    """Breaks a label into lines of at most 44 characters."""
    return "\n".join(textwrap.wrap(label, 44))


def save(figure: Any, path: Path) -> Path:
    """Writes the figure, closes it and returns the path."""
    from matplotlib import pyplot

    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
    return path


def legend(figure: Any, handles: Sequence[Any], labels: Sequence[str], widest: int = 4) -> None:
    """Adds a legend below the panels in as many columns as fit; the figure grows by its height, so the panels do not shrink."""
    width, height = figure.get_size_inches()
    longest = max(map(len, labels))
    columns = max(1, min(widest, len(labels), int(11 * width) // (longest + 8)))
    figure.set_size_inches(width, height + 0.24 * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def plain_log_ticks(axis: Any) -> None:
    """Labels a logarithmic axis with a few plain numbers: 100 and 200 instead of 10^2 and 2 x 10^2."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if low > 0 else 3.0
    # A range this short may contain no power of ten.
    if decades < 0.5:
        axis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
        axis.set_minor_locator(NullLocator())
    else:
        subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 1.0 else (1.0, 2.0, 5.0) if decades < 3 else (1.0,)
        axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.5g}" if value < 1e4 else f"{value:,.0f}"))
    axis.set_minor_formatter(NullFormatter())


def whole_ticks(axis: Any) -> None:
    """Labels an axis that counts, such as one of update steps, at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axis.set_major_formatter("{x:,.0f}")


# Behind a label, so that no line of the grid runs through it.
WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}


def whiskers(panel: Any, x: float, interval: Interval, colour: str, **more: Any) -> None:
    """Draws the 95 % interval of a perplexity, cut at 1, the smallest perplexity (the interval of two seeds may reach lower)."""
    if interval.low is not None and interval.high is not None:
        low = max(interval.low, 1.0)
        lengths = [[interval.mean - low], [interval.high - interval.mean]]
        panel.errorbar([x], [interval.mean], yerr=lengths, color=colour, capsize=4, capthick=1.5, **more)
        # matplotlib leaves out what is drawn by a shifted transform; the axis would end before the whiskers do.
        panel.update_datalim([(x, low), (x, interval.high)])


def digits(value: float) -> str:
    """Formats a number with at least three digits and no exponent: 0.123, 3.20, 62.4, 1,020."""
    places = next((places for places, least in enumerate((100.0, 10.0, 1.0)) if abs(value) >= least), 3)
    return f"{value:,.{places}f}"
