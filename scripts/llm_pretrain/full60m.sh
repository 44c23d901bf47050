#!/usr/bin/env bash
# LLaMA 60M, full-rank at SLTrain's learning rate, on C4 at length 256, batch 512 sequences.
# Hardware: 1 GPU by default; NPROC=N sets another number (micro-batch x N must divide 512).
# Predicted, not measured: 58,073,600 parameters; 13.0 GiB at the peak on each GPU.
# Status: planned only, not run yet.
# Published: perplexity 34.06 after 1.1B tokens; parameters and Adam moments .35 G in the paper's convention (arXiv 2406.02214,
#   Table 2). The published evaluation reads 1.7-3.5 % low (docs/method.md).
# Not a tuned baseline: the learning rate is SLTrain's, so that only the method differs. tuned/full60m.sh has rates by group.
#   Users of the published code report 30.1 at this lr where 34.06 was published: compare with the tuned figure.
# --dry_run shows memory and batch arithmetic on your machine. Flags given on the command line override the script's;
#   relative paths among them start from the folder where you are. The default run folder is in the checkout.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh" --prefer-active
eval "set -- $(from_start "$@")"
cd "$root"

launch 1 torchrun_main.py \
    --model_config configs/llama_60m.json \
    --peft_model full \
    --optimizer adamw \
    --lr 0.003 \
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
