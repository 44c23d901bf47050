"""Runs side by side: read -> groups of seeds -> figures and tables -> one page. `python -m peft_pretraining report`.

Nothing is imported here but what the command line needs at once; matplotlib comes with the first figure.
"""

from peft_pretraining.commands.report.command import HELP, add_arguments, run
from peft_pretraining.commands.report.read import load_run

__all__ = ["HELP", "add_arguments", "load_run", "run"]
