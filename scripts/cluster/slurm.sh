#!/usr/bin/env bash
#SBATCH --job-name=sltrain
#SBATCH --ntasks-per-node=1
#SBATCH --signal=USR1@360
#SBATCH --requeue
#SBATCH --open-mode=append
# Trains on several machines under Slurm; options given to sbatch override those above. Submit it from the checkout:
#   sbatch --nodes=4 --gpus-per-node=8 --exclusive --time=24:00:00 scripts/cluster/slurm.sh RUN_DIR RECIPE [flags]
#   sbatch ... scripts/cluster/slurm.sh RUN_DIR --model_config configs/llama_1b.json ...     torchrun_main.py's flags
# RUN_DIR and the checkout must be on a file system that all machines share. Six minutes before the time limit the run is asked
# to save and stop, and the job is requeued and resumes. docs/distributed.md describes stops, failures and restarts.
# Without --exclusive a task has one core by default; sbatch --cpus-per-task=64 gives it more. sbatch --no-requeue: no requeueing.
#   MAX_REQUEUES   largest number of requeues (default 100; 0: never), including those by Slurm itself
#   LOG_DIR        folder of the machines' output (default logs): $LOG_DIR/<job name>-<job id>/node-<machine>.log
#   NPROC          processes per machine (default: its GPUs)
set -euo pipefail
# Slurm may signal this shell as well as the processes; the shell must outlive them to requeue the job.
trap : TERM USR1

if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "slurm.sh: not in a Slurm job: sbatch --nodes=2 --gpus-per-node=8 scripts/cluster/slurm.sh RUN_DIR RECIPE [flags]" >&2
    exit 2
fi
# Slurm runs a copy of this file from another folder, so the checkout is the working directory.
if [ ! -f scripts/cluster/node.sh ]; then
    echo "slurm.sh: $PWD is not the checkout; submit the job from the checkout, or with sbatch --chdir=CHECKOUT" >&2
    exit 2
fi
# shellcheck source=scripts/cluster/request.sh
source scripts/cluster/request.sh "$@"
max_requeues="${MAX_REQUEUES:-100}"
restarts="${SLURM_RESTART_COUNT:-0}"
case "$max_requeues" in *[!0-9]* | "") refuse "MAX_REQUEUES=$max_requeues: not a whole number" ;; esac

# Installs once, before all machines would do it at the same time.
# shellcheck source=scripts/setup.sh
source scripts/setup.sh --prefer-active
export SLTRAIN_PYTHON="$python"

mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
[ "${#machines[@]}" -gt 0 ] || refuse "scontrol show hostnames $SLURM_JOB_NODELIST names no machine"
# A port for each job, below the range from which Linux assigns ports itself.
export PET_NNODES="$SLURM_JOB_NUM_NODES" PET_RDZV_BACKEND=c10d PET_RDZV_ID="$SLURM_JOB_ID-$restarts"
export PET_RDZV_ENDPOINT="${machines[0]}:$((15000 + SLURM_JOB_ID % 15000))"
# srun does not inherit this setting from sbatch (Slurm 22.05 and newer).
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi

logs="${LOG_DIR:-logs}/${SLURM_JOB_NAME:-sltrain}-$SLURM_JOB_ID"
mkdir -p "$logs" "$run_dir"
# Removes the marker of an earlier job.
rm -f "$run_dir/stopped.json"
echo "start $((restarts + 1)) of job $SLURM_JOB_ID: ${machines[*]}, rendezvous at $PET_RDZV_ENDPOINT; output in $logs/node-*.log"
# Machines may end at different times while others close their records: --wait gives them ten minutes.
code=0
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait=600 \
    --open-mode=append --output="$logs/node-%N.log" \
    bash scripts/cluster/node.sh "$run_dir" "${program[@]}" || code=$?

if ! stopped_on_request; then
    if [ "$code" -eq 0 ]; then
        echo "done: $run_dir"
    else
        echo "failed with exit code $code, not requeued: the reason is in $logs/node-*.log" >&2
    fi
    exit "$code"
fi
if grep -q '"SIG\(TERM\|INT\)"' "$run_dir/stopped.json"; then
    # Preemption or scancel: the job must still be running for Slurm to requeue it; one that has ended would count as complete.
    echo "stopped by $(cat "$run_dir/stopped.json") and saved; Slurm decides whether job $SLURM_JOB_ID is requeued"
    sleep 600 || true
    exit 1
fi
if [ "$restarts" -ge "$max_requeues" ]; then
    echo "stopped and saved, not requeued: $restarts restarts have reached MAX_REQUEUES=$max_requeues; submit again to resume" >&2
    exit 1
fi
echo "stopped and saved; requeued"
scontrol requeue "$SLURM_JOB_ID" || {
    echo "scontrol requeue $SLURM_JOB_ID was refused; submit the same command again to resume" >&2
    exit 1
}
