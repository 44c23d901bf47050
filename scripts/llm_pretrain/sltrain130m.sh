#!/usr/bin/env bash
# LLaMA 130M, SLTrain, on C4 at length 256, batch 512 sequences.
# Hardware: 1 GPU by default; NPROC=N sets another number (micro-batch x N must divide 512).
# Predicted, not measured: 96,545,796 parameters; 27.6 GiB at the peak on each GPU.
# Status: planned only, not run yet.
# Published: perplexity 26.04 after 2.2B tokens; parameters and Adam moments .60 G in the paper's convention (arXiv 2406.02214,
#   Table 2). The published evaluation reads 1.7-3.5 % low (docs/method.md).
# Rates and sizes are the published ones; tuned/sltrain130m.sh has rates by group.
# --dry_run shows memory and batch arithmetic on your machine. Flags given on the command line override the script's;
#   relative paths among them start from the folder where you are. The default run folder is in the checkout.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh" --prefer-active
eval "set -- $(from_start "$@")"
cd "$root"

launch 1 torchrun_main.py \
    --model_config configs/llama_130m.json \
    --peft_model sltrain \
    --rank 256 \
    --sp_ratio 0.03 \
    --lora_alpha 16 \
    --optimizer adamw \
    --lr 0.003 \
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
