#!/usr/bin/env bash
# LLaMA 350M, low-rank W = (alpha/r) B A from scratch, on C4 at length 256, batch 512 sequences.
# Hardware: 4 GPUs by default; NPROC=N takes another number (micro-batch x N must divide 512).
# Published: perplexity 37.41 after 6.4B tokens; parameters and Adam moments 1.11 G in the paper's convention (arXiv 2406.02214,
#   Table 2). Its evaluation read 1.7-3.5 % low, see the README. Not yet run whole here.
# Every hyperparameter is SLTrain's, so that the two differ in the sparse part only; none is tuned for low-rank.
# Memory and batch arithmetic on your machine: append --dry_run. Any flag given here wins over the script's.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh" --prefer-active
cd "$root"

launch 4 torchrun_main.py \
    --model_config configs/llama_350m.json \
    --peft_model lowrank \
    --rank 256 \
    --lora_alpha 16 \
    --optimizer adamw \
    --lr 0.003 \
    --batch_size 128 \
    --total_batch_size 512 \
    --num_training_steps 65000 \
    --warmup_steps 6500 \
    --weight_decay 0 \
    --dtype bfloat16 \
    --eval_every 1000 \
    "$@"
