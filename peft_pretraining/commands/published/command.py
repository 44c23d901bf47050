"""`python -m peft_pretraining import`: a checkpoint of the published programs as one that torchrun_main.py goes on from."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from peft_pretraining.config.command_line import add_flags, given_flags, with_config_file

HELP = (
    "make a checkpoint of the published SLTrain, ReLoRA or GaLore program one of ours, in a new run's folder (--save_dir); all "
    "other flags are those of the training that goes on"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags, and every one of the trainer's."""
    parser.add_argument("--published", type=Path, required=True, help="folder of the published checkpoint (model_XXXX)")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Import, say what came along and what did not, and how to go on. Raises ValueError and OSError for what cannot work."""
    given = with_config_file(given_flags(args))
    given.pop("config", None)

    from peft_pretraining.commands.published.carry import import_published

    done = import_published(args.published, given)
    if args.json:
        print(json.dumps({**asdict(done), "checkpoint": str(done.checkpoint), "command": done.command}))
        return 0
    lists = {
        "carried over": done.carried_over,
        "not carried over": done.not_carried_over,
        "other settings than the published run's": done.other_settings,
    }
    print(f"{done.checkpoint}: {args.published} as a run of --peft_model {done.method}")
    for title, lines in lists.items():
        if lines:
            print("\n  ".join([f"{title}:", *lines]))
    if done.finished:
        print("nothing is left to train: raise --num_training_steps or --max_train_tokens in the command that follows")
    print(f"go on with:\n{done.command}")
    return 0
