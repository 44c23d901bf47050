#!/usr/bin/env bash
# LLaMA 7B, full-rank at SLTrain's learning rate, on C4 at length 256, batch 512 sequences.
# Hardware: 8 GPUs by default; NPROC=N sets another number (micro-batch x N must divide 512).
# Predicted, not measured: 6,738,415,616 parameters; 52.2 GiB at the peak on each GPU.
# Status: planned only, not run yet.
# Published: full-rank Adam takes 67.4 GB at batch 1 (arXiv 2406.02214, Fig. 3).
# Not a tuned baseline: the learning rate is SLTrain's, so that only the method differs.
# --dry_run shows memory and batch arithmetic on your machine. Flags given on the command line override the script's;
#   relative paths among them start from the folder where you are. The default run folder is in the checkout.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh" --prefer-active
eval "set -- $(from_start "$@")"
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
    --save_minutes 20 \
    --keep_checkpoints 2 \
    --keep_every 5000 \
    "$@"
