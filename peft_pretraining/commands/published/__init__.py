"""Checkpoints of the published programs (SLTrain, ReLoRA, GaLore), made into checkpoints of ours that training goes on from.

command.py     python -m peft_pretraining import
read.py        the published folder -> tensors, settings, counts; runs no pickled code
carry.py       flags that follow from it, a fresh run filled with it, saved
fill.py        its tensors -> the parameters and supports of a model
moments.py     its optimizer's state -> the state of ours
"""
