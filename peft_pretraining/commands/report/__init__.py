"""Compares runs: reads them, groups seeds, draws figures and tables, writes one page (`python -m peft_pretraining report`).

Only what the command line needs is imported here; matplotlib is loaded with the first figure.
"""

from peft_pretraining.commands.report.command import HELP, add_arguments, run
from peft_pretraining.commands.report.read import load_run

__all__ = ["HELP", "add_arguments", "load_run", "run"]
