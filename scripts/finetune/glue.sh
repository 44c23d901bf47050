#!/usr/bin/env bash
# Fine-tune RoBERTa-base on one of GLUE's tasks with W0 + (alpha/r) B A + S, W0 frozen.
#   bash scripts/finetune/glue.sh TASK [FLAG...]     TASK: cola sst2 mrpc qqp stsb mnli qnli rte wnli
# Status: planned only, not run yet.
# Published setting (arXiv 2406.02214): r 8, delta .005 or .001, alpha 32, 64 or 128, lr 1e-5 to 5e-5, seed 1234. The paper does not
#   say which value belongs to which task: this script uses the first delta and the middle of each range, to be tuned on the
#   validation set. Epochs, batch and length are our choice.
# Network: model and task are downloaded from the hub once; MODEL=folder, --train_file and --validation_file need no network.
# Flags given on the command line override the script's; relative paths start from the folder where you are.
# The merged model and results.json go to OUT (default: runs/glue/TASK in the checkout).
set -euo pipefail
task="${1:?which task? cola sst2 mrpc qqp stsb mnli qnli rte wnli}"
shift
case "$task" in
    mnli | qqp | qnli | sst2) epochs=3 ;; # 67 to 393 thousand examples
    *) epochs=20 ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh" --prefer-active
MODEL="$(resolved --model "${MODEL:-FacebookAI/roberta-base}")"
OUT="${OUT:+$(resolved --out "$OUT")}"
eval "set -- $(from_start "$@")"
cd "$root"

exec "$python" -m peft_pretraining finetune \
    --model "$MODEL" \
    --task "$task" \
    --out "${OUT:-runs/glue/$task}" \
    --base frozen \
    --rank 8 \
    --sp_ratio 0.005 \
    --lora_alpha 64 \
    --lr 3e-5 \
    --epochs "$epochs" \
    --batch_size 16 \
    --seed 1234 \
    "$@"
