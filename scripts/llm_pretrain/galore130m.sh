#!/usr/bin/env bash
# LLaMA 130M, GaLore, on C4 at length 256, batch 512 sequences.
# Hardware: 1 GPU by default; NPROC=N sets another number (micro-batch x N must divide 512).
# Predicted, not measured: 134,105,856 parameters; 27.7 GiB at the peak on each GPU.
# Status: planned only, not run yet.
# Published: perplexity 25.36 after 2.2B tokens; parameters, moments and projections .61 G in the paper's convention (arXiv
#   2406.02214, Table 2). The published evaluation reads 1.7-3.5 % low (docs/method.md).
# lr, scale and gap are those of GaLore's authors (arXiv 2403.03507 and its repository's script), the number of updates is that
#   of the other recipes, for the same tokens; their script has 20,000 updates and 2,000 of warm-up.
# --dry_run shows memory and batch arithmetic on your machine. Flags given on the command line override the script's;
#   relative paths among them start from the folder where you are. The default run folder is in the checkout.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh" --prefer-active
eval "set -- $(from_start "$@")"
cd "$root"

launch 1 torchrun_main.py \
    --model_config configs/llama_130m.json \
    --peft_model galore \
    --rank 256 \
    --update_proj_gap 200 \
    --galore_scale 0.25 \
    --optimizer galore_adamw \
    --lr 0.01 \
    --batch_size 256 \
    --total_batch_size 512 \
    --num_training_steps 22000 \
    --warmup_steps 2200 \
    --weight_decay 0 \
    --dtype bfloat16 \
    --eval_every 1000 \
    --save_minutes 20 \
    --keep_checkpoints 2 \
    --keep_every 10000 \
    "$@"
