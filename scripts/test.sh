#!/usr/bin/env bash
# Sets up the environment, then runs lint, types and tests. Extra arguments go to pytest; --full adds the long matrices.
#   bash scripts/test.sh [--full] [pytest arguments]
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
exec "$python" -m pytest ${marks[@]+"${marks[@]}"} "$@"
