"""Sends the report's figures, table and page to wandb, as one run beside those that it compares."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from peft_pretraining.commands.report import tables
from peft_pretraining.commands.report.groups import Group
from peft_pretraining.record.wandb_run import OF_ONE_RUN, WANDB_PROJECT, wandb_folder


def send(groups: Sequence[Group], out: Path, mode: Literal["online", "offline"], title: str) -> None:
    """Logs the report in `out` to wandb; mode: "online", or "offline" (files below `out`, for `wandb sync`).

    Raises ValueError if wandb fails; the page is already written then.
    """
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    for name in OF_ONE_RUN:
        if value := os.environ.get(name):
            print(f"notice: {name}={value} has no effect: a report is a run of its own, named by --title", file=sys.stderr)
    try:
        with wandb.init(
            project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
            mode=mode,
            dir=wandb_folder(out),
            id=secrets.token_hex(4),
            name=title,
            job_type="report",
        ) as run:
            if run.url:
                print(f"wandb: {run.url}", file=sys.stderr)
            table = tables.methods_table(groups)
            content: dict[str, Any] = {
                "methods": wandb.Table(columns=list(table.headings), data=[list(row) for row in table.rows])
            }
            content |= {path.stem: wandb.Image(str(path)) for path in sorted(out.glob("*.png"))}
            content["page"] = wandb.Html((out / "report.html").read_text(encoding="utf-8"))
            run.log(content)
    except Exception as error:
        # A refused key, a lost network, an old version: wandb raises many types.
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"--wandb {mode}: {text}; the page is in {out}, and --wandb offline needs no network") from None
    if mode == "offline":
        print(f"recorded offline in {wandb_folder(out) / 'wandb'} (`wandb sync` uploads it)", file=sys.stderr)
