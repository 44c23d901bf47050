"""Nothing in an update asks the device for a number, so that a GPU always has the next one queued.

Waiting cannot be seen on a CPU, but the operators that make a GPU wait can: those whose result or shape depends on values. The
"meta" device stands in for one whose memory the host cannot read: it has no values, and every question for one fails.
"""

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
from peft_pretraining.data.loader import Batch
from peft_pretraining.distributed.world import World
from peft_pretraining.model.llama import build_model
from peft_pretraining.model.loss import TokenLoss
from peft_pretraining.optim import GrowthLimit, WholeUpdate, build_optimizer
from peft_pretraining.record import recorder
from peft_pretraining.run import assemble
from peft_pretraining.training.update import StepResult, train_step
from sparse_lora import SLTrainConfig, reparameterize

ROOT = Path(__file__).resolve().parent.parent
ASKING_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Questions(TorchDispatchMode):
    """Operators that hand values, or shapes that depend on values, to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.during: list[str] = []
        self.copied: list[bool] = []  # whether copies between devices were asynchronous

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if ASKING_TAGS & set(func.tags) and not _picks_by_position(func, args):
            self.during.append(str(func))
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.device != args[0].device:
            self.copied.append(bool((kwargs or {}).get("non_blocking")))
        return result


def _picks_by_position(func, args) -> bool:
    """x[positions]: of the index operator's results only those by flags have a shape that depends on values."""
    indices = [index for index in args[1] if index is not None] if func is torch.ops.aten.index.Tensor else []
    return bool(indices) and all(index.dtype == torch.int64 for index in indices)


def tiny() -> ModelConfig:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return replace(load_model_config(ROOT / "configs" / "llama_9m.json"), vocab_size=331, num_key_value_heads=4, **small)


def padded_batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    batches = []
    for length in (16, 9):
        ids = torch.randint(2, 331, (3, 16), generator=generator)
        labels = ids.clone()
        labels[1, length:] = -100
        batches.append(Batch(ids, labels, 32 + length, 29 + length))
    return batches


@pytest.mark.parametrize("ask", [lambda x: float(x), lambda x: bool(x > 0), lambda x: torch.nonzero(x), lambda x: x[x > 0]])
def test_questions_are_seen(ask):
    """What people write when they ask, among it float(loss)."""
    with Questions() as questions:
        ask(torch.ones(()))
    assert questions.during


def test_an_update_asks_nothing():
    """After the first one, in which the optimizer makes its moments: the whole update, fused AdamW, with clipping."""
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
    with Questions() as questions:
        step(padded_batches())
    assert questions.during == []
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


class Started(torch.optim.Optimizer):
    """In place of fused AdamW, which knows no meta tensors: it has its states, and reads the flag on the device."""

    _step_supports_amp_scaling = True

    def __init__(self, params):
        super().__init__(params, {"lr": 0.0})
        self.state.update({parameter: {"step": 1} for group in self.param_groups for parameter in group["params"]})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad * (1 - self.found_inf) * group["lr"])


def test_an_update_on_another_device_copies_its_input_without_waiting_and_nothing_back():
    model = build_model(tiny(), dtype=torch.bfloat16, device="meta", seed=3)
    parameters = dict(model.named_parameters())
    updates = WholeUpdate(lambda stepped: Started(stepped.values()), parameters, World(), grad_clipping=1.0)
    with Questions() as questions:
        result = train_step(TokenLoss(model), updates, padded_batches(), lr=1e-3, world=World(), device=torch.device("meta"))
    assert questions.copied == [True] * 4  # ids and labels of two micro-batches
    assert (result.num_tokens, result.num_bad_records) == (89, 0)
    assert result.loss.is_meta
    with pytest.raises(RuntimeError):
        float(result.loss)


@pytest.mark.gpu
def test_an_update_on_a_gpu_does_not_wait():
    """torch's own watch over operators that wait."""
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


def questions_by_update(monkeypatch, arguments: list[str]) -> dict[int, list[str]]:
    """What the loop asks for between the first batches of one update and those of the next, by update."""
    questions, asked = Questions(), {}
    honest, numbers = assemble.next_micro_batches, itertools.count(1)

    def next_micro_batches(run, world):
        asked[next(numbers)] = questions.during = []
        return honest(run, world)

    monkeypatch.setattr(assemble, "next_micro_batches", next_micro_batches)
    with questions:
        assert torchrun_main.main(arguments) == 0
    return asked


def test_the_loop_asks_nothing_between_updates(tmp_path, flags, monkeypatch):
    asked = questions_by_update(monkeypatch, [*flags, "--log_every", "2", "--save_dir", str(tmp_path / "run")])
    assert list(asked) == [1, 2, 3, 4, 5, 6]
    assert [asked[number] for number in (2, 3, 4, 5)] == [[]] * 4  # in the first moments are made, after the last all is saved


def test_a_loss_that_is_read_at_once_is_found(tmp_path, flags, monkeypatch):
    """The test above is no empty promise: a float(loss) in the loop's record fails it."""
    honest = recorder.LateRecord.add

    def add(self, update_step: int, step: StepResult, known):
        assert float(step.loss) > 0
        return honest(self, update_step, step, known)

    monkeypatch.setattr(recorder.LateRecord, "add", add)
    asked = questions_by_update(monkeypatch, [*flags, "--log_every", "2", "--save_dir", str(tmp_path / "run")])
    assert asked[3] == ["aten._local_scalar_dense.default"]


def test_a_row_is_written_one_update_late_but_before_what_needs_it(tmp_path, flags, monkeypatch):
    """When an update begins, the record lacks the row of the update before it, unless an evaluation or a checkpoint came
    between; and the rows are those of a run in which every update is waited for."""
    seen, honest = {}, assemble.next_micro_batches
    folder = tmp_path / "run"

    def next_micro_batches(run, world):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        seen[run.parts.state.update_step] = sum('"loss"' in line for line in lines)
        return honest(run, world)

    monkeypatch.setattr(assemble, "next_micro_batches", next_micro_batches)
    flags = [*flags, "--log_every", "1", "--save_every", "3", "--eval_every", "5", "--save_dir", str(folder)]
    assert torchrun_main.main(flags) == 0
    assert seen == {0: 0, 1: 0, 2: 1, 3: 3, 4: 3, 5: 5}


def test_a_run_that_fails_loses_no_row(tmp_path, flags, monkeypatch):
    """What the device has told by then is written, though nothing is waited for any more."""
    honest, numbers = assemble.next_micro_batches, itertools.count(1)

    def next_micro_batches(run, world):
        if next(numbers) == 5:
            raise OSError("no more")
        return honest(run, world)

    monkeypatch.setattr(assemble, "next_micro_batches", next_micro_batches)
    assert torchrun_main.main([*flags, "--log_every", "1", "--save_dir", str(tmp_path / "run")]) == 1
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["update_step"] for row in rows] == [1, 2, 3, 4]
