#!/usr/bin/env bash
# Runs a sweep: settings x seeds of a YAML file, one after another, then a report. Started again, it continues where it stopped.
#   bash scripts/sweep.sh FILE.yaml [--dry_run]      ready files: scripts/sweeps/
# Paths inside the file are relative to the checkout. Exit code 0: all finished; 1: a run failed; 130: stopped on request.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" --prefer-active
arguments=()
for argument in "$@"; do
    if [ -f "$argument" ]; then argument="$(cd "$(dirname "$argument")" && pwd)/$(basename "$argument")"; fi
    arguments+=("$argument")
done
cd "$root"
exec "$python" -m peft_pretraining sweep ${arguments[@]+"${arguments[@]}"}
