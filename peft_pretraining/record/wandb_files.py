"""Reads which rows of a run wandb has written to this machine's disk; needed because a kill loses wandb's last rows.

wandb's file `run-ID.wandb` is a log in LevelDB's format (7 bytes of header, blocks of 32 KiB, pieces of records with CRC, length
and kind) whose records are wandb's protocol buffers.
"""

from __future__ import annotations

import glob
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _FILE_HEADER, _PIECE_HEADER = 32 * 1024, 7, 7
_FULL, _FIRST, _LAST = 1, 2, 4


def recorded_rows(folder: Path, wandb_id: str) -> tuple[set[tuple[int, bool]], int]:
    """Returns the rows in wandb's files of a run, as (update_step, whether an evaluation), and wandb's last own step (-1: none).

    folder: the one named `wandb`, with a folder for every start of the run.
    """
    known, last_step = set(), -1
    for path in _files_of(folder, wandb_id):
        for row in read_history(path):
            last_step = max(last_step, int(row.get("_step", -1)))
            if isinstance(step := row.get("update_step"), int):
                known.add((step, "final_eval_loss" in row))
    return known, last_step


def cut_incomplete(folder: Path, wandb_id: str) -> None:
    """Cuts off the record that a kill left incomplete at the end of a file: `wandb sync` would skip the run's later files.

    No process may be writing files of this run.
    """
    for path in _files_of(folder, wandb_id):
        content = path.read_bytes()
        end = max((end for end, _ in _records(content)), default=_FILE_HEADER)
        if end < len(content):
            os.truncate(path, end)


def _files_of(folder: Path, wandb_id: str) -> list[Path]:
    name = glob.escape(wandb_id)
    return sorted(folder.glob(f"*run-*-{name}/run-{name}.wandb"))


def read_history(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the logged rows of a .wandb file up to its end or its first incomplete record."""
    from wandb.proto import wandb_internal_pb2

    for _, content in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        try:
            record.ParseFromString(content)
            items = record.history.item
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
        except Exception:
            # The file was not written completely; protobuf's error class depends on its version.
            return
        if row:
            yield {"_step": record.history.step.num, **row}


def _records(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields the complete records with the positions of their ends."""
    position, record = _FILE_HEADER, b""
    while position + _PIECE_HEADER <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _PIECE_HEADER:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        start, position = position + _PIECE_HEADER, position + _PIECE_HEADER + length
        if kind == 0 or position > len(content):
            return
        record = content[start:position] if kind in (_FULL, _FIRST) else record + content[start:position]
        if kind in (_FULL, _LAST):
            yield position, record
