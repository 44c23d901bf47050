#!/usr/bin/env bash
# LLaMA 350M, ReLoRA, on C4 at length 256, batch 512 sequences.
# Hardware: 4 GPUs by default; NPROC=N sets another number (micro-batch x N must divide 512).
# Predicted, not measured: 487,605,248 parameters; 39.9 GiB at the peak on each GPU.
# Status: planned only, not run yet.
# Published: perplexity 29.08 after 6.4B tokens, without a full-rank warm-up (arXiv 2403.03507, section 5.1); parameters and
#   Adam moments printed as 1.85 G, 1.46 G by the paper's convention (arXiv 2406.02214, Table 2). The published evaluation reads
#   1.7-3.5 % low (docs/method.md).
# Schedule, merges and lr are those of ReLoRA's authors (arXiv 2307.05695), from their README for 250M; the number of updates is
#   that of the other recipes, for the same tokens.
# Full-rank warm-up: bash scripts/llm_pretrain/full350m.sh --num_training_steps 5000 --warmup_steps 500 --save_dir warm350m,
#   then this script with --warmed_up_model warm350m; its 5000 updates count.
# --dry_run shows memory and batch arithmetic on your machine. Flags given on the command line override the script's;
#   relative paths among them start from the folder where you are. The default run folder is in the checkout.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh" --prefer-active
eval "set -- $(from_start "$@")"
cd "$root"

launch 4 torchrun_main.py \
    --model_config configs/llama_350m.json \
    --peft_model relora \
    --rank 256 \
    --lora_alpha 32 \
    --relora 5000 \
    --reset_optimizer_on_relora true \
    --optimizer adamw \
    --lr 0.001 \
    --scheduler cosine_restarts \
    --cycle_length 5000 \
    --restart_warmup_steps 100 \
    --warmup_steps 500 \
    --batch_size 128 \
    --total_batch_size 512 \
    --num_training_steps 65000 \
    --weight_decay 0 \
    --dtype bfloat16 \
    --eval_every 1000 \
    --save_minutes 20 \
    --keep_checkpoints 2 \
    --keep_every 10000 \
    "$@"
