#!/usr/bin/env bash
# Opens a live dashboard of this machine's runs in a browser (trackio): no account, no network. Ctrl-C closes it.
#   bash scripts/dashboard.sh                 the runs made with --tracker trackio; trains the quickstart if there are none yet
#   bash scripts/dashboard.sh --new [flags]   trains a new quickstart beside it; flags as for scripts/quickstart.sh. The first
#                                             Ctrl-C then stops the training, and the next one closes the dashboard.
#   bash scripts/dashboard.sh RUN...          also these runs, made without --tracker trackio (folders, or folders of runs)
# TRACKIO_DIR: the folder of trackio's database (default: ~/.cache/huggingface/trackio). GRADIO_SERVER_PORT: the port (7860).
set -euo pipefail
scripts="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$scripts/setup.sh" --prefer-active
if ! "$python" -c 'import trackio' 2>/dev/null; then
    echo "dashboard: $python has no trackio; install it: $python -m pip install trackio" >&2
    exit 1
fi
# The first charts of the page, in this order; the others follow by name.
export TRACKIO_PLOT_ORDER="${TRACKIO_PLOT_ORDER:-loss,final_eval_loss,final_eval_perplexity,lr,gradnorm,throughput_tokens,mfu,max_memory}"

new=""
if [ "${1:-}" = "--new" ]; then
    new=yes
    shift
elif [ $# -gt 0 ]; then
    PYTHONPATH="$root" "$python" -m peft_pretraining wandb-upload --tracker trackio "$@"
elif ! "$python" -c 'import trackio; trackio.Api().runs("SLTrain")' 2>/dev/null; then
    echo "dashboard: no run is recorded yet; training the quickstart (--new trains another one)"
    new=yes
fi

# A browser opens by itself where there is a screen; elsewhere the address is for the reader. The page would be empty before the
# first run is recorded.
show='
import os, sys, time, trackio
while not list(trackio.utils.TRACKIO_DIR.glob("SLTrain.db")):
    time.sleep(1)
screen = sys.platform == "darwin" or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
trackio.show(project="SLTrain", open_browser=screen)
'
if [ -z "$new" ]; then
    exec "$python" -c "$show"
fi
"$python" -c "$show" &
server=$!
trap 'kill "$server" 2>/dev/null || true' EXIT
bash "$scripts/quickstart.sh" --tracker trackio "$@"
echo "dashboard: stays open until Ctrl-C"
wait "$server"
