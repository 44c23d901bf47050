"""Converts checkpoints of the published programs (SLTrain, ReLoRA, GaLore) to ours, so that training can continue.

command.py     python -m peft_pretraining import
read.py        the published folder -> tensors, settings, counts; runs no pickled code
carry.py       flags implied by the checkpoint; a new run filled with it and saved
fill.py        published tensors -> parameters and supports of a model
moments.py     published optimizer state -> our optimizer state
"""
