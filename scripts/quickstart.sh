#!/usr/bin/env bash
# Trains a small LLaMA with low-rank plus sparse linears on English text that is already on this machine.
# Any machine; no GPU, no network beyond the package index. A few minutes of training on two CPU cores.
# Expected: perplexity 45.64 after 620 updates (Python 3.11.7, CPU, 2026-11-29); docs/results.md.
#   bash scripts/quickstart.sh [torchrun_main.py arguments, which override scripts/quickstart.yaml; not --save_dir]
# Relative paths among them start from the folder where you are.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
eval "set -- $(from_start "$@")"
cd "$root"

echo "== data: the documentation of the installed packages, in C4's format"
"$python" -m peft_pretraining data demo --name demo-2k

run=runs/quickstart
number=1
while [ -e "$run" ] && [ ! -e "$run/stopped.json" ]; do
    number=$((number + 1))
    run="runs/quickstart-$number"
done
if [ -e "$run/stopped.json" ]; then
    echo "== continuing $run, which was stopped; remove that folder to start anew"
else
    echo "== training into $run"
fi
"$python" torchrun_main.py --config scripts/quickstart.yaml "$@" --save_dir "$run"
[ -e "$run/metrics.jsonl" ] || exit 0 # a dry run or --help
[ ! -e "$run/stopped.json" ] || exit 0 # the same command continues

echo "== result"
"$python" -m peft_pretraining report "$run"

echo "== a sample"
"$python" -m peft_pretraining generate --checkpoint "$run" --prompt "Return the" --max_new_tokens 60
