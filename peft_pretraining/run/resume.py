"""Collects the state of a run for a checkpoint, and restores a run from a checkpoint."""

from __future__ import annotations

import random
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_pretraining.checkpoint import step_folder as checkpoint
from peft_pretraining.config.arguments import Arguments, ConfigError
from peft_pretraining.data.lanes import LaneState
from peft_pretraining.data.loader import TrainLoader, merge_states
from peft_pretraining.distributed.parallel import stored_parts
from peft_pretraining.distributed.world import World, gather_objects
from peft_pretraining.model.llama import both_spellings
from peft_pretraining.optim.state import load_optimizer_state, optimizer_state
from peft_pretraining.optim.updates import Updates
from peft_pretraining.plan.plan import Plan
from peft_pretraining.plan.schedule import is_finished
from peft_pretraining.record.summary import read_metrics
from peft_pretraining.training.update import TrainState
from sparse_lora import ReLoRALinear

_MODEL, _OPTIMIZER, _RANDOM = "model/", "optimizer/", "random/"
# Gradient norms kept by --grad_norm_growth, one per parameter in the model's order.
_GROWTH = "growth/previous_norms"


@dataclass(frozen=True)
class RunParts:
    """The parts of a run that have a state: model, optimizer, data loader and counters."""

    model: nn.Module
    updates: Updates
    loader: TrainLoader
    state: TrainState


def run_content(run_folder: Path, parts: RunParts, world: World, run_document: Mapping[str, Any]) -> checkpoint.Content:
    """Returns the content of a checkpoint of the run's current state. Its tensors are the run's, not copies.

    Every process calls it.
    """
    tensors = _model_tensors(parts.model)
    moments = optimizer_state(parts.updates, dict(parts.model.named_parameters()))
    tensors |= {f"{_OPTIMIZER}{name}": tensor for name, tensor in moments.shared.items()}
    own = {f"{_OPTIMIZER}{name}": tensor for name, tensor in moments.own.items()}
    if parts.updates.growth is not None:
        tensors[_GROWTH] = parts.updates.growth.previous
    own |= {f"{_RANDOM}{world.rank}/{name}": tensor for name, tensor in _random_states().items()}
    data = merge_states(gather_objects(parts.loader.state_dict(), world))
    if world.is_main:
        parts.loader.warn_of_uneven_passes(data["lanes"])
    documents = {
        "state.json": {
            "train": asdict(parts.state),
            "optimizer": moments.scalars,
            "data": data,
            "processes": world.size,
        },
        "config.json": both_spellings(parts.model.config.to_diff_dict()),  # type: ignore[union-attr, operator]
        "run.json": dict(run_document),
    }
    folders = {"tokenizer": run_folder / "tokenizer"}
    return checkpoint.Content(parts.state.update_step, tensors, documents, folders, own)


def belongs_to(path: Path, run_folder: Path) -> bool:
    """Whether a checkpoint is the run's own: it lies in the run's folder, or a link there leads to one with the run's id."""
    if path.resolve().parent == run_folder.resolve():
        return True
    record = run_folder / "run.json"
    if path.parent.resolve() != run_folder.resolve() or not record.is_file():
        return False
    try:
        return bool(checkpoint.read_json(record)["wandb_id"] == checkpoint.read_json(path / "run.json")["wandb_id"])
    except (checkpoint.CheckpointError, KeyError, TypeError):
        return True


def finished_state(run_folder: Path, path: Path | None, args: Arguments, plan: Plan) -> TrainState | None:
    """Returns the state of the checkpoint `path` if the run is finished, last evaluation included; otherwise None.

    It opens no data, builds no model and uses no network. If --dataset differs the result is None, because comparing data
    requires opening them.
    """
    if path is None or not belongs_to(path, run_folder):
        return None
    if checkpoint.read_json(path / "run.json")["arguments"].get("dataset") != args.dataset:
        return None
    state = train_state(path)
    evaluated = any(row.get("update_step") == state.update_step for row in read_metrics(run_folder) if "final_eval_loss" in row)
    return state if evaluated and is_finished(plan, state.update_step, state.tokens_seen) else None


def refuse_if_finished(path: Path, plan: Plan) -> None:
    """Raises ConfigError if the full-rank checkpoint `path` already has all of the plan's updates."""
    state = train_state(path)
    if is_finished(plan, state.update_step, state.tokens_seen):
        raise ConfigError(
            [
                f"--warmed_up_model {path}: its {state.update_step:,} updates count towards --num_training_steps "
                f"{plan.num_training_steps}, which leaves none for ReLoRA; raise --num_training_steps, or name an earlier "
                "checkpoint"
            ]
        )


def train_state(path: Path) -> TrainState:
    """Reads the counters (updates, tokens, ...) of the checkpoint `path`. Raises CheckpointError."""
    try:
        state = TrainState(**checkpoint.read_json(path / "state.json")["train"])
        _check_counts(asdict(state).values())
    except (KeyError, TypeError, ValueError) as error:
        raise checkpoint.CheckpointError(f"{path / 'state.json'}: not the state of a run ({error!r})") from None
    return state


