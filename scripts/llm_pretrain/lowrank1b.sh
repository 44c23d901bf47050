#!/usr/bin/env bash
# LLaMA 1B, low-rank W = (alpha/r) B A from scratch, on C4 at length 256, batch 512 sequences.
# Hardware: 8 GPUs by default; NPROC=N sets another number (micro-batch x N must divide 512).
# Predicted, not measured: 609,310,720 parameters; 24.1 GiB at the peak on each GPU.
# Status: planned only, not run yet.
# Published: perplexity 142.53 after 13.1B tokens; parameters and Adam moments 3.66 G in the paper's convention (arXiv
#   2406.02214, Table 2). The published evaluation reads 1.7-3.5 % low (docs/method.md).
# All hyperparameters are SLTrain's, so that only the sparse part differs; none is tuned for low-rank.
# --dry_run shows memory and batch arithmetic on your machine. Flags given on the command line override the script's;
#   relative paths among them start from the folder where you are. The default run folder is in the checkout.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh" --prefer-active
eval "set -- $(from_start "$@")"
cd "$root"

launch 8 torchrun_main.py \
    --model_config configs/llama_1b.json \
    --peft_model lowrank \
    --rank 512 \
    --lora_alpha 8 \
    --optimizer adamw \
    --lr 0.003 \
    --batch_size 32 \
    --total_batch_size 512 \
    --num_training_steps 140000 \
    --warmup_steps 10000 \
    --weight_decay 0 \
    --dtype bfloat16 \
    --eval_every 1000 \
    --save_every 3000 \
    --save_minutes 20 \
    --keep_checkpoints 2 \
    --keep_every 3000 \
    "$@"
