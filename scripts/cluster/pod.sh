#!/usr/bin/env bash
# One pod's part of a run under Kubernetes (pytorchjob.yaml): node.sh, with an exit code that tells a stop from the end.
# torchrun's is 0 on machines whose processes were told to stop by another machine's: a job would count as complete.
#   pod.sh RUN_DIR RECIPE [flags]
# Exit code: 0 done; 143 stopped on request, saved, to be started again; else torchrun's, 1 for every failure.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=SCRIPTDIR/request.sh
source "$here/request.sh" "$@"

signalled=""
bash "$here/node.sh" "$run_dir" "${program[@]}" &
node=$!
# Kubernetes signals the first process of a container only. torchrun takes one signal: a second would end it in mid-save.
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
while [ -n "$signalled" ] && kill -0 "$node" 2>/dev/null; do # the wait was cut short by the signal
    code=0
    wait "$node" || code=$?
done
if stopped_on_request; then exit 143; fi
exit "$code"
