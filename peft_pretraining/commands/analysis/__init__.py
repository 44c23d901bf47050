"""Analyses trained weights as the SLTrain paper (arXiv 2406.02214) does: the commands spectra and pruning.

decompose.py   a linear's weight, its parts, their singular values, the residual of its best rank-r approximation
spectra.py     `python -m peft_pretraining spectra`      figures.py   its PNG figures
pruning.py     `python -m peft_pretraining pruning`      study.py     its models, and the training of their sparse values
"""
