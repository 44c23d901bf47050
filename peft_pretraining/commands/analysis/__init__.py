"""What trained weights are made of, as figures of the SLTrain paper (arXiv 2406.02214): two commands and what they compute.

decompose.py   a linear's weight, its parts, their singular values; what a best rank-r part leaves
spectra.py     `python -m peft_pretraining spectra`      figures.py   its PNG
pruning.py     `python -m peft_pretraining pruning`      study.py     its models, and how their sparse values are trained
"""
