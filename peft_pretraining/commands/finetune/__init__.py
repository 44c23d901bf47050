"""A pretrained model, adapted to a task of classifying text or rating it, in GLUE's format.

command.py     python -m peft_pretraining finetune
tasks.py       GLUE's tasks: columns, labels, metrics
metrics.py     those metrics
examples.py    texts and labels, from files or the hub
train.py       the model with its adapters, the epochs, the figures
adapter.py     what fine-tuning adds to a model, as one small file
"""

from __future__ import annotations

from peft_pretraining.commands.finetune.command import HELP, add_arguments, run

__all__ = ["HELP", "add_arguments", "run"]
