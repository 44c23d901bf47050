#!/usr/bin/env bash
# rates.sh METHOD HIDDEN_SIZE [RANK]: sourced by the tuned recipes. Sets `tuned`, the flags that they add to the published recipe.
# The rates come from a first search with the demo model (hidden size 256, 600 updates; docs/results.md). Change them here. The
# settings of the larger search, scripts/sweeps/tuned_demo.yaml, become these only if they hold at four times its length too.
# Rule: the ratio of the embedding's rate to that of matrices and sparse values grows as sqrt(hidden size) (arXiv 2506.15025).
#   --lr, the rate of embedding, output head and norms, stays; the other rates are divided by sqrt(HIDDEN_SIZE / 256).
set -euo pipefail

carried_over() {
    LC_ALL=C awk -v rate="$1" -v hidden="$2" 'BEGIN { printf "%.3g", rate / sqrt(hidden / 256) }'
}

case "$1" in
    full)
        tuned=(--lr 0.004 --matrix_lr "$(carried_over 0.0005 "$2")" --start_scale 0.1)
        ;;
    sltrain) # with the demo's alpha / rank, 0.25, instead of the published one
        tuned=(--lr 0.002 --matrix_lr "$(carried_over 0.002 "$2")" --sparse_lr "$(carried_over 0.002 "$2")")
        tuned+=(--lora_alpha "$(($3 / 4))")
        ;;
    *) echo "rates.sh: $1: no rates for this method; must be full or sltrain" >&2 && exit 2 ;;
esac
tuned+=(--grad_clipping 1.0)
