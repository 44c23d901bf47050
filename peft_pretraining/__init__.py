"""Pretraining of LLaMA models with low-rank plus sparse linears: data, model, training loop, checkpoints, reports."""

__version__ = "0.1.0"
