"""`python -m peft_pretraining report RUN`: a table of what a run reached, and its curves as PNG."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from peft_pretraining.metrics import read_metrics

HELP = "table and curves of a run"
FIGURE = "curves.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--out", type=Path, help="folder for the figure (default: the run's folder)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the summary and draw the curves. Raises ValueError where the folder holds no run."""
    document, rows = load_run(args.run)
    figures = summary(document, rows)
    out = args.out or args.run
    out.mkdir(parents=True, exist_ok=True)
    figure = plot_curves(
        rows, out / FIGURE, title=f"{document['plan']['model']['name']}, {document['arguments']['peft_model']}"
    )
    if args.json:
        print(json.dumps(figures))
    else:
        print(format_summary(figures))
        print(f"\nmetrics  {args.run / 'metrics.jsonl'}\ncurves   {figure}")
    return 0


def load_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """run.json and the metrics of a run. Raises ValueError with what is missing."""
    path = folder / "run.json"
    if not path.is_file():
        raise ValueError(
            f"{folder}: no run.json in it; name a run's folder, such as the --save_dir of torchrun_main.py"
        )
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    rows = read_metrics(folder)
    if not rows:
        raise ValueError(f"{folder}: metrics.jsonl is missing or empty; the run has not logged an update yet")
    return document, rows


def summary(document: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a run reached, by name; None where the run has no such figure."""
    updates = [row for row in rows if row.get("loss") is not None]
    evaluations = [row for row in rows if row.get("final_eval_loss") is not None]
    rates = sorted(row["throughput_tokens"] for row in updates)
    plan = document["plan"]
    return {
        "parameters": plan["parameters"]["total"],
        "full_rank_parameters": plan["full_rank_parameters"],
        "updates": updates[-1]["update_step"] if updates else 0,
        "tokens": updates[-1]["tokens_seen"] if updates else 0,
        "first_perplexity": evaluations[0]["final_eval_perplexity"] if evaluations else None,
        "first_evaluation_step": evaluations[0]["update_step"] if evaluations else None,
        "final_perplexity": evaluations[-1]["final_eval_perplexity"] if evaluations else None,
        "final_bits_per_byte": evaluations[-1].get("final_eval_bits_per_byte") if evaluations else None,
        "tokens_per_second": rates[len(rates) // 2] if rates else None,
        "peak_memory_bytes": max((row["max_memory"] for row in updates), default=None),
    }


def format_summary(figures: dict[str, Any]) -> str:
    """The summary as an aligned table for a terminal."""
    share = figures["parameters"] / figures["full_rank_parameters"]

    def number(name: str, form: str) -> str:
        return "not measured" if figures[name] is None else format(figures[name], form)

    peak = figures["peak_memory_bytes"]
    step = figures["first_evaluation_step"]
    first = "before training" if step == 0 else f"after update {step}"
    rows = [
        ("parameters", f"{figures['parameters']:,} ({share:.1%} of full-rank {figures['full_rank_parameters']:,})"),
        ("updates", f"{figures['updates']:,}"),
        ("tokens seen", f"{figures['tokens']:,}"),
        ("first perplexity", number("first_perplexity", ",.1f") + (f" ({first})" if step is not None else "")),
        ("final perplexity", number("final_perplexity", ",.2f")),
        ("final bits per byte", number("final_bits_per_byte", ".4f")),
        ("tokens per second", number("tokens_per_second", ",.0f") + " (median)"),
        ("peak memory", "not measured" if peak is None else f"{peak / 2**30:.2f} GiB"),
    ]
    return "\n".join(f"{name:<22}{text}" for name, text in rows)


def plot_curves(rows: list[dict[str, Any]], path: Path, title: str) -> Path:
    """Training loss and held-out perplexity against update steps, as a PNG; returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    updates = [row for row in rows if row.get("loss") is not None]
    evaluations = [row for row in rows if row.get("final_eval_loss") is not None]
    figure, (loss_axis, perplexity_axis) = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    figure.suptitle(title, parse_math=False)
    steps = [row["update_step"] for row in updates]
    losses = [row["loss"] for row in updates]
    loss_axis.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=0.8, label="each update")
    loss_axis.plot(steps, smoothed(losses), color="tab:blue", linewidth=1.8, label="smoothed")
    loss_axis.set(xlabel="update step", ylabel="training loss, nats per token")
    loss_axis.legend()
    perplexity_axis.plot(
        steps,
        [math.exp(min(loss, 50)) for loss in smoothed(losses)],
        color="tab:blue",
        linewidth=1.2,
        label="training, smoothed",
    )
    perplexity_axis.plot(
        [row["update_step"] for row in evaluations],
        [row["final_eval_perplexity"] for row in evaluations],
        color="tab:orange",
        marker="o",
        label="held-out",
    )
    perplexity_axis.set(xlabel="update step", ylabel="perplexity", yscale="log")
    perplexity_axis.legend()
    if evaluations:
        last = evaluations[-1]
        perplexity_axis.annotate(
            f"{last['final_eval_perplexity']:.1f}",
            (last["update_step"], last["final_eval_perplexity"]),
            textcoords="offset points",
            xytext=(-8, 8),
            ha="right",
        )
    for axis in (loss_axis, perplexity_axis):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def smoothed(values: list[float], share: float = 0.03) -> list[float]:
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
