"""`python -m peft_pretraining spectra`: singular values of a checkpoint's linears and what each part adds to them."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_pretraining.checkpoint.new_folder import inside_checkpoint, make_folder
from peft_pretraining.commands.analysis.figures import Images, drawn_names, plot_spectra

if TYPE_CHECKING:
    from torch import nn

HELP = (
    "singular values of a checkpoint's attention and MLP linears and of their low-rank and sparse parts, and each part's "
    "contribution; for dense linears the residual of the best rank-r approximation"
)
TABLE = "spectra.csv"
_COLUMNS = ("weight", "low_rank", "sparse")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument("--checkpoint", type=Path, required=True, help="step_XXXXXXXX folder, or a run's folder")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="only linears whose name contains one of these texts, such as layers.0. or q_proj (default: all)",
    )
    parser.add_argument(
        "--rank",
        type=int,
        help="dense weights: rank r of the approximation whose residual is measured (default: a quarter of each weight's shorter "
        "side, like the paper's 128 of 512)",
    )
    parser.add_argument(
        "--sp_ratio",
        type=float,
        help="dense weights: share of the residual's largest entries, whose threshold is marked, in (0, 1) (default: 0.03)",
    )
    parser.add_argument(
        "--out", type=Path, help="folder for figures and table (default: spectra-step_XXXXXXXX beside the checkpoint)"
    )
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Computes, draws and prints the spectra. Raises ValueError for values that cannot work."""
    share = 0.03 if args.sp_ratio is None else args.sp_ratio
    if not 0 < share < 1:
        raise ValueError(f"--sp_ratio {share}: must lie strictly between 0 and 1 (e.g. 0.03)")
    if args.rank is not None and args.rank < 1:
        raise ValueError(f"--rank {args.rank}: must be at least 1")
    import torch

    from peft_pretraining.checkpoint.step_folder import resolve
    from peft_pretraining.commands.analysis.decompose import linear_figures, target_linears
    from peft_pretraining.distributed.device import pick_device
    from peft_pretraining.distributed.world import World
    from peft_pretraining.export.load import load_model

    folder = resolve(args.checkpoint)
    out = args.out or folder.parent / f"spectra-{folder.name}"
    if (problem := inside_checkpoint(out)) is not None:
        raise ValueError(problem)
    model, _, record = load_model(folder, pick_device(args.device, World()))
    linears = target_linears(model, args.only)
    method = record["arguments"]["peft_model"]
    check_residual_flags(args, method, linears)
    make_folder(out)
    drawn = drawn_names(linears)
    figures: list[dict[str, Any]] = []
    images: Images = {}
    with torch.no_grad():
        for name, linear in linears.items():
            measured, pictures = linear_figures(linear, args.rank, share, draw=name in drawn)
            figures.append({"name": name, **measured})
            images |= {name: pictures} if pictures else {}
            print(f"{name} ({len(figures)} of {len(linears)})", file=sys.stderr)
    write_table(figures, out / TABLE)
    title = f"{Path(record['arguments']['model_config']).stem}, {method}, {folder.name}"
    files = [out / TABLE, *plot_spectra(figures, images, out, title)]
    if args.json:
        document = {"checkpoint": str(folder), "method": method, "linears": figures, "files": [str(f) for f in files]}
        print(json.dumps(document))
    else:
        print(format_figures(figures) + "\n\n" + "\n".join(str(file) for file in files))
    return 0


def check_residual_flags(args: argparse.Namespace, method: str, linears: Mapping[str, nn.Module]) -> None:
    """Prints a notice if flags for dense weights have no effect. Raises ValueError for a rank that leaves no residual."""
    from peft_pretraining.commands.analysis.decompose import check_rank
    from sparse_lora import SparseLowRankLinear

    dense = {n: linear for n, linear in linears.items() if not isinstance(linear, SparseLowRankLinear)}
    if not dense:
        for flag in ("rank", "sp_ratio"):
            if getattr(args, flag) is not None:
                print(f"notice: --{flag} has no effect on a checkpoint of {method}: no weight is dense", file=sys.stderr)
        return
    if args.rank is not None:
        check_rank(dense, args.rank)


def write_table(figures: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes a CSV row per linear and index, which starts at 1 as in the figures; missing parts are empty."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "index", *_COLUMNS, "low_rank_contribution", "sparse_contribution"])
        for linear in figures:
            columns = [linear["singular_values"].get(part, []) for part in _COLUMNS]
            columns += [linear["contributions"].get(part, []) for part in _COLUMNS[1:]]
            for index in range(len(columns[0])):
                cells = [f"{column[index]:.7g}" if index < len(column) else "" for column in columns]
                writer.writerow([linear["name"], index + 1, *cells])


def format_figures(figures: Sequence[Mapping[str, Any]]) -> str:
    """Formats one line per linear for a terminal."""
    width = max(len(short_name(linear["name"])) for linear in figures)
    head = f"{'linear':<{width}}  {'shape':>12}  {'largest s':>9}  {'stable rank':>11}"
    dense = "residual" in figures[0]
    if dense:
        share = figures[0]["residual"]["share"]
        head += f"  {'r':>4}  {'||W-W_r||/||W||':>15}  {f'top {share:.2%} exceed':>16}  {'and hold':>8}"
    elif "sparse_share" in figures[0]:
        head += f"  {'r':>4}  {'S of first r':>12}  {'S of the rest':>13}"
    lines = [head]
    for linear in figures:
        line = f"{short_name(linear['name']):<{width}}  {' x '.join(map(str, linear['shape'])):>12}"
        line += f"  {linear['singular_values']['weight'][0]:9.4g}  {linear['stable_rank']:11.4g}"
        if dense:
            residual = linear["residual"]
            ratio = residual["norm"] / residual["weight_norm"] if residual["weight_norm"] else 0.0
            line += f"  {residual['rank']:4}  {ratio:15.4f}  {residual['cut']:16.4g}  {residual['top_energy']:8.1%}"
        elif "sparse_share" in linear:
            shares = [linear["sparse_share"][key] for key in ("first_r", "rest")]
            first, rest = ("none" if share is None else f"{share:.1%}" for share in shares)
            line += f"  {linear['rank']:4}  {first:>12}  {rest:>13}"
        lines.append(line)
    return "\n".join(lines)


def short_name(name: str) -> str:
    """A linear's name without the common prefix."""
    return name.removeprefix("model.layers.")
