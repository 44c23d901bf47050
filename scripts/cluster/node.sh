#!/usr/bin/env bash
# One machine's part of a run on several: becomes torchrun. slurm.sh and pod.sh start it, once on each machine.
#   node.sh RUN_DIR scripts/llm_pretrain/sltrain1b.sh [flags]
#   node.sh RUN_DIR --model_config configs/llama_1b.json ...     torchrun_main.py's flags
#   NPROC     processes on this machine, one for each GPU (default: the GPUs that Slurm has allocated here)
#   PET_...   torchrun's own: PET_NNODES machines meet at PET_RDZV_ENDPOINT; PET_LOCAL_ADDR, where others do not know its name
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
# A file system may be slow to give torch to the machine where all meet: the others knock for ten minutes, not for one.
meeting="read_timeout=600"
if [ -n "${SLURM_JOB_ID:-}" ]; then
    NPROC="${NPROC:-${SLURM_GPUS_ON_NODE:-}}"
    # Said, not found out by torchrun from names and addresses: the first machine of the job keeps the meeting place.
    if [ "${SLURM_NODEID:-}" = 0 ]; then meeting+=",is_host=1"; else meeting+=",is_host=0"; fi
fi
export NPROC="${NPROC:-}" PET_RDZV_CONF="${PET_RDZV_CONF:-$meeting}"
if [ -z "$NPROC" ]; then
    echo "node.sh: no GPU was allocated here: ask for them (sbatch --gpus-per-node=8), or set NPROC to train on CPUs" >&2
    exit 2
fi
# shellcheck source=SCRIPTDIR/request.sh
source "$here/request.sh" "$@"
case "${program[0]}" in
    --*) ;;
    *) exec bash "${program[@]}" --save_dir "$run_dir" ;;
esac
# shellcheck source=SCRIPTDIR/../setup.sh
source "$here/../setup.sh" --prefer-active
cd "$root"
launch 1 torchrun_main.py "${program[@]}" --save_dir "$run_dir"
