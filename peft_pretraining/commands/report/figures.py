"""Draws all figures of the report as PNG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from peft_pretraining.commands.report.bars import draw_memory, draw_throughput
from peft_pretraining.commands.report.curves import draw_loss, draw_perplexity
from peft_pretraining.commands.report.drawing import STYLE
from peft_pretraining.commands.report.groups import Group
from peft_pretraining.commands.report.scatter import draw_learning_rate, draw_perplexity_memory


def draw_all(groups: Sequence[Group], out: Path) -> dict[str, Path]:
    """Draws every figure for which the runs have data, as PNG files in `out`; returns their paths by name."""
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
    paths = {}
    with matplotlib.rc_context(STYLE):
        for name, draw in figures.items():
            file = out / f"{name}.png"
            # An earlier report may have drawn a figure that this one lacks.
            file.unlink(missing_ok=True)
            path = draw(groups, file)
            if path is not None:
                paths[name] = path
    return paths
