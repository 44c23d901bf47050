"""Optimizers by name, all from libraries, and their states by parameter name."""

from peft_pretraining.optim.build import build_optimizer
from peft_pretraining.optim.state import load_optimizer_state, optimizer_state

__all__ = ["build_optimizer", "load_optimizer_state", "optimizer_state"]
