#!/usr/bin/env bash
# LLaMA 1B, full-rank at SLTrain's learning rate, on C4 at length 256, batch 512 sequences.
# Hardware: 8 GPUs by default; NPROC=N sets another number (micro-batch x N must divide 512).
# Predicted, not measured: 1,339,082,752 parameters; 28.2 GiB at the peak on each GPU.
# Status: planned only, not run yet.
# Published: perplexity 15.56 after 13.1B tokens; parameters and Adam moments 8.04 G in the paper's convention (arXiv
#   2406.02214, Table 2). The published evaluation reads 1.7-3.5 % low (docs/method.md).
# Not a tuned baseline: the learning rate is SLTrain's, so that only the method differs. tuned/full1b.sh has rates by group.
# --dry_run shows memory and batch arithmetic on your machine. Flags given on the command line override the script's;
#   relative paths among them start from the folder where you are. The default run folder is in the checkout.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh" --prefer-active
eval "set -- $(from_start "$@")"
cd "$root"

launch 8 torchrun_main.py \
    --model_config configs/llama_1b.json \
    --peft_model full \
    --optimizer adamw \
    --lr 0.003 \
    --batch_size 32 \
    --total_batch_size 512 \
    --num_training_steps 140000 \
    --warmup_steps 10000 \
    --weight_decay 0 \
    --dtype bfloat16 \
    --eval_every 1000 \
    --grad_clipping 1.0 \
    --save_every 3000 \
    --save_minutes 20 \
    --keep_checkpoints 2 \
    --keep_every 3000 \
    "$@"
