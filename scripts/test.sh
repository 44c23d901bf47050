#!/usr/bin/env bash
# Sets up the environment, then runs lint, types and tests (tests in two processes). Extra arguments go to pytest; --full adds the
# long matrices.
#   bash scripts/test.sh [--full] [pytest arguments]
#   bash scripts/test.sh -n 0 [pytest arguments]       one process: to debug a test, or to measure how long each one takes
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
marks=(-m "not full")
if [ "${1:-}" = "--full" ]; then
    marks=()
    shift
fi
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
# Each process starts with half of the tests; the one that finishes first takes over tests of the other.
exec "$python" -m pytest -n 2 --dist worksteal ${marks[@]+"${marks[@]}"} "$@"
