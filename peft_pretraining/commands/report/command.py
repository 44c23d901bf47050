"""`python -m peft_pretraining report RUN...`: compares the results of runs in a table, a page and figures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_pretraining.checkpoint.new_folder import make_folder
from peft_pretraining.commands.report import tables
from peft_pretraining.commands.report.groups import Group, group_runs
from peft_pretraining.commands.report.read import FIGURES, RunRecord, find_runs, load_run, read_run

HELP = "table and curves of a run; of several, a page that compares them"
CURVES = "curves.png"
PAGE = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, or a folder of runs' folders")
    parser.add_argument(
        "--out",
        type=Path,
        help=f"folder for {PAGE}, {FIGURES} and the figures (default: with one run, that run's folder, curves only)",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of a table")
    parser.add_argument("--title", default="Comparison of runs", help="the page's title (default: %(default)s)")
    parser.add_argument(
        "--wandb",
        choices=("online", "offline"),
        help="send page, figures and table to wandb too, as one run of type report",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the results and writes page and figures. Raises ValueError for a folder without a run."""
    if len(args.runs) == 1 and ((args.runs[0] / "run.json").exists() or not args.runs[0].is_dir()):
        return _one_run(args)
    folders = find_runs(args.runs)
    if args.out is None:
        raise ValueError(f"--out is required for {len(folders)} runs: name a folder for the page and its figures, --out DIR")
    groups = _write(args, folders)
    if args.json:
        print(json.dumps(tables.as_json(groups)))
    else:
        print(format_groups(groups))
        print(f"\npage     {args.out / PAGE}\nfigures  {args.out / FIGURES}")
    return 0


def _one_run(args: argparse.Namespace) -> int:
    folder = args.runs[0]
    load_run(folder)
    record = read_run(folder)
    out = args.out or folder
    make_folder(out)
    from peft_pretraining.commands.report.curves import draw_curves

    state = "" if record.finished else f", {record.status}"
    # Printed first, so that it is not lost if the figures cannot be written.
    print(json.dumps({"status": record.status, **record.figures}) if args.json else format_summary(record))
    try:
        curves = draw_curves(record, out / CURVES, title=f"{record.model}, {record.method}{state}")
    except PermissionError as error:
        raise OSError(f"{error.filename}: {error.strerror}; name another folder for the figures: --out DIR") from None
    page = args.out is not None
    if page or args.wandb is not None:
        args.out = out
        _write(args, [folder])
    if not args.json:
        print(f"\nmetrics  {folder / 'metrics.jsonl'}\ncurves   {curves}" + (f"\npage     {out / PAGE}" if page else ""))
    return 0


def _write(args: argparse.Namespace, folders: Sequence[Path]) -> list[Group]:
    groups = write_report(folders, args.out, args.title)
    if args.wandb is not None:
        from peft_pretraining.commands.report.dashboard import send

        send(groups, args.out, args.wandb, args.title)
    return groups


def write_report(folders: Sequence[Path], out: Path, title: str) -> list[Group]:
    """Writes page, figures and JSON of the runs in `folders` to `out`; returns the groups. Raises ValueError, OSError."""
    from peft_pretraining.commands.report.figures import draw_all
    from peft_pretraining.commands.report.page import write_page

    runs: list[RunRecord] = [read_run(folder) for folder in folders]
    groups = group_runs(runs)
    make_folder(out)
    write_page(groups, draw_all(groups, out), out / PAGE, title)
    (out / FIGURES).write_text(json.dumps(tables.as_json(groups), indent=1) + "\n", encoding="utf-8")
    return groups


def format_groups(groups: Sequence[Group]) -> str:
    """Formats one line per setting, aligned for a terminal, followed by notes on what is missing."""
    table = tables.methods_table(groups)
    short = {
        "setting": "setting",
        tables.PERPLEXITY: "perplexity",
        tables.PUBLISHED: "published",
        tables.GAP: "against baseline, %",
        "parameters, 10⁶": "parameters, M",
        "memory by the paper's convention, 10⁹ bytes": "memory, G",
        "tokens/s": "tokens/s",
    }
    shown = [column for column, heading in enumerate(table.headings) if heading in short]
    rows = [
        [short[table.headings[column]] for column in shown],
        *([row[column] for column in shown] for row in table.rows),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(shown))]
    lines = [
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([*lines, *(f"note: {text}" for text in tables.problems(groups))])


def format_summary(record: RunRecord) -> str:
    """Formats one run's summary as an aligned table for a terminal; final figures of a finished run only."""
    figures = record.figures
    total, full_rank = figures["parameters"], figures["full_rank_parameters"]
    parameters = "not recorded" if total is None else f"{total:,}"
    if total is not None and full_rank is not None:
        parameters += f" ({total / full_rank:.1%} of full-rank {full_rank:,})"

    def number(name: str, form: str) -> str:
        return "not measured" if figures[name] is None else format(figures[name], form)

    peak = figures["peak_memory_bytes"]
    rows = [] if record.finished else [("state", record.status)]
    rows += [
        ("parameters", parameters),
        ("updates", f"{figures['updates']:,}"),
        ("tokens seen", f"{figures['tokens']:,}"),
        ("first perplexity", number("first_perplexity", ",.1f") + _when(figures["first_evaluation_step"])),
    ]
    if record.finished:
        rows.append(("final perplexity", number("final_perplexity", ",.2f")))
        rows.append(("final bits per byte", number("final_bits_per_byte", ".4f")))
    elif figures["last_evaluation_step"] != figures["first_evaluation_step"]:
        rows.append(("last perplexity", number("last_perplexity", ",.2f") + _when(figures["last_evaluation_step"])))
    rows += [
        ("tokens per second", number("tokens_per_second", ",.0f") + " (median)"),
        *_arithmetic(figures),
        ("peak memory", "not measured" if peak is None else f"{peak / 2**30:.2f} GiB"),
    ]
    return "\n".join(f"{name:<22}{text}" for name, text in rows)


def _arithmetic(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the summary's row of operations per second and MFU, each of the model itself and of its dense equivalent."""
    own, dense, mfu, mfu_dense = (figures[name] for name in ("flops_per_second", "flops_per_second_dense", "mfu", "mfu_dense"))
    if own is None or dense is None:
        return []
    shares = "" if mfu is None or mfu_dense is None else f"; MFU {mfu:.1%} / {mfu_dense:.1%}"
    return [("operations per second", f"{own / 1e9:,.1f} / {dense / 1e9:,.1f} x 10^9, own / dense{shares}")]


def _when(step: int | None) -> str:
    return "" if step is None else " (before training)" if step == 0 else f" (after update {step:,})"
