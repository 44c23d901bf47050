"""`python -m peft_pretraining import`: converts a checkpoint of the published programs for torchrun_main.py to continue."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from peft_pretraining.config.command_line import add_flags, given_flags, with_config_file

HELP = (
    "convert a checkpoint of the published SLTrain, ReLoRA or GaLore program to one of ours, in a new run's folder (--save_dir); "
    "all other flags are those of the training to continue"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags and every flag of the trainer."""
    parser.add_argument("--published", type=Path, required=True, help="folder of the published checkpoint (model_XXXX)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Imports a checkpoint; prints what was carried over, what was not, and how to continue. Raises ValueError or OSError."""
    given = with_config_file(given_flags(args))
    if isinstance(given.get("config"), str):
        given.pop("config")

    from peft_pretraining.commands.published.carry import import_published

    imported = import_published(args.published, given)
    if args.json:
        print(json.dumps({**asdict(imported), "checkpoint": str(imported.checkpoint), "command": imported.command}))
        return 0
    lists = {
        "carried over": imported.carried_over,
        "not carried over": imported.not_carried_over,
        "settings that differ from the published run's": imported.other_settings,
    }
    print(f"{imported.checkpoint}: {args.published} as a run of --peft_model {imported.method}")
    for title, lines in lists.items():
        if lines:
            print("\n  ".join([f"{title}:", *lines]))
    if imported.finished:
        print("no updates are left: raise --num_training_steps or --max_train_tokens in the following command")
    print(f"continue with:\n{imported.command}")
    return 0
