#!/usr/bin/env bash
# LLaMA 7B, full-rank (the baseline), on C4 at length 256, batch 512 sequences.
# Hardware: 8 GPUs by default; NPROC=N takes another number (micro-batch x N must divide 512).
# Published: full-rank Adam takes 67.4 GB at batch 1 (arXiv 2406.02214, Fig. 3). Not yet run whole here.
# The learning rate is SLTrain's, so that the two differ in nothing else; it is not tuned for full-rank.
# Memory and batch arithmetic on your machine: append --dry_run. Any flag given here wins over the script's.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh" --prefer-active
cd "$root"

launch 8 torchrun_main.py \
    --model_config configs/llama_7b.json \
    --peft_model full \
    --optimizer adam8bit \
    --lr 0.0005 \
    --batch_size 8 \
    --total_batch_size 512 \
    --num_training_steps 150000 \
    --warmup_steps 15000 \
    --weight_decay 0 \
    --dtype bfloat16 \
    --eval_every 1000 \
    --grad_clipping 1.0 \
    --save_every 500 \
    "$@"
