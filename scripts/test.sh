#!/usr/bin/env bash
# Sets up the environment, then runs lint, types and tests (tests in two processes). Extra arguments go to pytest; --full adds the
# long matrices.
#   bash scripts/test.sh [--full] [pytest arguments]
#   bash scripts/test.sh -n 0 [pytest arguments]       one process: to debug a test, or to measure how long each one takes
#   bash scripts/test.sh --oldest [--full] [...]       tests only, with the oldest versions that requirements.txt promises, in
#                                                      .venv-oldest (several GB where the package index has torch for CUDA only)
set -euo pipefail
oldest=""
if [ "${1:-}" = "--oldest" ]; then
    oldest=yes
    shift
    checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    export SLTRAIN_VENV="$checkout/.venv-oldest" SLTRAIN_CONSTRAINTS
    SLTRAIN_CONSTRAINTS="$(mktemp)"
    trap 'rm -f "$SLTRAIN_CONSTRAINTS"' EXIT
    unset SLTRAIN_PYTHON
    # Above "# checks", requirements become the oldest versions; the tools below it are those of constraints.txt.
    sed -e '/^# checks/,$d' -e 's/#.*//' -e 's/\[.*\]//' -e 's/>=/==/' "$checkout/requirements.txt" >"$SLTRAIN_CONSTRAINTS"
    grep -f <(sed -n -e '1,/^# checks/d' -e 's/^\([^>]*\)>=.*/^\1==/p' "$checkout/requirements.txt") \
        "$checkout/constraints.txt" >>"$SLTRAIN_CONSTRAINTS"
fi
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
marks=(-m "not full")
if [ "${1:-}" = "--full" ]; then
    marks=()
    shift
fi
if [ -z "$oldest" ]; then
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    "$python" -m mypy
fi
# Each process starts with half of the tests; the one that finishes first takes over tests of the other.
"$python" -m pytest -n 2 --dist worksteal ${marks[@]+"${marks[@]}"} "$@"
