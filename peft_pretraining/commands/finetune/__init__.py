"""Fine-tunes a pretrained model to classify or rate text, on GLUE or on data in its format.

command.py     python -m peft_pretraining finetune
tasks.py       GLUE's tasks: columns, labels, metrics
metrics.py     the metrics
examples.py    texts and labels, from files or the hub
model.py       the classifier with its adapters and tokenizer: loading and saving
trainer.py     training and evaluation by transformers' Trainer
adapter.py     the trained adapter and classifier as one small file
"""

from __future__ import annotations

from peft_pretraining.commands.finetune.command import HELP, add_arguments, run

__all__ = ["HELP", "add_arguments", "run"]
