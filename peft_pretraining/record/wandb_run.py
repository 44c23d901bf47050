"""Opens the run at wandb and sends rows to it; failures of wandb are warnings and never stop or block training.

wandb's environment variables apply wherever no flag says otherwise, and a line says so where one does.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WANDB_PROJECT = "SLTrain"
# Seconds to wait for wandb's server before the run is recorded offline.
_WANDB_TIMEOUT_S = 20
# Each names a single run.
OF_ONE_RUN = ("WANDB_RUN_ID", "WANDB_NAME")
# Keys that are logged once, or zero in most runs: the first go to the run's summary, the others appear once they are not zero.
ONCE, _USUALLY_ZERO = "memory_", ("bad_records", "skipped_updates")


def one_line(error: BaseException) -> str:
    """Returns an error's type and message on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _has_wandb_key() -> bool:
    """Tells whether an API key is available, in the environment or stored by `wandb login` in the netrc file."""
    from requests.utils import get_netrc_auth

    return bool(os.environ.get("WANDB_API_KEY")) or any(get_netrc_auth(url) for url in _wandb_servers())


def _wandb_servers() -> list[str]:
    """Returns the servers whose netrc entry wandb reads: the configured server, or its defaults now and in earlier versions."""
    if url := os.environ.get("WANDB_BASE_URL"):
        return [url if "://" in url else f"https://{url}"]
    try:
        import wandb

        return [wandb.Settings().base_url, "https://api.wandb.ai"]
    except Exception:
        # Wandb is missing or broken; start_wandb reports it.
        return ["https://api.wandb.ai"]


def from_environment(variable: str, flag: str, given: str | None, default: str | None = None) -> str | None:
    """Returns a flag's value, else the environment variable's, else the default; a notice says that the flag wins."""
    value = os.environ.get(variable, "").strip() or None
    if given is not None and value not in (None, given):
        print(f"notice: {variable}={value} has no effect: {flag} {given}", file=sys.stderr)
    return given or value or default


def wandb_mode(flag: str) -> str:
    """Returns --wandb as online, offline or disabled; "auto" follows WANDB_DISABLED, WANDB_MODE, and whether there is a key."""
    name = "WANDB_DISABLED"
    if os.environ.get(name, "").lower() in ("1", "true", "yes", "on"):
        wanted = "disabled"
    else:
        name = "WANDB_MODE"
        wanted = os.environ.get(name, "").strip().lower()
        wanted = {"dryrun": "offline", "run": "online"}.get(wanted, wanted)
        if wanted not in ("", "online", "offline", "shared", "disabled"):
            print(f"notice: {name}={wanted} has no effect: it is none of online, offline, disabled", file=sys.stderr)
            wanted = ""
    if flag != "auto":
        if wanted not in ("", flag):
            print(f"notice: {name}={os.environ[name]} has no effect: --wandb {flag}", file=sys.stderr)
        return flag
    if wanted or _has_wandb_key():
        return wanted or "online"
    print("wandb: no key found, recording offline (--wandb disabled turns it off)", file=sys.stderr)
    return "offline"


def start_wandb(run_folder: Path, settings: Mapping[str, Any]) -> Any:
    """Returns the wandb run, or None if wandb is disabled or fails, which prints one warning.

    settings: mode (auto, online, offline, disabled), id, name, tags, config and optionally group, and place (the run folder's
    later name).
    """
    mode = wandb_mode(settings["mode"])
    if mode == "disabled":
        return None
    if mode != "offline":
        try:
            return open_wandb(run_folder, settings, mode)
        except Exception as error:
            print(f"warning: wandb cannot be reached ({one_line(error)}); recording offline", file=sys.stderr)
            with contextlib.suppress(Exception):
                import wandb

                # wandb's service process still has the run's id registered.
                wandb.teardown()
    try:
        return open_wandb(run_folder, settings, "offline", earlier_starts_ended=True)
    except Exception as error:
        print(f"warning: wandb is off ({one_line(error)}); all metrics are still written to metrics.jsonl", file=sys.stderr)
        return None


