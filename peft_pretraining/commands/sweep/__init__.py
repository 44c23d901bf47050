"""Makes the runs of a YAML file of settings one after another, then a report (`python -m peft_pretraining sweep FILE`)."""

from peft_pretraining.commands.sweep.command import HELP, add_arguments, run

__all__ = ["HELP", "add_arguments", "run"]
