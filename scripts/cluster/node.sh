#!/usr/bin/env bash
# Starts torchrun on one machine of a run on several machines. slurm.sh and pod.sh call it once on each machine.
#   node.sh RUN_DIR scripts/llm_pretrain/sltrain1b.sh [flags]
#   node.sh RUN_DIR --model_config configs/llama_1b.json ...     torchrun_main.py's flags
#   NPROC     processes on this machine, one for each GPU (default: the GPUs that Slurm has allocated on it)
#   PET_...   torchrun's variables: PET_NNODES machines, rendezvous at PET_RDZV_ENDPOINT; PET_LOCAL_ADDR is needed if other
#             machines cannot resolve this machine's name
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
# Machines wait ten minutes (not one) for the rendezvous, because loading torch from a slow file system can delay its host.
rendezvous="read_timeout=600"
if [ -n "${SLURM_JOB_ID:-}" ]; then
    NPROC="${NPROC:-${SLURM_GPUS_ON_NODE:-}}"
    # The job's first machine hosts the rendezvous; torchrun's own guess from names and addresses can be wrong.
    if [ "${SLURM_NODEID:-}" = 0 ]; then rendezvous+=",is_host=1"; else rendezvous+=",is_host=0"; fi
fi
export NPROC="${NPROC:-}" PET_RDZV_CONF="${PET_RDZV_CONF:-$rendezvous}"
if [ -z "$NPROC" ]; then
    echo "node.sh: no GPU is allocated on this machine; add sbatch --gpus-per-node=8, or set NPROC to train on CPUs" >&2
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
eval "program=($(from_start "${program[@]}"))"
cd "$root"
launch 1 torchrun_main.py "${program[@]}" --save_dir "$run_dir"
