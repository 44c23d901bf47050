"""The host never waits for the device during an update or between two updates, so that a GPU always has work queued.

The host waits for a GPU if an operator returns a value, or a shape that depends on values, to the host: float(loss), x[x > 0].
torch tags these operators, so a run on the CPU detects them. The "meta" device replaces a GPU in some tests: its tensors have no
values, and an operator that needs one fails.
"""

import contextlib
import itertools
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import torchrun_main
from peft_pretraining.config.model_config import ModelConfig, load_model_config
from peft_pretraining.config.parameter_groups import group_of
from peft_pretraining.data.loader import Batch
from peft_pretraining.distributed.world import World
from peft_pretraining.model.llama import build_model
from peft_pretraining.model.loss import TokenLoss
from peft_pretraining.optim.build import build_optimizer
from peft_pretraining.optim.updates import GrowthLimit, PerLayerUpdate, WholeUpdate
from peft_pretraining.record import recorder
from peft_pretraining.run import assemble
from peft_pretraining.training.update import StepResult, train_step
from sparse_lora import SLTrainConfig, SparseLowRankLinear, reparameterize
from sparse_lora.cache import WeightCache, cache_positions

ROOT = Path(__file__).resolve().parents[2]
WAITING_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class WaitRecorder(TorchDispatchMode):
    """Records the operators at which the host would wait for a GPU, and whether each copy between devices is asynchronous."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.copies_without_waiting: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if WAITING_TAGS & set(func.tags) and not _indexes_by_position(func, args):
            self.waits.append(str(func))
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.device != args[0].device:
            self.copies_without_waiting.append(bool((kwargs or {}).get("non_blocking")))
        return result


def _indexes_by_position(func, args) -> bool:
    """Returns True for x[positions], whose shape is known; the shape of x[mask] depends on the values of the mask."""
    indices = [index for index in args[1] if index is not None] if func is torch.ops.aten.index.Tensor else []
    return bool(indices) and all(index.dtype == torch.int64 for index in indices)


def tiny() -> ModelConfig:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return replace(load_model_config(ROOT / "configs" / "llama_9m.json"), vocab_size=331, num_key_value_heads=4, **small)


def padded_batches() -> list[Batch]:
    """Returns two micro-batches of three sequences of 16 tokens; one sequence of the second has only 9 tokens."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for length in (16, 9):
        ids = torch.randint(2, 331, (3, 16), generator=generator)
        labels = ids.clone()
        labels[1, length:] = -100
        batches.append(Batch(ids, labels, 32 + length, 29 + length))
    return batches


@pytest.mark.parametrize("read", [lambda x: float(x), lambda x: bool(x > 0), lambda x: torch.nonzero(x), lambda x: x[x > 0]])
def test_the_recorder_detects_the_usual_ways_to_read_a_value(read):
    with WaitRecorder() as recorder:
        read(torch.ones(()))
    assert recorder.waits


def test_an_update_never_waits_for_the_device():
    """With fused AdamW, clipping and a growth limit. The first update, which allocates the moments, is not tested."""
    settings = SLTrainConfig(rank=4, sparsity=0.1, alpha=8.0)
    model = build_model(
        tiny(),
        dtype=torch.float32,
        device="cpu",
        seed=3,
        reparameterize=lambda model: reparameterize(model, settings),
    )
    parameters = dict(model.named_parameters())
    updates = WholeUpdate(
        partial(build_optimizer, "adamw", lr=0.0, weight_decay=0.1),
        parameters,
        World(),
        grad_clipping=0.1,
        growth=GrowthLimit(1.01, len(parameters), torch.device("cpu")),
    )
    step = partial(train_step, TokenLoss(model), updates, lr=1e-3, world=World(), device=torch.device("cpu"))
    step(padded_batches())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with WaitRecorder() as recorder:
        step(padded_batches())
    assert recorder.waits == []
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor", "adam8bit", "muon", "stable_spam"])
def test_an_update_waits_at_most_as_often_as_documented(optimizer, per_layer):
    """Fused optimizers never: the flag that decides a step stays on the device. Others once per step, to read that flag.

    Per layer, each tensor has a step of its own, and the loss is read before the backward pass.
    """
    if optimizer == "adam8bit":
        pytest.importorskip("bitsandbytes")
    model = build_model(tiny(), dtype=torch.float32, device="cpu", seed=3)
    parameters, build = dict(model.named_parameters()), partial(build_optimizer, optimizer, lr=0.0, weight_decay=0.1)
    updates = (PerLayerUpdate if per_layer else WholeUpdate)(build, parameters, World())
    step = partial(train_step, TokenLoss(model), updates, lr=1e-3, world=World(), device=torch.device("cpu"))
    step(padded_batches())
    with WaitRecorder() as recorder:
        step(padded_batches())
    matrices = sum(group_of(name, parameter.dim()) == "matrix" for name, parameter in parameters.items())
    flags = {"adamw": 0, "sgd": 0, "muon": matrices if per_layer else 1}.get(optimizer, len(parameters) if per_layer else 1)
    assert recorder.waits == ["aten._local_scalar_dense.default"] * (flags + per_layer)


