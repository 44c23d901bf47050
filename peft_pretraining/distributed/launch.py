"""Starts torchrun with time to save: `python -m peft_pretraining.distributed.launch [torchrun's arguments] PROGRAM [arguments]`.

Unlike plain torchrun it passes SIGUSR1 on, leaves a SIGHUP that is ignored (nohup) ignored, and ends without a traceback after a
signal.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from peft_pretraining.distributed.world import LAUNCHED, World, stop_signals

# Seconds that processes have to save after a signal (torchrun's default: 30), and a new address store at each restart, because in
# a reused one processes can read addresses of the previous start.
_ENVIRONMENT = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", LAUNCHED: "1"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs torchrun; returns the exit code: 0 done, 1 a process failed or a signal ended the run (stopped.json tells which)."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.run import main as torchrun

    signals = ",".join(number.name for number in stop_signals())
    try:
        torchrun(["--signals-to-handle", signals, *(sys.argv[1:] if argv is None else argv)])
    except SignalException:
        # The processes have ended and have said why.
        return 1
    return 0


def torchrun_ignores_nohup(world: World) -> str | None:
    """Returns a notice if torchrun was started by nohup and handles SIGHUP all the same; None otherwise.

    The shell names the command that it started in the variable `_`. torchrun's handler hides from its processes that SIGHUP was
    ignored.
    """
    by_nohup = os.path.basename(os.environ.get("_", "")) == "nohup" and "TORCHELASTIC_RUN_ID" in os.environ
    if not by_nohup or not world.is_main or signal.SIGHUP not in stop_signals():
        return None
    return (
        "torchrun handles SIGHUP even under nohup: a closed terminal stops the run, which saves; to train on, start torchrun "
        "with --signals-to-handle SIGTERM,SIGINT,SIGQUIT,SIGUSR1, or start a recipe in scripts/"
    )


if __name__ == "__main__":
    sys.exit(main())
