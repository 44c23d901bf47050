"""Optimizers by name, all from libraries; how they update parameters, whole or per layer; their states by parameter name."""

from peft_pretraining.optim.build import OptimizerUnavailable, build_galore, build_optimizer
from peft_pretraining.optim.galore import Subspace
from peft_pretraining.optim.slices import StochasticRounding
from peft_pretraining.optim.state import Pruning, load_optimizer_state, optimizer_state, reset_moments_
from peft_pretraining.optim.updates import GrowthLimit, HasState, PerLayerUpdate, Updates, WholeUpdate

__all__ = [
    "GrowthLimit",
    "HasState",
    "OptimizerUnavailable",
    "PerLayerUpdate",
    "Pruning",
    "StochasticRounding",
    "Subspace",
    "Updates",
    "WholeUpdate",
    "build_galore",
    "build_optimizer",
    "load_optimizer_state",
    "optimizer_state",
    "reset_moments_",
]
