#!/usr/bin/env bash
# Set-up shared by all scripts: a virtual environment with the pinned requirements. Source it: it defines `root`, `python` and
# `launch`. A second run finds everything installed and returns at once.
#   --prefer-active takes the python on PATH where it has torch and the rest (an activated environment, a container)
#   SLTRAIN_VENV    where the environment lies (default: .venv in the checkout)
#   SLTRAIN_PYTHON  an interpreter that already has the requirements; nothing is installed then
set -euo pipefail
# torchrun gives its processes this long to save after a signal; by itself 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
# A new store of addresses at each of its restarts: in a kept one processes can find those of their predecessors.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

find_base_python() {
    local name
    for name in python3.11 python3.12 python3.13 python3; do
        if command -v "$name" >/dev/null && "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    echo "setup: no Python 3.11 or newer with the venv module was found (Debian: apt install python3-venv)" >&2
    return 1
}

has_requirements() {
    "$1" - 2>/dev/null <<'PYTHON'
import importlib.util as util, sys
names = ("torch", "transformers", "datasets", "sentencepiece", "bitsandbytes", "wandb", "tqdm")
sys.exit(any(util.find_spec(name) is None for name in names))
PYTHON
}

# The scripts go to the checkout next: a relative path is meant from where they were started.
from_here() {
    case "$1" in
        /* | "") echo "$1" ;;
        */*) echo "$PWD/$1" ;;
        *) command -v "$1" || echo "$PWD/$1" ;;
    esac
}

if [ -n "${SLTRAIN_PYTHON:-}" ]; then
    python="$(from_here "$SLTRAIN_PYTHON")"
elif [ "${1:-}" = "--prefer-active" ] && command -v python >/dev/null && has_requirements python; then
    python="$(command -v python)"
else
    venv="${SLTRAIN_VENV:-$root/.venv}"
    case "$venv" in /*) ;; *) venv="$PWD/$venv" ;; esac
    python="$venv/bin/python"
    wanted="$(cat "$root/requirements.txt" "$root/constraints.txt" | cksum | cut -d' ' -f1)"
    if [ ! -x "$python" ]; then
        echo "setup: making a virtual environment in $venv" >&2
        base="$(find_base_python)"
        "$base" -m venv "$venv"
    fi
    if [ "$(cat "$venv/.installed" 2>/dev/null)" != "$wanted" ]; then
        echo "setup: installing the pinned requirements (a few minutes, once)" >&2
        # torch first and alone: pip then keeps that build when other packages ask for any torch.
        torch_pin="$(grep '^torch==' "$root/constraints.txt")"
        "$python" -m pip install --quiet --disable-pip-version-check "$torch_pin"
        "$python" -m pip install --quiet --disable-pip-version-check -r "$root/requirements.txt" -c "$root/constraints.txt"
        echo "$wanted" >"$venv/.installed"
    fi
fi

# launch N PROGRAM [arguments]: become torchrun, with $NPROC processes (N where it is not set) on this machine. Where torchrun's own
# variables name a meeting place, this machine is one of several (scripts/cluster/): they say the rest.
launch() {
    local processes="${NPROC:-$1}" meeting=(--standalone)
    shift
    if [ -n "${PET_RDZV_ENDPOINT:-}" ]; then meeting=(); fi
    exec "$python" -m torch.distributed.run ${meeting[@]+"${meeting[@]}"} --nproc_per_node "$processes" \
        --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "$@"
}