def wandb_folder(run_folder: Path) -> Path:
    """Returns the folder below which wandb writes its folder `wandb`: $WANDB_DIR, created if missing, or the run's folder."""
    given = os.environ.get("WANDB_DIR", "").strip()
    if not given:
        return run_folder
    folder = Path(given).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"notice: WANDB_DIR={given} has no effect: {error.strerror}; using {run_folder}", file=sys.stderr)
        return run_folder
    return folder


def open_wandb(
    run_folder: Path,
    settings: Mapping[str, Any],
    mode: Any,
    *,
    limit_s: int | None = 3 * _WANDB_TIMEOUT_S,
    earlier_starts_ended: bool = False,
) -> Any:
    """Opens the run in a mode of wandb's, and prints its address or its folder. Raises whatever wandb raises.

    settings: as for `start_wandb`. limit_s: how long the end may wait for the network; None waits until everything is sent.
    earlier_starts_ended: True if no other process still writes wandb's files of this run; an incomplete record at the end of a
    file, left by a kill, is then removed.
    """
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    # wandb refuses to start where the variable has a value that it does not know, such as OFFLINE, whatever mode is given.
    if "WANDB_MODE" in os.environ:
        os.environ["WANDB_MODE"] = mode
    limits: dict[str, Any] = {"login_timeout": _WANDB_TIMEOUT_S}
    limits |= {} if "WANDB_INIT_TIMEOUT" in os.environ else {"init_timeout": _WANDB_TIMEOUT_S}
    # Without a limit the end of the run would wait for a lost network.
    if limit_s is not None and "finish_timeout" in getattr(wandb.Settings, "model_fields", ()):
        limits["finish_timeout"] = limit_s
    folder = wandb_folder(run_folder)
    if earlier_starts_ended and settings["id"] is not None:
        from peft_pretraining.record.wandb_files import cut_incomplete

        cut_incomplete(folder / "wandb", settings["id"])
    resume: Any = os.environ.get("WANDB_RESUME") or "allow"
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
        mode=mode,
        dir=folder,
        id=settings["id"],
        name=settings["name"],
        tags=settings["tags"] or None,
        config=dict(settings["config"]),
        group=os.environ.get("WANDB_RUN_GROUP") or settings.get("group"),
        job_type=os.environ.get("WANDB_JOB_TYPE") or "train",
        resume=None if mode == "offline" else resume,
        settings=wandb.Settings(**limits),
    )
    # With update_step as the x-axis, updates repeated after a resume are kept instead of dropped as out of order.
    run.define_metric("update_step")
    run.define_metric("*", step_metric="update_step")
    run.define_metric("final_eval_perplexity", step_metric="update_step", summary="min,last")
    if url := getattr(run, "url", None):
        print(f"wandb: {url}", file=sys.stderr)
    else:
        place = settings.get("place", folder) if folder == run_folder else folder
        print(f"wandb: recording offline in {place / 'wandb'} (`wandb sync` uploads it)", file=sys.stderr)
    return run


def wandb_settings(document: Mapping[str, Any], run_folder: Path) -> dict[str, Any]:
    """Returns the settings of `start_wandb` for a run's run.json, without the mode."""
    arguments = document["arguments"]
    tags = from_environment("WANDB_TAGS", "--tags", arguments.get("tags")) or ""
    model = (document["plan"].get("model") or {}).get("name")
    return {
        "id": document.get("wandb_id"),
        "name": from_environment("WANDB_NAME", "--name", arguments.get("name"), run_folder.resolve().name),
        "tags": [tag.strip() for tag in tags.split(",") if tag.strip()],
        "config": wandb_config(document),
        "group": f"{model}-{arguments.get('peft_model')}",
    }


