#!/usr/bin/env bash
# LLaMA 7B, SLTrain, on C4 at length 256, batch 512 sequences.
# Hardware: 8 GPUs by default; NPROC=N sets another number (micro-batch x N must divide 512).
# Predicted, not measured: 3,144,735,808 parameters; 33.2 GiB at the peak on each GPU.
# Status: planned only, not run yet.
# Published: perplexity 27.59 after 1.4B tokens, 46G per GPU, 5,877 tokens/s on four A100-80G (arXiv 2406.02214). The published
#   script says lr 0.003, the paper lr 0.0005; the paper's is used.
# --dry_run shows memory and batch arithmetic on your machine. Flags given on the command line override the script's;
#   relative paths among them start from the folder where you are. The default run folder is in the checkout.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh" --prefer-active
eval "set -- $(from_start "$@")"
cd "$root"

launch 8 torchrun_main.py \
    --model_config configs/llama_7b.json \
    --peft_model sltrain \
    --rank 1024 \
    --sp_ratio 0.05 \
    --lora_alpha 8 \
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
