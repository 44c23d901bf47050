"""`python -m peft_pretraining COMMAND`: what is done with runs and data beside training."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from peft_pretraining.commands import data, estimate, evaluate, export, finetune, generate, report, sweep, wandb_upload
from peft_pretraining.commands.analysis import pruning, spectra
from peft_pretraining.commands.published import command as published
from peft_pretraining.config.command_line import unknown_flags
from peft_pretraining.config.files import expanded_paths
from peft_pretraining.distributed.device import allocation_failure
from peft_pretraining.plan.checks import check_packages

# Each module offers HELP, add_arguments(parser) and run(args) -> exit code.
COMMANDS: dict[str, Any] = {
    "data": data,
    "estimate": estimate,
    "evaluate": evaluate,
    "export": export,
    "finetune": finetune,
    "generate": generate,
    "import": published,
    "pruning": pruning,
    "report": report,
    "spectra": spectra,
    "sweep": sweep,
    "wandb-upload": wandb_upload,
}


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of all commands; a command that is missing is None."""
    parser = argparse.ArgumentParser(prog="python -m peft_pretraining", description=__doc__, allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, module in COMMANDS.items():
        # argparse expands % in the one-line help, but not in a description.
        listed = module.HELP.replace("%", "%%")
        module.add_arguments(subparsers.add_parser(name, help=listed, description=module.HELP, allow_abbrev=False))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 arguments or files that cannot work, 130 interrupted, 141 nobody reads the output any more."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        problems = [problem.problem for problem in unknown_flags(unknown).values()] if "peft_model" in args else []
        parser.error("\n".join(problems) or f"unrecognized arguments: {' '.join(unknown)}")
    try:
        if args.command is None:
            parser.print_help()
            return 0
        check_packages()
        vars(args).update({name: expanded_paths(value) for name, value in vars(args).items()})
        code = int(COMMANDS[args.command].run(args))
        # Here a closed pipe can still be dealt with.
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # `| head` has read enough. The interpreter flushes standard output once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        print(f"peft_pretraining {args.command}: error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if (message := allocation_failure(error)) is None:
            raise
        way_out = "use a lower --batch_size if the command has it, or another device or machine"
        print(f"peft_pretraining {args.command}: error: memory ran out ({message}); {way_out}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
