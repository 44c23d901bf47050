#!/usr/bin/env bash
# Runs node.sh in one pod of a run under Kubernetes (pytorchjob.yaml), with an exit code that distinguishes a stop from the end.
# torchrun's exit code is 0 on machines that stop because another machine was asked to, so the job would count as complete.
#   pod.sh RUN_DIR RECIPE [flags]
# Exit code: 0 done; 143 stopped on request and saved, must be started again; otherwise torchrun's, 1 for every failure.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=SCRIPTDIR/request.sh
source "$here/request.sh" "$@"

# The marker of an earlier stop, so that a start that fails does not look like a stop.
rm -f "$run_dir/stopped.json"
signalled=""
bash "$here/node.sh" "$run_dir" "${program[@]}" &
node=$!
# Kubernetes signals only a container's first process. Only one signal is passed on: a second one ends torchrun during the save.
# shellcheck disable=SC2317,SC2329 # called by the traps
pass_on() {
    trap : TERM INT USR1
    signalled="$1"
    kill "-$1" "$node" 2>/dev/null || true
}
for name in TERM INT USR1; do
    # shellcheck disable=SC2064 # the name as it is now
    trap "pass_on $name" "$name"
done
code=0
wait "$node" || code=$?
# The signal interrupts wait, so wait again until node.sh has ended.
while [ -n "$signalled" ] && kill -0 "$node" 2>/dev/null; do
    code=0
    wait "$node" || code=$?
done
if stopped_on_request; then exit 143; fi
exit "$code"
