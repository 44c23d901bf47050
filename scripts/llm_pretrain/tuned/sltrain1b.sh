#!/usr/bin/env bash
# LLaMA 1B, SLTrain, tuned: ../sltrain1b.sh with other rates by group, alpha / rank and clipping,
#   on C4 at length 256, batch 512 sequences.
# Hardware: 8 GPUs by default; NPROC=N sets another number (micro-batch x N must divide 512).
# Predicted, not measured: 645,547,960 parameters; 23.3 GiB at the peak on each GPU.
# Status: carried over from small scale, not run at this size. rates.sh has the rates and the rule; --dry_run prints them.
# Flags given on the command line override the script's.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
source "$here/rates.sh" sltrain 2048 512
exec bash "$here/../sltrain1b.sh" "${tuned[@]}" "$@"
