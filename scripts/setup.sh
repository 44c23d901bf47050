#!/usr/bin/env bash
# Creates a virtual environment with the pinned requirements; sourced by all scripts. Defines `root`, `python` and `launch`.
# Returns immediately if everything is installed.
#   --prefer-active use the python on PATH if it has the requirements (an activated environment, a container)
#   SLTRAIN_VENV    folder of the environment (default: .venv in the checkout)
#   SLTRAIN_CONSTRAINTS  file with the versions to install (default: constraints.txt)
#   SLTRAIN_PYTHON  an interpreter that already has the requirements; nothing is installed
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

find_base_python() {
    local name
    for name in python3.11 python3.12 python3.13 python3; do
        if command -v "$name" >/dev/null && "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    echo "setup: found no Python 3.11 or newer with the venv module; install one (Debian: apt install python3-venv)" >&2
    return 1
}

has_requirements() {
    "$1" - 2>/dev/null <<'PYTHON'
import importlib.util as util, sys
names = ("torch", "transformers", "datasets", "sentencepiece", "bitsandbytes", "wandb", "tqdm")
sys.exit(any(util.find_spec(name) is None for name in names))
PYTHON
}

# Makes a relative path absolute, because the scripts change to the checkout after this file.
from_here() {
    case "$1" in
        /* | "") echo "$1" ;;
        */*) echo "$PWD/$1" ;;
        *) command -v "$1" || echo "$PWD/$1" ;;
    esac
}

# resolved FLAG VALUE: prints the value; a relative path after a flag that takes one is resolved in the folder where the script was
# started. A path that is only in the checkout stays there, with a notice: recipes' own files, and runs of before.
resolved() {
    local value="$2"
    case "$1" in
        --model_config | --config | --dataset | --eval_dataset | --tokenizer | --continue_from | --warmed_up_model | --save_dir) ;;
        --model | --train_file | --validation_file | --out) ;;
        *) value=/ ;;
    esac
    case "$value" in
        "" | /* | "~"* | *://* | hub:* | c4 | demo | demo-2k) printf '%s' "$2" && return ;;
    esac
    if [ "$PWD" = "$root" ]; then
        printf '%s' "$value"
    elif [ -e "$value" ] || compgen -G "$value" >/dev/null; then
        printf '%s' "${PWD%/}/$value"
    elif [ -e "$root/$value" ]; then
        echo "notice: $1 $value: taken from the checkout, $root; $PWD has no such file or folder" >&2
        printf '%s' "$value"
    else
        case "$1" in
            --save_dir | --out) printf '%s' "${PWD%/}/$value" ;;
            *) printf '%s' "$value" ;;
        esac
    fi
}

# resolved_value FLAG VALUE: the same, for every NAME or NAME:WEIGHT if the value is a list of data sets.
resolved_value() {
    local entry weight rest="$2," separator=""
    case "$1:$2" in
        --dataset:*,* | --eval_dataset:*,*) ;;
        *) rest="" ;;
    esac
    # Commas in quotes, braces, brackets and addresses may separate nothing: such a list stays as it is.
    case "$2" in *[\{\[\"]* | *://*) rest="" ;; esac
    if [ -z "$rest" ] || [ -e "$2" ]; then resolved "$1" "$2" && return; fi
    while [ -n "$rest" ]; do
        entry="${rest%%,*}" rest="${rest#*,}" weight=""
        entry="${entry#"${entry%%[![:space:]]*}"}" entry="${entry%"${entry##*[![:space:]]}"}"
        if [[ ! -e "$entry" && "$entry" =~ ^(.*[^[:space:]])[[:space:]]*(:[[:space:]]*[0-9.]+)$ ]]; then
            entry="${BASH_REMATCH[1]}" weight="${BASH_REMATCH[2]}"
        fi
        printf '%s%s%s' "$separator" "$(resolved "$1" "$entry")" "$weight"
        separator=", "
    done
}

# from_start WORDS: prints the words with the paths among them resolved, quoted for eval: the scripts change to the checkout.
from_start() {
    local word flag=""
    for word in "$@"; do
        case "$word" in
            --*=*) printf '%q ' "${word%%=*}=$(resolved_value "${word%%=*}" "${word#*=}")" ;;
            --*) printf '%q ' "$word" ;;
            *) printf '%q ' "$(resolved_value "$flag" "$word")" ;;
        esac
        flag="$word"
    done
}

if [ -n "${SLTRAIN_PYTHON:-}" ]; then
    python="$(from_here "$SLTRAIN_PYTHON")"
elif [ "${1:-}" = "--prefer-active" ] && command -v python >/dev/null && has_requirements python; then
    python="$(command -v python)"
else
    venv="${SLTRAIN_VENV:-$root/.venv}"
    case "$venv" in /*) ;; *) venv="$PWD/$venv" ;; esac
    python="$venv/bin/python"
    constraints="${SLTRAIN_CONSTRAINTS:-$root/constraints.txt}"
    wanted="$(cat "$root/requirements.txt" "$constraints" | cksum | cut -d' ' -f1)"
    if [ ! -x "$python" ]; then
        echo "setup: creating a virtual environment in $venv" >&2
        base="$(find_base_python)"
        "$base" -m venv "$venv"
    fi
    if [ "$(cat "$venv/.installed" 2>/dev/null)" != "$wanted" ]; then
        echo "setup: installing the pinned requirements (a few minutes, once)" >&2
        # torch is installed first and alone, so that pip keeps this build when other packages require any torch.
        torch_pin="$(grep '^torch==' "$constraints")"
        "$python" -m pip install --quiet --disable-pip-version-check "$torch_pin"
        "$python" -m pip install --quiet --disable-pip-version-check -r "$root/requirements.txt" -c "$constraints"
        echo "$wanted" >"$venv/.installed"
    fi
fi

# launch N PROGRAM [arguments]: replaces the shell by torchrun with $NPROC processes (default N) on this machine. With
# PET_RDZV_ENDPOINT this machine is one of several (scripts/cluster/), and torchrun reads the rest from its PET_... variables.
launch() {
    local processes="${NPROC:-$1}" rendezvous=(--standalone)
    shift
    if [ -n "${PET_RDZV_ENDPOINT:-}" ]; then rendezvous=(); fi
    exec "$python" -m peft_pretraining.distributed.launch ${rendezvous[@]+"${rendezvous[@]}"} --nproc_per_node "$processes" "$@"
}