def restore_data(path: Path, loader: TrainLoader) -> None:
    """Sets the loader to the data position of the checkpoint `path`; call it before the first batch. Raises CheckpointError."""
    try:
        state = checkpoint.read_json(path / "state.json")["data"]
        _check_counts([state["position"], *state["bad_records"].values(), *state.get("corpus", {}).values()])
        for numbers in state["lanes"].values():
            for each in numbers if "sources" in state else [numbers]:
                _check_counts([*LaneState(*each[:5]), *each[5:]])
        for source in state.get("sources", ()):
            _check_counts([source["tokens"], *source["bad_records"].values(), *(source["corpus"] or {}).values()])
        record = checkpoint.read_json(path / "run.json")
        loader.load_state_dict(state, (record["arguments"]["dataset"], record["dataset"]["fingerprint"]))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise checkpoint.CheckpointError(f"{path}: its data position cannot be restored: {error}") from None


def _check_counts(values: Iterable[Any]) -> None:
    """Raises ValueError unless every value is a count; a wrong one would otherwise fail much later, when data is read."""
    for value in values:
        if type(value) is not int or not 0 <= value < 2**63:
            raise ValueError(f"{value!r} is not a count")


def restore_run(path: Path, parts: RunParts, world: World, warm_start: bool = False) -> None:
    """Restores newly built parts from the checkpoint `path`, except the data position (see `restore_data`).

    warm_start: the checkpoint is a full-rank run's; the model's factors and the moments keep their initial values.
    Each rank restores its random states; a rank that is not in the checkpoint keeps its initial ones.

    Raises:
        CheckpointError: the checkpoint cannot be read or belongs to another model.
    """
    document = checkpoint.read_json(path / "state.json")
    index = checkpoint.tensor_index(path)
    factors = _factors(parts.model) if warm_start else frozenset()
    checkpoint.load_tensors(path, _model_tensors(parts.model, without=factors))
    if not warm_start:
        _restore_moments(path, parts, index, document, world)
    # A run that adds --grad_norm_growth later starts without earlier norms.
    if parts.updates.growth is not None and _GROWTH in index and not warm_start:
        checkpoint.load_tensors(path, {_GROWTH: parts.updates.growth.previous})
    states = {
        name: torch.empty(size, dtype=dtype)
        for name, (size, dtype) in index.items()
        if name.startswith(f"{_RANDOM}{world.rank}/")
    }
    checkpoint.load_tensors(path, states)
    try:
        _set_random_states({name.rsplit("/", 1)[1]: tensor for name, tensor in states.items()})
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise checkpoint.CheckpointError(f"{path}: its random states cannot be restored ({error})") from None
    state = train_state(path)
    for name, value in asdict(state).items():
        setattr(parts.state, name, value)


def _model_tensors(model: nn.Module, without: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """Returns the tensors that a checkpoint holds of a model, by their names there, without those of some parameters."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name not in without:
            tensors |= stored_parts(f"{_MODEL}{name}", tensor)
    return tensors


def _factors(model: nn.Module) -> frozenset[str]:
    """Returns the names of the parameters that ReLoRA adds to a full-rank model."""
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, ReLoRALinear))
    added = ("lora_A", "lora_B", "scaling")
    return frozenset(f"{name}.{key}" for name, layer in layers for key, _ in layer.named_parameters() if key in added)


def _restore_moments(path: Path, parts: RunParts, index: Mapping[str, Any], document: Any, world: World) -> None:
    saved = {name.removeprefix(_OPTIMIZER): entry for name, entry in index.items() if name.startswith(_OPTIMIZER)}

    def read(tensors: dict[str, torch.Tensor]) -> None:
        checkpoint.load_tensors(path, {f"{_OPTIMIZER}{name}": tensor for name, tensor in tensors.items()})

    try:
        requantised = load_optimizer_state(
            parts.updates, dict(parts.model.named_parameters()), saved, document["optimizer"], read
        )
    except checkpoint.CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise checkpoint.CheckpointError(f"{path}: its optimizer state does not fit this run ({error})") from None
    if requantised and world.is_main:
        print(
            f"{path.name}: its moments were saved by {document['processes']} processes, or by a version that quantised fewer of "
            "them; they are read as plain numbers, divided and quantised again, which changes them by up to their rounding",
            file=sys.stderr,
        )


def _random_states() -> dict[str, torch.Tensor]:
    """Returns the states of this process's global generators; data order and initial values use generators of their own."""
    _, words, _ = random.getstate()
    states = {"torch": torch.get_rng_state(), "python": torch.tensor(words, dtype=torch.int64)}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: Mapping[str, torch.Tensor]) -> None:
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "python" in states:
        random.setstate((3, tuple(states["python"].tolist()), None))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
