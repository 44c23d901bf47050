#!/usr/bin/env bash
# LLaMA 7B, GaLore, on C4 at length 256, batch 512 sequences.
# Hardware: 8 GPUs by default; NPROC=N sets another number (micro-batch x N must divide 512).
# Predicted, not measured: 6,738,415,616 parameters; 44.7 GiB at the peak on each GPU.
# Status: planned only, not run yet.
# Published: perplexity 26.87 after 1.4B tokens, 62G per GPU, 5,924 tokens/s on four A100-80G (arXiv 2406.02214). The published
#   evaluation reads 1.7-3.5 % low (docs/method.md).
# Rank, lr, scale and gap are those of GaLore's authors (arXiv 2403.03507 and its repository's script), whose script has
#   galore_adamw; 8-bit moments are what the figures above were measured with.
# On one GPU: NPROC=1 ... --optimizer galore_adamw8bit_per_layer --grad_clipping 0 --batch_size 1 (published: 22 GB at batch 1).
# --dry_run shows memory and batch arithmetic on your machine. Flags given on the command line override the script's;
#   relative paths among them start from the folder where you are. The default run folder is in the checkout.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh" --prefer-active
eval "set -- $(from_start "$@")"
cd "$root"

launch 8 torchrun_main.py \
    --model_config configs/llama_7b.json \
    --peft_model galore \
    --rank 1024 \
    --update_proj_gap 500 \
    --galore_scale 0.25 \
    --optimizer galore_adamw8bit \
    --lr 0.005 \
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
