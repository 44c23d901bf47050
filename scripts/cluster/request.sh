# shellcheck shell=bash
# Parses the arguments of slurm.sh, pod.sh and node.sh: RUN_DIR, then a recipe with flags or torchrun_main.py's flags alone.
# Source it with these arguments. Defines `run_dir` (absolute), `program` and `stopped_on_request`, or exits with code 2.

refuse() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

case "${1:-}" in
    "" | -* | *.sh)
        refuse "'${1:-}' is not a run folder: give RUN_DIR first, on a file system that all machines share," \
            "then a recipe or flags"
        ;;
    /*) run_dir="$1" ;;
    *) run_dir="$PWD/$1" ;;
esac
shift
# shellcheck disable=SC2034 # used by the sourcing scripts
program=("$@")
case "${1:-}" in
    --*) ;;
    "") refuse "no recipe to run in $run_dir: give one, such as scripts/llm_pretrain/sltrain1b.sh, or torchrun_main.py's flags" ;;
    *) [ -f "$1" ] || refuse "$1: no such recipe file (relative to $PWD)" ;;
esac
before=""
for word in "$@"; do
    case "$before $word" in
        *" --save_dir" | *" --save_dir="*) refuse "$word: leave it out, the run's folder is the first argument, $run_dir" ;;
        *" --continue_from" | *" --continue_from="* | "--resume never" | *" --resume=never")
            # Every start of the job would begin at the same state.
            refuse "$word: a job may be started more than once and would return to the same state each time; first" \
                "run torchrun_main.py with this flag and --save_dir $run_dir until its first checkpoint, then submit without it"
            ;;
    esac
    before="$word"
done

# Succeeds if the run was asked to stop and has saved. Listing the folder refreshes NFS's cache of what other machines wrote.
stopped_on_request() {
    ls "$run_dir" >/dev/null 2>&1 && [ -f "$run_dir/stopped.json" ]
}
