#!/usr/bin/env bash
# LLaMA 60M, GaLore, on C4 at length 256, batch 512 sequences.
# Hardware: 1 GPU by default; NPROC=N sets another number (micro-batch x N must divide 512).
# Predicted, not measured: 58,073,600 parameters; 12.9 GiB at the peak on each GPU.
# Status: planned only, not run yet.
# Published: perplexity 34.88 after 1.1B tokens; parameters, moments and projections .28 G in the paper's convention (arXiv
#   2406.02214, Table 2). The published evaluation reads 1.7-3.5 % low (docs/method.md).
# lr, scale and gap are those of GaLore's authors (arXiv 2403.03507 and its repository's script), the number of updates is that
#   of the other recipes, for the same tokens; their script has 10,000 updates and 1,000 of warm-up.
# --dry_run shows memory and batch arithmetic on your machine. Flags given on the command line override the script's;
#   relative paths among them start from the folder where you are. The default run folder is in the checkout.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh" --prefer-active
eval "set -- $(from_start "$@")"
cd "$root"

launch 1 torchrun_main.py \
    --model_config configs/llama_60m.json \
    --peft_model galore \
    --rank 128 \
    --update_proj_gap 200 \
    --galore_scale 0.25 \
    --optimizer galore_adamw \
    --lr 0.01 \
    --batch_size 256 \
    --total_batch_size 512 \
    --num_training_steps 11000 \
    --warmup_steps 1100 \
    --weight_decay 0 \
    --dtype bfloat16 \
    --eval_every 1000 \
    --save_minutes 20 \
    --keep_checkpoints 2 \
    --keep_every 10000 \
    "$@"
