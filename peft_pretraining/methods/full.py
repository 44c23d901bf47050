"""Full-rank training: every weight dense and trained."""

from peft_pretraining.methods.method import Method


class Full(Method):
    """Full-rank training, the base class's own values."""

    name = "full"
    title = description = "full-rank"
    colour = "#000000"
    lighter = "sltrain"


METHOD = Full()
