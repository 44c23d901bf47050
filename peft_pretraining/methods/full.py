"""Full-rank training: every weight is dense and trained."""

from peft_pretraining.methods.method import Method


class Full(Method):
    """Full-rank training: the defaults of the base class."""

    name = "full"
    title = description = "full-rank"
    colour = "#000000"
    lighter = "sltrain"


METHOD = Full()
