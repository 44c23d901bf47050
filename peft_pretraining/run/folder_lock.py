"""Keeps two programs from training into one folder: a lock that the system releases when the process ends, however it ends."""

import errno
import os
import platform
import time
from pathlib import Path
from typing import TextIO

from peft_pretraining.config.arguments import ConfigError

LOCK_FILE = "running.lock"
# By folder; closing the file releases its lock.
_held: dict[Path, TextIO] = {}


def lock_folder(path: Path) -> None:
    """Locks a run's folder until `unlock_folders`; does nothing on systems, file systems and in folders that allow no lock.

    Processes that are forked from this one, such as workers of the data loader, do not share the lock and do not prolong it.
    Raises ConfigError: another process has locked it.
    """
    path = path.resolve()
    if path in _held:
        return
    try:
        import fcntl

        file = (path / LOCK_FILE).open("a+")
    except (ImportError, OSError):
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ConfigError(
                [f"--save_dir {path}: {holder} trains there; wait for its end or stop it, or name another --save_dir"]
            ) from None
        return
    _held[path] = file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()} (started {time.strftime('%Y-%m-%d %H:%M:%S')})\n")
    file.flush()


def unlock_folders() -> None:
    """Releases all locks of this process, for programs and notebooks that go on after a run."""
    while _held:
        _held.popitem()[1].close()
