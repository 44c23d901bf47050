"""Opens the run at wandb; failures of wandb are warnings and never stop or block training."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WANDB_PROJECT = "SLTrain"


# Seconds to wait for wandb's server before the run is recorded offline.
_WANDB_TIMEOUT_S = 20


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _has_wandb_key() -> bool:
    """Tells whether an API key is available, in the environment or stored by `wandb login` in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    hosts = _wandb_hosts()
    for name in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        path = Path(name).expanduser() if name else None
        if path is None or not path.is_file():
            continue
        try:
            stored = netrc.netrc(path).hosts
        except (netrc.NetrcParseError, OSError):
            continue
        if hosts & set(stored):
            return True
    return False


def _wandb_hosts() -> set[str]:
    """Returns the hosts whose netrc entry wandb reads: the configured server and the default of earlier versions."""
    url = os.environ.get("WANDB_BASE_URL")
    if url:
        return {_host(url)}
    try:
        import wandb

        return {_host(wandb.Settings().base_url), "api.wandb.ai"}
    except Exception:  # wandb is missing or broken; _start_wandb reports it
        return {"api.wandb.ai"}


def _host(url: str) -> str:
    return url.split("://")[-1].split("/")[0].split(":")[0]


def _start_wandb(run_folder: Path, settings: Mapping[str, Any]) -> Any:
    """Returns the wandb run, or None if wandb is disabled or fails, which prints one warning.

    settings: mode, id, name, tags, config and optionally group.
    """
    mode = settings["mode"]
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
        if mode == "offline" and "WANDB_MODE" not in os.environ:
            print(
                f"wandb: no key found, recording offline in {run_folder / 'wandb'} (`wandb sync` uploads it; "
                "--wandb disabled turns it off)",
                file=sys.stderr,
            )
    if mode == "disabled":
        return None
    try:
        return _wandb_run(run_folder, settings, mode)
    except Exception as error:
        if mode != "online":
            print(f"warning: wandb is off ({_one_line(error)}); all metrics are still written to metrics.jsonl", file=sys.stderr)
            return None
        print(f"warning: wandb cannot be reached ({_one_line(error)}); recording offline", file=sys.stderr)
        with contextlib.suppress(Exception):
            import wandb

            # wandb's service process still has the run's id registered.
            wandb.teardown()
        return _start_wandb(run_folder, {**settings, "mode": "offline"})


def _wandb_run(run_folder: Path, settings: Mapping[str, Any], mode: Any) -> Any:
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    limits: dict[str, Any] = {"init_timeout": _WANDB_TIMEOUT_S, "login_timeout": _WANDB_TIMEOUT_S}
    # Without a limit the end of the run would wait for a lost network.
    if "finish_timeout" in getattr(wandb.Settings, "model_fields", ()):
        limits["finish_timeout"] = 3 * _WANDB_TIMEOUT_S
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
        mode=mode,
        dir=run_folder,
        id=settings["id"],
        name=settings["name"],
        tags=settings["tags"] or None,
        config=dict(settings["config"]),
        group=settings.get("group"),
        job_type="train",
        resume="allow" if mode == "online" else None,
        settings=wandb.Settings(**limits),
    )
    # With update_step as the x-axis, updates repeated after a resume are kept instead of dropped as out of order.
    run.define_metric("update_step")
    run.define_metric("*", step_metric="update_step")
    run.define_metric("final_eval_perplexity", step_metric="update_step", summary="min,last")
    return run
