#!/usr/bin/env bash
# LLaMA 1B, ReLoRA, on C4 at length 256, batch 512 sequences.
# Hardware: 8 GPUs by default; NPROC=N takes another number (micro-batch x N must divide 512).
# Published: perplexity 18.33 after 13.1B tokens, without a full-rank warm-up (arXiv 2403.03507, section 5.1); parameters and
#   Adam moments printed as 6.34 G, 5.54 G by the paper's convention (arXiv 2406.02214, Table 2). Its evaluation read 1.7-3.5 %
#   low, see the README. Not yet run whole here.
# Schedule, merges and lr are those of ReLoRA's authors (arXiv 2307.05695): those of its configuration for 1B, whose interval is
#   5,320 and first warm-up 13,000 updates; the number of updates is that of the other recipes, for the same tokens.
# Full-rank warm-up: bash scripts/llm_pretrain/full1b.sh --num_training_steps 5000 --warmup_steps 500 --save_dir warm1b,
#   then this script with --warmed_up_model warm1b; its 5000 updates count.
# Memory and batch arithmetic on your machine: append --dry_run. Any flag given here wins over the script's.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh" --prefer-active
cd "$root"

launch 8 torchrun_main.py \
    --model_config configs/llama_1b.json \
    --peft_model relora \
    --rank 512 \
    --lora_alpha 32 \
    --relora 5000 \
    --reset_optimizer_on_relora false \
    --optimizer_magnitude_pruning 0.9 \
    --optimizer adamw \
    --lr 0.0004 \
    --scheduler cosine_restarts \
    --cycle_length 5000 \
    --restart_warmup_steps 100 \
    --warmup_steps 500 \
    --batch_size 32 \
    --total_batch_size 512 \
    --num_training_steps 140000 \
    --weight_decay 0 \
    --dtype bfloat16 \
    --eval_every 1000 \
    --save_every 3000 \
    "$@"