class OptimizerForMeta(torch.optim.Optimizer):
    """Replaces fused AdamW, which has no kernels for "meta": it has a state and reads `found_inf` on the device."""

    _step_supports_amp_scaling = True

    def __init__(self, params):
        super().__init__(params, {"lr": 0.0})
        self.state.update({parameter: {"step": 1} for group in self.param_groups for parameter in group["params"]})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad * (1 - self.found_inf) * group["lr"])


class FusedForMeta(OptimizerForMeta):
    """Steps all parameters by one operator, as fused AdamW does on a GPU."""

    def step(self, closure=None):
        for group in self.param_groups:
            torch._foreach_sub_(group["params"], [parameter.grad for parameter in group["params"]], alpha=group["lr"])


def test_an_update_copies_its_input_to_the_device_without_waiting_and_copies_nothing_back():
    model = build_model(tiny(), dtype=torch.bfloat16, device="meta", seed=3)
    parameters = dict(model.named_parameters())
    updates = WholeUpdate(lambda stepped: OptimizerForMeta(stepped.values()), parameters, World(), grad_clipping=1.0)
    with WaitRecorder() as recorder:
        result = train_step(TokenLoss(model), updates, padded_batches(), lr=1e-3, world=World(), device=torch.device("meta"))
    assert recorder.copies_without_waiting == [True] * 4  # ids and labels of two micro-batches
    assert (result.num_tokens, result.num_bad_records) == (89, 0)
    assert result.loss.is_meta
    with pytest.raises(RuntimeError):
        float(result.loss)


# Operators that launch nothing on a GPU, besides views.
ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "_unsafe_view"}


class LaunchCounter(TorchDispatchMode):
    """Counts the operators that would launch a kernel on a GPU; a few of them launch two or three."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.launches += not (func.is_view or func.overloadpacket.__name__ in ALLOCATIONS)
        return func(*args, **(kwargs or {}))


# Decoding the positions of a uniform support: bytes to numbers, three kinds of gaps, and their sums.
DECODING = 11


@pytest.mark.parametrize(
    ("support", "path", "forward", "backward"),
    [
        # B scaled, W = B A, x W^T; again B scaled and W, dx, dW, dA, dB
        ("none", "materialised", 3, 6),
        # B scaled, x A^T, and its product with B; B scaled, G B, dx, dA, dB
        ("none", "factored", 3, 5),
        # also S added to W; S added again, and the values' gradient
        ("uniform", "materialised", 3 + DECODING + 1, 6 + DECODING + 2),
        # also S as a zero matrix, filled, and its product; the same again, then G^T x and the values' gradient
        ("uniform", "factored", 3 + DECODING + 3, 5 + DECODING + 5),
        # blocks of two shapes
        ("block", "materialised", 3 + 2, 6 + 2 + 2),
        # products of blocks of two shapes, inputs and outputs in order
        ("block", "factored", 3 + 7, 5 + 6),
    ],
)
def test_a_linear_launches_few_kernels(support, path, forward, backward):
    """nn.Linear: 1 and 2."""
    launches = launches_of_a_linear(large_linear(support, path), 16_384)
    assert (launches[0] <= forward, launches[1] <= backward) == (True, True), launches


@pytest.mark.parametrize(
    ("path", "kept", "forward", "backward"),
    [
        # B scaled, W = B A, S added, x W^T; B scaled, W, S added, dx, dW, dA, dB, the values' gradient
        ("materialised", "positions", 4, 8),
        ("factored", "positions", 6, 10),
        # x W^T; dx, B scaled, dW, dA, dB, the values' gradient
        ("materialised", "weights", 1, 6),
    ],
)
def test_a_linear_launches_fewer_kernels_with_cached_positions_and_weights(path, kept, forward, backward):
    """--linear_cache; without it a uniform support's linear launches 15 and 19 on the materialised path."""
    linear = large_linear("uniform", path)
    cache_positions(linear)
    with WeightCache(linear, 16_384).filled() if kept == "weights" else contextlib.nullcontext():
        assert launches_of_a_linear(linear, 16_384) == (forward, backward)


