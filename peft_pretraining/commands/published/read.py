"""Reads and checks the folder of a published checkpoint, without running code from its pickles."""

from __future__ import annotations

import json
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from peft_pretraining.config.files import lfs_reason, read_text
from peft_pretraining.export.shards import INDEX, SINGLE
from peft_pretraining.methods import METHODS

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
CONFIG, SLTRAIN, RELORA = "config.json", "splora_config.json", "relora_config.json"
OPTIMIZER, STATE = "optimizer.pt", "training_state.json"
_WRAPPERS = ("module.", "_orig_mod.", "wrapped_model.")
# A checkpoint's name has eight digits.
_LARGEST_STEP = 10**8 - 1


class PublishedError(ValueError):
    """A published checkpoint that is missing, incomplete, or cannot be converted."""


class NeedsCode(PublishedError):
    """A pickle that needs code to be run for loading."""


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A published checkpoint.

    method: sltrain | relora | lowrank (ReLoRA without dense weights) | full (also GaLore's checkpoints).
    tensors: on the CPU, by their names in the LLaMA, without prefixes of wrappers.
    settings: the content of splora_config.json or relora_config.json; r, lora_alpha and sp_ratio have been checked.
    optimizer: the content of optimizer.pt, or None; `moments_problem` is then the reason.
    update_step, tokens_seen: None if not recorded.
    """

    folder: Path
    method: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] | None = None
    moments_problem: str | None = None
    update_step: int | None = None
    tokens_seen: int | None = None

    @property
    def by_relora(self) -> bool:
        """Whether ReLoRA's program wrote the checkpoint; its names and order of factors differ from SLTrain's."""
        method = METHODS[self.method]
        return method.replaces_linears and not method.sparse

    @property
    def trained_scaling(self) -> bool:
        """Whether the scale of B A is trained (tanh of a tensor); splora_config.json does not record it."""
        return any(name.endswith(".scaling") for name in self.tensors)


def read_published(folder: Path) -> PublishedCheckpoint:
    """Reads the folder of one checkpoint (published name: model_XXXX).

    Raises:
        PublishedError: files are missing, damaged, need code to be run, or contradict each other.
    """
    files = _weight_files(folder)
    if not (folder / CONFIG).is_file():
        raise PublishedError(f"{folder}: has no {CONFIG}; copy it from the original checkpoint")
    tensors = _plain_names([item for file in files for item in _read_weights(file).items()], folder)
    method, settings = _method(folder, tensors)
    optimizer, problem = _read_optimizer(folder / OPTIMIZER)
    counts = {**_counts(folder / OPTIMIZER, optimizer or {}), **_counts(folder / STATE, _read_json(folder / STATE))}
    return PublishedCheckpoint(
        folder, method, tensors, settings, optimizer, problem, counts.get("update_step"), counts.get("tokens_seen")
    )


def load_pickle(path: Path) -> Any:
    """Loads a file of torch.save that holds only tensors in plain containers; tensors are on the CPU.

    Raises:
        NeedsCode: the file holds other objects, whose code is not run.
        PublishedError: the file cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        # Damaged files raise many types of error.
        named = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if named or "reduce" in str(error):
            code = named[1] if named else "a function"
            raise NeedsCode(
                f"{path}: loading it would run code ({code}), which is refused; load the file with the published program "
                f"and save its tensors with safetensors.torch.save_file as {SINGLE}"
            ) from None
        reason = (str(error).splitlines() or [""])[0][:200]
        reason = f"cannot be read ({type(error).__name__}: {reason}); damaged, or not a file of torch.save; copy it again"
        raise PublishedError(f"{path}: {lfs_reason(path, reason)}") from None


def _weight_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise PublishedError(f"--published {folder}: no such folder")
    for single, index in ((SINGLE, INDEX), (BIN, BIN_INDEX)):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            try:
                shards = {Path(file).name for file in _read_json(folder / index)["weight_map"].values()}
            except (KeyError, TypeError, AttributeError) as error:
                raise PublishedError(f"{folder / index}: not an index of weights ({error!r}); copy it again") from None
            return [folder / name for name in sorted(shards)]
    checkpoints = sorted(path.name for path in folder.glob("model_*") if path.is_dir())
    hint = f"; name a checkpoint in it: {', '.join(checkpoints[:5])}" if checkpoints else ""
    raise PublishedError(f"--published {folder}: holds neither {SINGLE} nor {BIN}{hint}")


def _read_weights(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise PublishedError(f"{file}: no such file, but the index beside it lists it; copy it too")
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            reason = lfs_reason(file, f"cannot be read ({error}), damaged; copy it again")
            raise PublishedError(f"{file}: {reason}") from None
    loaded = load_pickle(file)
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in loaded.items()
    ):
        raise PublishedError(f"{file}: must hold tensors by name, as save_pretrained writes them")
    return loaded


def _plain_names(items: list[tuple[str, Tensor]], folder: Path) -> dict[str, Tensor]:
    """Tensors by name, without the prefixes of wrappers such as DistributedDataParallel. Raises PublishedError."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in items:
        plain = name
        while (prefix := next((wrapper for wrapper in _WRAPPERS if plain.startswith(wrapper)), None)) is not None:
            plain = plain.removeprefix(prefix)
        if plain in tensors:
            raise PublishedError(f"{folder}: holds {plain} twice, once as {name}; remove one of them")
        tensors[plain] = tensor
    return tensors


def _method(folder: Path, tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """The method and its checked settings. Raises PublishedError."""
    names = [name for name in (SLTRAIN, RELORA) if (folder / name).is_file()]
    if len(names) == 2:
        raise PublishedError(f"{folder}: has both {SLTRAIN} and {RELORA}; remove the one that does not belong to these weights")
    if not names:
        factor = next((name for name in tensors if ".lora_" in name or name.endswith(".sparse_value")), None)
        if factor is not None:
            raise PublishedError(
                f"{folder}: holds {factor} but neither {SLTRAIN} nor {RELORA}, which hold rank and alpha; copy that file too"
            )
        return "full", {}
    settings = _read_json(folder / names[0])
    problems = _setting_problems(settings, sparse=names[0] == SLTRAIN)
    if settings.get("trainable_scaling") is True and not any(name.endswith(".scaling") for name in tensors):
        problems.append("trainable_scaling true: but the weights have no `scaling`; copy all weights, or set it to false")
    if settings.get("quantize"):
        problems.append(
            f"quantize {settings['quantize']!r}: frozen weights of 4 or 8 bits are not supported; dequantise them first"
        )
    if problems:
        raise PublishedError(f"{folder / names[0]}: {'; '.join(problems)}")
    if names[0] == SLTRAIN:
        return "sltrain", settings
    layers = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return ("relora" if any(f"{layer}.weight" in tensors for layer in layers) else "lowrank"), settings


def _setting_problems(settings: Mapping[str, Any], *, sparse: bool) -> list[str]:
    problems = []
    if type(settings.get("r")) is not int or settings["r"] < 1:
        problems.append(f"r {settings.get('r')!r}: must be a whole number of at least 1")
    if not 0 < _number(settings.get("lora_alpha")) < math.inf:
        problems.append(f"lora_alpha {settings.get('lora_alpha')!r}: must be a number above 0")
    if sparse and not 0 < _number(settings.get("sp_ratio")) < 1:
        problems.append(f"sp_ratio {settings.get('sp_ratio')!r}: must lie strictly between 0 and 1")
    return problems


def _number(value: Any) -> float:
    """The value as a float; NaN if it is not a number."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if usable else math.nan


def _read_optimizer(path: Path) -> tuple[Mapping[str, Any] | None, str | None]:
    """Returns the content of optimizer.pt, or None and why it was not read. Raises PublishedError if the file is damaged."""
    if not path.is_file():
        return None, f"the checkpoint has no {OPTIMIZER}"
    try:
        loaded = load_pickle(path)
    except NeedsCode as error:
        # GaLore's projectors are objects of its own class.
        return None, str(error).partition(";")[0]
    except PublishedError as error:
        raise PublishedError(f"{error}, or move the file away to import the weights alone") from None
    if not isinstance(loaded, dict) or not isinstance(loaded.get("optimizer"), dict):
        raise PublishedError(f"{path}: holds no state under `optimizer`; move the file away to import the weights alone")
    return loaded, None


def _read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; {} if the file does not exist. Raises PublishedError."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise PublishedError(f"{path}: cannot be read ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise PublishedError(f"{path}: must hold a JSON object, not a {type(content).__name__}")
    return content


def _counts(path: Path, values: Mapping[str, Any]) -> dict[str, int]:
    """update_step and tokens_seen, if the file has them. Raises PublishedError for values out of range."""
    counts = {}
    for name, largest in (("update_step", _LARGEST_STEP), ("tokens_seen", 2**63 - 1)):
        if name not in values:
            continue
        if type(values[name]) is not int or not 0 <= values[name] <= largest:
            raise PublishedError(f"{path}: {name} {values[name]!r}: must be a whole number from 0 to {largest}")
        counts[name] = values[name]
    return counts
