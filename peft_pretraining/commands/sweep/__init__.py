"""Makes the runs of a YAML file of settings, one or several at a time, then a report (`python -m peft_pretraining sweep`)."""

from peft_pretraining.commands.sweep.command import HELP, add_arguments, run

__all__ = ["HELP", "add_arguments", "run"]
