#!/usr/bin/env bash
# LLaMA 60M, low-rank W = (alpha/r) B A from scratch, on C4 at length 256, batch 512 sequences.
# Hardware: 1 GPU by default; NPROC=N takes another number (micro-batch x N must divide 512).
# Published: perplexity 78.18 after 1.1B tokens; parameters and Adam moments .24 G (.26 by its own formula) in the paper's
#   convention (arXiv 2406.02214, Table 2). Its evaluation read 1.7-3.5 % low, see the README. Not yet run whole here.
# Every hyperparameter is SLTrain's, so that the two differ in the sparse part only; none is tuned for low-rank.
# Memory and batch arithmetic on your machine: append --dry_run. Any flag given here wins over the script's.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh" --prefer-active
cd "$root"

launch 1 torchrun_main.py \
    --model_config configs/llama_60m.json \
    --peft_model lowrank \
    --rank 128 \
    --lora_alpha 32 \
    --optimizer adamw \
    --lr 0.003 \
    --batch_size 256 \
    --total_batch_size 512 \
    --num_training_steps 11000 \
    --warmup_steps 1100 \
    --weight_decay 0 \
    --dtype bfloat16 \
    --eval_every 1000 \
    "$@"
