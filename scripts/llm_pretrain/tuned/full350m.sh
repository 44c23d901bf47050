#!/usr/bin/env bash
# LLaMA 350M, full-rank, tuned: ../full350m.sh with other rates by group, initial scale and clipping,
#   on C4 at length 256, batch 512 sequences.
# Hardware: 4 GPUs by default; NPROC=N sets another number (micro-batch x N must divide 512).
# Predicted, not measured: 367,969,280 parameters; 38.3 GiB at the peak on each GPU.
# Status: carried over from small scale, not run at this size. rates.sh has the rates and the rule; --dry_run prints them.
# Flags given on the command line override the script's.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
source "$here/rates.sh" full 1024
exec bash "$here/../full350m.sh" "${tuned[@]}" "$@"
