#!/usr/bin/env bash
# LLaMA 60M, full-rank, tuned: ../full60m.sh with other rates by group, initial scale and clipping,
#   on C4 at length 256, batch 512 sequences.
# Hardware: 1 GPU by default; NPROC=N sets another number (micro-batch x N must divide 512).
# Predicted, not measured: 58,073,600 parameters; 13.0 GiB at the peak on each GPU.
# Status: carried over from small scale, not run at this size. rates.sh has the rates and the rule; --dry_run prints them.
# Flags given on the command line override the script's.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
source "$here/rates.sh" full 512
exec bash "$here/../full60m.sh" "${tuned[@]}" "$@"
