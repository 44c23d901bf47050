"""Reads and writes named tensors in transformers' layout: safetensors shards of a bounded size, and their index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peft_pretraining.config.files import lfs_reason

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class ExportError(ValueError):
    """An export that is missing, incomplete, or does not fit its configuration."""


class ShardWriter:
    """Writes tensors into shards one by one; keeps at most one shard in memory."""

    def __init__(self, folder: Path, max_bytes: int):
        """max_bytes: largest size of a shard; a larger tensor gets its own shard."""
        self._folder, self._max_bytes = folder, max_bytes
        self._waiting: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self.num_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Adds a CPU tensor, which must not change until its shard is written. Raises OSError."""
        waiting_bytes = sum(waiting.nbytes for waiting in self._waiting.values())
        if self._waiting and waiting_bytes + tensor.nbytes > self._max_bytes:
            self._flush()
        self._waiting[name] = tensor.detach().contiguous()
        self.num_bytes += tensor.nbytes

    def close(self) -> None:
        """Writes the last shard and the index, and renames the shards to their final names. Raises OSError."""
        self._flush()
        if len(self._shards) == 1:
            self._partial(0).rename(self._folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            final = f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"
            self._partial(number).rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
        (self._folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    def _partial(self, number: int) -> Path:
        return self._folder / f"shard-{number}.partial"

    def _flush(self) -> None:
        file = self._partial(len(self._shards))
        try:
            save_file(self._waiting, file, metadata={"format": "pt"})
            # Safetensors makes files readable by their owner only.
            file.chmod(0o644)
        except SafetensorError as error:
            # Safetensors raises it when the disk is full.
            raise OSError(f"{self._folder}: cannot be written ({error})") from None
        self._shards.append(list(self._waiting))
        self._waiting = {}


def read_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills the given tensors in place from a folder's files, converting dtypes where they differ.

    Raises:
        ExportError: a tensor is missing or has another shape (up to five are named), or a file is missing or damaged.
    """
    files = tensor_files(folder)
    problems = [f"{name} is missing" for name in tensors if name not in files]
    for file in sorted({files[name] for name in tensors if name in files}):
        try:
            with safe_open(str(file), framework="pt") as opened:
                for name in (name for name in opened.keys() if name in tensors):  # noqa: SIM118 (no mapping)
                    shape = tuple(opened.get_slice(name).get_shape())
                    if shape != tuple(tensors[name].shape):
                        problems.append(f"{name} has shape {shape}, expected {tuple(tensors[name].shape)}")
                        continue
                    with torch.no_grad():
                        tensors[name].copy_(opened.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise ExportError(f"{file}: {lfs_reason(file, f'cannot be read ({error})')}") from None
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ExportError(f"{folder} does not fit its own configuration: {'; '.join(problems[:5])}{more}")


def tensor_files(folder: Path) -> dict[str, Path]:
    """Maps each tensor name to the file that holds it. Raises ExportError."""
    single, index = folder / SINGLE, folder / INDEX
    try:
        if single.exists():
            with safe_open(str(single), framework="pt") as opened:
                return dict.fromkeys(opened.keys(), single)
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): folder / Path(file).name for name, file in weight_map.items()}
    except FileNotFoundError:
        raise ExportError(f"{folder} holds no weights: neither {SINGLE} nor {INDEX}") from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        file = single if single.exists() else index
        raise ExportError(f"{file}: {lfs_reason(file, f'the weights cannot be read ({error})')}") from None
    return files


# Named unlike config.json: transformers would otherwise load a factored export as a dense model with random weights.
LLAMA_CONFIG, FACTORS_CONFIG = "llama_config.json", "sltrain_config.json"