def wandb_config(document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what wandb shows as a run's configuration: run.json, and beside it the published programs' keys, not nested.

    Those are every argument under its name, with values as resolved by the plan, and max_lr, total_params_M, model, world_size,
    device. `dataset` is then the argument; the data's description and fingerprint are under `data`.
    """
    arguments, plan = document.get("arguments") or {}, document.get("plan") or {}
    total = (plan.get("parameters") or {}).get("total")
    device = str(arguments.get("device") or "auto")
    gpu = device == "cuda" or (device == "auto" and (document.get("machine") or {}).get("gpu") is not None)
    resolved = ("batch_size", "gradient_accumulation", "total_batch_size", "dtype", "data_lanes", "eval_tokens", "model")
    return {
        **document,
        "data": document.get("dataset"),
        **arguments,
        **{key: plan[key] for key in resolved if key in plan},
        "max_lr": arguments.get("lr"),
        "total_params_M": None if total is None else total / 1e6,
        "world_size": (document.get("world") or {}).get("processes"),
        "device": "cuda:0" if gpu else device.replace("auto", "cpu"),
    }


class WandbRun:
    """A run at wandb, as a `Tracker`."""

    name = "wandb"

    def __init__(self, run: Any):
        """run: returned by `start_wandb` or `open_wandb`."""
        self._run, self.run_name = run, str(getattr(run, "id", ""))

    def log(self, row: Mapping[str, Any]) -> None:
        """Sends a row of metrics.jsonl, values that are logged once to the run's summary."""
        if once := {key: value for key, value in row.items() if key.startswith(ONCE)}:
            self._run.summary.update(once)
        self._run.log({key: value for key, value in shown(row).items() if not key.startswith(ONCE)})

    def send_missing(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Sends the rows of the record that wandb lacks, such as the last ones before a kill; returns how many.

        Of a run at wandb's server the server tells the last row, of one that is recorded offline the files on this machine.
        """
        run = self._run
        if not rows:
            return 0
        if getattr(run, "offline", True):
            from peft_pretraining.record.wandb_files import recorded_rows

            known, last_step = recorded_rows(Path(run.settings.wandb_dir), str(run.id))
            missing = [row for row in rows if row_key(row) not in known]
            if last_step >= 0:
                # wandb numbers the rows of each folder from 0; going on from earlier ones keeps them in order at the server.
                run.log({}, step=last_step + 1, commit=False)
        else:
            missing = [row for row in rows if not _is_known(row, run.summary)]
        for row in missing:
            self.log(row)
        return len(missing)

    def finish(self, figures: Mapping[str, Any], exit_code: int = 0) -> None:
        """Writes the run's results to wandb's summary, for tables of runs and scatter plots, and ends the wandb run."""
        run = self._run
        try:
            # A run that is longer now than when it finished has a final figure there that no longer is one.
            old = [name for name, value in figures.items() if value is None and run.summary.get(name) is not None]
            run.summary.update({name: value for name, value in figures.items() if value is not None or name in old})
        finally:
            run.finish(exit_code=exit_code)


def row_key(row: Mapping[str, Any]) -> tuple[int, bool]:
    """What tells a row of the record from all others: an update and the evaluation after it have the same number."""
    return row["update_step"], "final_eval_loss" in row


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a row that a dashboard gets: not those that are missing, and counts once they are not zero."""
    return {key: value for key, value in row.items() if value is not None and not (key in _USUALLY_ZERO and value == 0)}


def _is_known(row: Mapping[str, Any], summary: Any) -> bool:
    """Whether a row is at the server, by the run's summary there, which has the last value of every key."""
    last = summary.get("update_step")
    if last is None or row["update_step"] != last:
        return last is not None and bool(row["update_step"] < last)
    # An update and an evaluation after it have the same number.
    key = "final_eval_loss" if "final_eval_loss" in row else "loss"
    return bool(summary.get(key) == row.get(key))
