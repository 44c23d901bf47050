# shellcheck shell=bash
# What slurm.sh, pod.sh and node.sh are asked to run. Source it with their arguments: RUN_DIR, then a recipe with flags or
# torchrun_main.py's flags alone. It defines `run_dir` (absolute), `program` and `stopped_on_request`, or ends with exit code 2.

refuse() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

case "${1:-}" in
    "" | -* | *.sh)
        refuse "'${1:-}' is no folder for the run: give RUN_DIR first, on a file system that all machines share," \
            "then a recipe or flags"
        ;;
    /*) run_dir="$1" ;;
    *) run_dir="$PWD/$1" ;;
esac
shift
# shellcheck disable=SC2034 # used by those that source this
program=("$@")
case "${1:-}" in
    --*) ;;
    "") refuse "nothing to run in $run_dir: give a recipe such as scripts/llm_pretrain/sltrain1b.sh, or torchrun_main.py's flags" ;;
    *) [ -f "$1" ] || refuse "$1: no such recipe (from $PWD)" ;;
esac
before=""
for word in "$@"; do
    case "$before $word" in
        *" --save_dir" | *" --save_dir="*) refuse "$word: the run's folder is the first argument, $run_dir" ;;
        *" --continue_from" | *" --continue_from="* | "--resume never" | *" --resume=never")
            # Each start would go back to the same place.
            refuse "$word: a job may start more than once, and would go back, or begin anew, each time;" \
                "make the first checkpoint in $run_dir with it outside of this script (--save_dir), then start the job without it"
            ;;
    esac
    before="$word"
done

# Whether the run was asked to stop and has saved. Listing the folder makes NFS look again: another machine may have written it.
stopped_on_request() {
    ls "$run_dir" >/dev/null 2>&1 && [ -f "$run_dir/stopped.json" ]
}
