#!/usr/bin/env bash
# The tests under lowered instruction sets: each of {as the CPU is, AVX2, SSE4.1} with 1, 2 and 4 threads, one after another.
# Writes one log for each to benchmarks/results/DATE-tests-ISA-Nthreads.log: CPU, versions, command, what failed, the summary.
#   bash benchmarks/instruction_sets.sh [pytest arguments]       arguments select tests; without any, the whole suite runs
#   SETS="avx2 sse41"  THREADS="1 2"                             only these combinations
#   RESULTS=FOLDER                                               another folder for the logs
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/setup.sh"
cd "$root"
results="${RESULTS:-benchmarks/results}"
mkdir -p "$results"
versions='import platform, torch, numpy, transformers
print(f"Python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}, transformers {transformers.__version__}")
print(f"torch kernels: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")'

# header LOG VARIABLE=VALUE ...: where and how the tests ran.
header() {
    local log="$1" variables=("${@:2}")
    {
        echo "date      $(date -u +%Y-%m-%dT%H:%M:%SZ), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
        echo "cpu       $(grep -m1 'model name' /proc/cpuinfo | cut -d: -f2- | xargs), $(nproc) cores"
        echo "flags     $(grep -m1 '^flags' /proc/cpuinfo | grep -oE '\b(sse4_1|avx|avx2|fma|avx512[a-z0-9_]*|amx[a-z0-9_]*)\b' | sort -u | xargs)"
        env "${variables[@]}" "$python" -c "$versions" | sed 's/^/versions  /'
        echo "command   ${variables[*]} python -m pytest ${arguments[*]}"
        echo
    } >"$log"
}

arguments=(-p no:cacheprovider --no-header -m "not full" -ra -n 2 --dist worksteal "$@")
failed=0
for set in ${SETS:-native avx2 sse41}; do
    case "$set" in
        native) instructions=() ;;
        avx2) instructions=(ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2) ;;
        sse41) instructions=(ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41) ;;
        *) echo "SETS: $set is none of native, avx2, sse41" >&2 && exit 2 ;;
    esac
    for threads in ${THREADS:-1 2 4}; do
        log="$results/$(date -u +%Y-%m-%d)-tests-$set-${threads}threads.log"
        # Two processes of tests have more threads than there are cores: a thread that waits should sleep, not spin.
        variables=(${instructions[@]+"${instructions[@]}"} OMP_NUM_THREADS="$threads" OMP_WAIT_POLICY=passive)
        # Otherwise torch has at most as many threads as there are cores.
        variables+=(MKL_DYNAMIC=false)
        header "$log" "${variables[@]}"
        code=0
        # Of the output only failures and the summary are kept.
        env "${variables[@]}" "$python" -m pytest "${arguments[@]}" >"$log.whole" 2>&1 || code=$?
        grep -E '^(FAILED|ERROR|SKIPPED|E   )|^[0-9]+ (passed|failed)|^=+ .*(passed|failed|error)' "$log.whole" >>"$log" || true
        echo "exit code $code" >>"$log"
        rm "$log.whole"
        echo "$log: $(tail -2 "$log" | xargs)"
        [ "$code" -eq 0 ] || failed=1
    done
done
exit "$failed"