def large_linear(support: str, path: str) -> SparseLowRankLinear:
    kind = {"sparsity": 0.0} if support == "none" else {"sparsity": 1 / 32, "support": support}
    return SparseLowRankLinear(1024, 2736, 256, alpha=16.0, path=path, device="meta", dtype=torch.bfloat16, **kind)


def launches_of_a_linear(linear: torch.nn.Module, num_rows: int) -> tuple[int, int]:
    """Returns the launches of the forward and the backward pass, which do not wait for the device."""
    x = torch.empty(num_rows, linear.in_features, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with LaunchCounter() as forward, WaitRecorder() as recorder:
        y = linear(x)
    gradient = torch.empty_like(y)
    with LaunchCounter() as backward, recorder:
        y.backward(gradient)
    assert recorder.waits == []
    return forward.launches, backward.launches


SETTINGS = SLTrainConfig(rank=4, sparsity=0.1, alpha=8.0)


def tiny_on_meta(num_layers: int, reparameterized: bool):
    return build_model(
        replace(tiny(), num_hidden_layers=num_layers),
        dtype=torch.bfloat16,
        device="meta",
        seed=3,
        reparameterize=(lambda model: reparameterize(model, SETTINGS)) if reparameterized else None,
    )


def launches_of_an_update(num_layers: int, reparameterized: bool) -> int:
    model = tiny_on_meta(num_layers, reparameterized)
    parameters = dict(model.named_parameters())
    updates = WholeUpdate(lambda stepped: FusedForMeta(stepped.values()), parameters, World(), grad_clipping=1.0)
    batches, device = padded_batches()[:1], torch.device("meta")
    with LaunchCounter() as counter, WaitRecorder() as recorder:
        train_step(TokenLoss(model), updates, batches, lr=1e-3, world=World(), device=device)
    assert recorder.waits == []
    return counter.launches


def test_more_tensors_cost_an_update_no_launches():
    """A layer's linears have two to three times as many tensors; norms, clipping and step take all of an update's together."""
    more = launches_of_an_update(3, True) - launches_of_an_update(2, True)
    more -= launches_of_an_update(3, False) - launches_of_an_update(2, False)
    linears = [part for part in tiny_on_meta(1, True).modules() if isinstance(part, SparseLowRankLinear)]
    assert len(linears) == 7
    assert more <= sum(sum(launches_of_a_linear(linear, 3 * 16)) - 3 for linear in linears)


def test_a_layer_costs_an_update_no_more_launches_than_the_library_takes_for_it_alone():
    """Its forward and backward pass; norms, clipping and step take all layers' tensors together."""
    model, shape = tiny_on_meta(1, False).model, padded_batches()[0].input_ids.shape
    x = torch.empty(*shape, model.config.hidden_size, device="meta", dtype=torch.bfloat16, requires_grad=True)
    rotations = model.rotary_emb(x, torch.arange(shape[1], device="meta")[None])
    with LaunchCounter() as alone:
        y = model.layers[0](x, attention_mask=None, position_embeddings=rotations)
        y.backward(torch.empty_like(y))
    assert launches_of_an_update(3, False) - launches_of_an_update(2, False) <= alone.launches


@pytest.mark.gpu
def test_an_update_on_a_gpu_does_not_wait():
    """torch raises an error if an operator waits."""
    device = torch.device("cuda")
    model = build_model(tiny(), dtype=torch.bfloat16, device=device, seed=3)
    build = partial(build_optimizer, "adamw", lr=0.0, weight_decay=0.1)
    updates = WholeUpdate(build, dict(model.named_parameters()), World(), grad_clipping=0.1)
    batches = [replace(b, input_ids=b.input_ids.pin_memory(), labels=b.labels.pin_memory()) for b in padded_batches()]
    step = partial(train_step, TokenLoss(model), updates, batches, lr=1e-3, world=World(), device=device)
    step()
    recorder.PendingUpdate(1, step(), None, 0, 1).read()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = recorder.PendingUpdate(2, step(), None, 0, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert pending.read()[0] > 0


@pytest.fixture
def flags(tiny_run) -> list[str]:
    return [
        *tiny_run,
        *("--peft_model", "sltrain", "--rank", "8", "--lora_alpha", "2", "--sp_ratio", "0.1", "--optimizer", "adamw"),
        *("--num_training_steps", "6", "--warmup_steps", "2", "--batch_size", "4", "--total_batch_size", "8"),
        *("--max_length", "64", "--wandb", "disabled", "--device", "cpu", "--dtype", "float32", "--workers", "0"),
    ]


def waits_by_update(monkeypatch, arguments: list[str]) -> dict[int, list[str]]:
    """Trains; returns the waits of each update, from loading its micro-batches to loading those of the next update."""
    recorder, waits = WaitRecorder(), {}
    original, numbers = assemble.next_micro_batches, itertools.count(1)

    def next_micro_batches(run, world):
        waits[next(numbers)] = recorder.waits = []
        return original(run, world)

    monkeypatch.setattr(assemble, "next_micro_batches", next_micro_batches)
    with recorder:
        assert torchrun_main.main(arguments) == 0
    return waits


def test_the_training_loop_never_waits_between_updates(tmp_path, flags, monkeypatch):
    """Except in update 1, which allocates the moments, and after update 6, when a checkpoint is saved."""
    waits = waits_by_update(monkeypatch, [*flags, "--log_every", "2", "--save_dir", str(tmp_path / "run")])
    assert list(waits) == [1, 2, 3, 4, 5, 6]
    assert [waits[number] for number in (2, 3, 4, 5)] == [[]] * 4


def test_reading_a_loss_immediately_is_recorded_as_a_wait(tmp_path, flags, monkeypatch):
    """Shows that the test above can fail: it detects a float(loss) in the loop."""
    original = recorder.LateRecord.add

    def add(self, update_step: int, step: StepResult, known):
        assert float(step.loss) > 0
        return original(self, update_step, step, known)

    monkeypatch.setattr(recorder.LateRecord, "add", add)
    waits = waits_by_update(monkeypatch, [*flags, "--log_every", "2", "--save_dir", str(tmp_path / "run")])
    assert waits[3] == ["aten._local_scalar_dense.default"]


def test_a_row_is_written_one_update_late_but_before_an_evaluation_or_a_checkpoint(tmp_path, flags, monkeypatch):
    """When an update begins, the previous update's row is not written yet, except after an evaluation (5) or a checkpoint (3)."""
    num_rows, original = {}, assemble.next_micro_batches
    folder = tmp_path / "run"

    def next_micro_batches(run, world):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        num_rows[run.parts.state.update_step] = sum('"loss"' in line for line in lines)
        return original(run, world)

    monkeypatch.setattr(assemble, "next_micro_batches", next_micro_batches)
    flags = [*flags, "--log_every", "1", "--save_every", "3", "--eval_every", "5", "--save_dir", str(folder)]
    assert torchrun_main.main(flags) == 0
    assert num_rows == {0: 0, 1: 0, 2: 1, 3: 3, 4: 3, 5: 5}


def test_a_run_that_fails_has_written_the_rows_of_all_its_updates(tmp_path, flags, monkeypatch):
    original, numbers = assemble.next_micro_batches, itertools.count(1)

    def next_micro_batches(run, world):
        if next(numbers) == 5:
            raise OSError("no more")
        return original(run, world)

    monkeypatch.setattr(assemble, "next_micro_batches", next_micro_batches)
    assert torchrun_main.main([*flags, "--log_every", "1", "--save_dir", str(tmp_path / "run")]) == 1
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["update_step"] for row in rows] == [1, 2, 3, 4]
