"""The whole program, in this process: a run's files, resuming, stopping, and errors after the start."""

import itertools
import json
import math
import os
import pty
import shutil
import signal
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from outcomes import tensors_of, without_times
from resealing import reseal

import torchrun_main
from peft_pretraining.__main__ import COMMANDS
from peft_pretraining.__main__ import main as command
from peft_pretraining.checkpoint.saver import Saver
from peft_pretraining.checkpoint.step_folder import list_checkpoints
from peft_pretraining.commands.report.read import read_run
from peft_pretraining.distributed.world import World
from peft_pretraining.plan import checks
from peft_pretraining.record.recorder import Recorder
from peft_pretraining.run import assemble
from peft_pretraining.training.stop import StopRequest

PUBLISHED_KEYS = {
    *("update_step", "loss", "lr", "tokens_seen", "throughput_tokens", "throughput_examples", "throughput_batches"),
    *("gradnorm", "max_memory"),
}
BF16 = ("--dtype", "bfloat16")
EVALUATION_KEYS = {"update_step", "final_eval_loss", "final_eval_perplexity", "final_eval_tokens"}


@pytest.fixture
def flags(tiny_run) -> list[str]:
    return flags_of(tiny_run)


def flags_of(tiny_run: list[str]) -> list[str]:
    return [
        *tiny_run,
        *("--peft_model", "sltrain", "--rank", "8", "--lora_alpha", "2", "--sp_ratio", "0.1", "--optimizer", "adamw"),
        *("--lr", "0.003", "--warmup_steps", "2", "--num_training_steps", "6", "--batch_size", "4"),
        *("--total_batch_size", "8", "--max_length", "64", "--eval_every", "3", "--save_every", "3"),
        *("--wandb", "disabled", "--device", "cpu", "--dtype", "float32", "--workers", "0"),
    ]


def train(folder: Path, *flags: str) -> list[dict]:
    assert torchrun_main.main([*flags, "--save_dir", str(folder)]) == 0
    return rows_in(folder)


def rows_in(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_logs_the_published_metrics(tmp_path, flags):
    rows = train(tmp_path / "run", *flags, "--eval_at_start")
    updates = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "final_eval_loss" in row]
    assert [row["update_step"] for row in updates] == [1, 2, 3, 4, 5, 6]  # exactly num_training_steps
    assert all(row.keys() >= PUBLISHED_KEYS for row in updates)
    assert [row["update_step"] for row in evaluations] == [0, 3, 6]
    assert all(row.keys() >= EVALUATION_KEYS for row in evaluations)
    assert evaluations[0]["final_eval_loss"] == pytest.approx(math.log(320), rel=0.02)  # untrained: log of the vocabulary
    assert evaluations[-1]["final_eval_loss"] < evaluations[0]["final_eval_loss"]
    tokens = [row["tokens_seen"] for row in updates]
    assert tokens == sorted(set(tokens))
    assert tokens[-1] < 6 * 8 * 64  # padding is not counted
    for name in ("parameters", "support", "optimizer"):
        assert updates[0][f"memory_{name}_measured"] == updates[0][f"memory_{name}_predicted"] > 0
    assert updates[0]["memory_peak_measured"] > 0
    assert not any(key.startswith("memory_") for row in updates[1:] for key in row)
    document = json.loads((tmp_path / "run" / "run.json").read_text())
    assert document["arguments"]["rank"] == 8
    assert document["versions"]["torch"] == torch.__version__
    assert len(document["dataset"]["fingerprint"]) == 32


@pytest.mark.parametrize(
    ("optimizer", "layout", "workers", "method"),
    [
        ("adamw", [], "0", "sltrain"),
        ("adam8bit", ["--packing"], "1", "sltrain"),
        ("adafactor", [], "1", "full"),
        ("sgd", ["--packing", "--document_mask"], "0", "lowrank"),
        ("adam", ["--dtype", "bfloat16", "--train_scaling"], "0", "sltrain"),
        ("adamw", ["--support", "block", "--linear_path", "factored"], "0", "sltrain"),
        ("adamw4bit", ["--dtype", "bfloat16", "--stochastic_rounding"], "0", "sltrain"),
        ("adam8bit_per_layer", ["--embedding_states", "8bit", "--grad_norm_growth", "1.01"], "0", "sltrain"),
        # Resumed between two projections.
        ("galore_adamw", ["--update_proj_gap", "2", "--grad_clipping", "0.5"], "0", "galore"),
        ("adamw4bit", ["--update_proj_gap", "4", "--proj_type", "full", "--stochastic_rounding", *BF16], "0", "galore"),
        ("galore_adamw8bit_per_layer", ["--update_proj_gap", "2", "--grad_norm_growth", "1.01"], "0", "galore"),
        ("galore_adafactor", ["--update_proj_gap", "2", "--proj_type", "reverse_std", *BF16], "0", "galore"),
    ],
)
def test_a_resumed_run_continues_exactly(tmp_path, flags, optimizer, layout, workers, method):
    """Resumed from update 3, a run has the same losses, parameters, optimizer and data state as an uninterrupted one."""
    flags = [*flags, *layout, "--optimizer", optimizer, "--workers", workers, "--peft_model", method]
    whole = train(tmp_path / "whole", *flags)
    middle, end = list_checkpoints(tmp_path / "whole")
    continued = train(tmp_path / "continued", *flags, "--continue_from", str(middle))
    assert without_times(continued) == without_times(whole)  # including the copied rows of the first three updates
    expected, found = tensors_of(end), tensors_of(list_checkpoints(tmp_path / "continued")[-1])
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    states = [json.loads((path / "state.json").read_text()) for path in (end, tmp_path / "continued" / end.name)]
    assert states[0] == states[1]


def test_document_masks_change_training_and_evaluation_of_packed_data(tmp_path, flags, capsys):
    """With packing they change the first loss; without it they have no effect and give a notice. A resumed run keeps them."""
    flags = [*flags, "--eval_at_start", "--num_training_steps", "3"]
    packed, masked = (train(tmp_path / name, *flags, "--packing", *more) for name, more in MASKS.items())
    for key in ("loss", "final_eval_loss"):
        first, second = (next(row[key] for row in rows if key in row) for rows in (packed, masked))
        assert first == pytest.approx(second, rel=1e-2)
        assert first != second
    for key in ("tokens_seen", "final_eval_tokens"):
        assert [row.get(key) for row in packed] == [row.get(key) for row in masked]
    assert torchrun_main.main([*flags, "--packing", "--save_dir", str(tmp_path / "masked")]) == 2
    assert "--document_mask False" in capsys.readouterr().err
    padded = [train(tmp_path / f"padded-{name}", *flags, *more) for name, more in MASKS.items()]
    assert "--document_mask has no effect without --packing" in capsys.readouterr().err
    assert without_times(padded[0]) == without_times(padded[1])


MASKS: dict[str, list[str]] = {"plain": [], "masked": ["--document_mask"]}


def test_the_same_command_resumes_after_a_crash(tmp_path, flags):
    """Rows written after the last checkpoint are removed, so that no update is missing or logged twice."""
    whole = train(tmp_path / "run", *flags)
    shutil.rmtree(tmp_path / "run" / "step_00000006")
    again = train(tmp_path / "run", *flags)
    assert without_times(again) == without_times(whole)


def ask_to_stop(monkeypatch, after_updates: int, number: int = signal.SIGTERM) -> None:
    """Sends this process a signal at the beginning of update number `after_updates`."""
    import peft_pretraining.training.update as training

    original, calls = training.train_step, itertools.count(1)

    def step(*args, **kwargs):
        if next(calls) == after_updates:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(training, "train_step", step)


STOPPED = [
    ("sltrain", "adamw", "padded", "0", "SIGTERM"),
    ("sltrain", "adam8bit", "packed", "2", "SIGUSR1"),
    ("sltrain", "adam8bit_per_layer", "padded", "2", "SIGINT"),
    ("full", "adamw", "packed", "2", "SIGHUP"),
    ("full", "adam8bit", "padded", "0", "SIGINT"),
    ("full", "adam8bit_per_layer", "packed", "0", "SIGUSR1"),
    ("lowrank", "adamw", "packed", "0", "SIGINT"),
    ("lowrank", "adam8bit", "padded", "2", "SIGQUIT"),
    ("lowrank", "adam8bit_per_layer", "packed", "0", "SIGTERM"),
]
ALL_STOPPED = itertools.product(
    *(
        ("sltrain", "full", "lowrank"),
        ("adamw", "adam8bit", "adam8bit_per_layer"),
        ("padded", "packed"),
        ("0", "2"),
        ("SIGTERM",),
    )
)


@pytest.mark.parametrize(
    ("method", "optimizer", "layout", "workers", "name"),
    [*STOPPED, *(pytest.param(*case, marks=pytest.mark.full) for case in ALL_STOPPED if case not in STOPPED)],
)
def test_a_run_stopped_by_a_signal_resumes_exactly(tmp_path, flags, monkeypatch, method, optimizer, layout, workers, name):
    """A run of 12 updates that is stopped in the fifth and resumed ends bit-identical, including data position and record."""
    flags = [
        *flags,
        "--peft_model",
        method,
        "--optimizer",
        optimizer,
        "--workers",
        workers,
        "--num_training_steps",
        "12",
    ]
    flags += ["--save_every", "100", "--eval_every", "4", *(["--packing"] if layout == "packed" else [])]
    whole = train(tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        ask_to_stop(patch, after_updates=5, number=getattr(signal, name))
        stopped = train(tmp_path / "run", *flags)
    assert [row["update_step"] for row in stopped if "loss" in row] == [1, 2, 3, 4, 5]
    marker = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert marker["signal"] == name
    assert marker["update_step"] == 5
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step_00000005"]

    assert without_times(train(tmp_path / "run", *flags)) == without_times(whole)
    assert not (tmp_path / "run" / "stopped.json").exists()
    expected, found = (tensors_of(list_checkpoints(tmp_path / place)[-1]) for place in ("whole", "run"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    states = [json.loads((tmp_path / place / "step_00000012" / "state.json").read_text()) for place in ("whole", "run")]
    assert states[0] == states[1]  # including the data position


def test_a_run_whose_terminal_is_closed_saves_and_goes_on(tmp_path, flags, monkeypatch, capsys):
    """From the hang-up on every write to the terminal fails. The same with a terminal that hangs up on an ignored SIGHUP."""
    import peft_pretraining.training.update as training

    honest = training.train_step

    def run(folder: Path, ignored: bool) -> int:
        other_side, terminal = pty.openpty()
        calls = itertools.count(1)

        def step(*args, **kwargs):
            if next(calls) == 3:
                os.close(other_side)
                os.kill(os.getpid(), signal.SIGHUP)
            return honest(*args, **kwargs)

        before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        try:
            with monkeypatch.context() as patch, open(terminal, "w", buffering=1) as stream:
                patch.setattr(training, "train_step", step)
                patch.setattr(sys, "stdout", stream)
                patch.setattr(sys, "stderr", stream)
                return torchrun_main.main([*flags, "--save_every", "100", "--save_dir", str(folder)])
        finally:
            signal.signal(signal.SIGHUP, before)

    assert run(tmp_path / "ignored", ignored=True) == 0
    assert [path.name for path in list_checkpoints(tmp_path / "ignored")] == ["step_00000006"]
    assert run(tmp_path / "run", ignored=False) == 0
    assert json.loads((tmp_path / "run" / "stopped.json").read_text())["signal"] == "SIGHUP"
    capsys.readouterr()
    again = train(tmp_path / "run", *flags, "--save_every", "100")
    assert without_times(again) == without_times(rows_in(tmp_path / "ignored"))
    printed = capsys.readouterr().err
    assert "going on from step_00000003" in printed
    assert "saved step_00000006" in printed


def test_random_states_and_skipped_updates_go_on(tmp_path, flags, monkeypatch):
    """Whatever a run has drawn until a checkpoint, the resumed one draws next; and it goes on counting skipped updates."""
    import random

    import peft_pretraining.training.update as training

    honest = training.train_step

    def step(*args, **kwargs):
        drawn.append((torch.rand(1).item(), random.random()))
        return honest(*args, **kwargs)

    flags = [*flags, "--save_every", "1"]
    monkeypatch.setattr(training, "train_step", step)
    drawn: list[tuple[float, float]] = []
    with monkeypatch.context() as patch:
        poison_loss(patch, bad_calls={3})  # a micro-batch of update 2
        train(tmp_path / "whole", *flags)
    whole, drawn = drawn, []
    with monkeypatch.context() as patch:
        poison_loss(patch, bad_calls={3})
        ask_to_stop(patch, after_updates=4)
        train(tmp_path / "run", *flags)
    rows = [row for row in train(tmp_path / "run", *flags) if "loss" in row]
    assert drawn == whole
    assert [row.get("skipped_updates", 0) for row in rows] == [0, 1, 1, 1, 1, 1]


def test_a_request_to_stop_interrupts_an_evaluation(tmp_path, flags, monkeypatch):
    """The next start makes the evaluation again, at the same update."""
    from peft_pretraining.model.loss import TokenLoss

    whole = train(tmp_path / "whole", *flags, "--batch_size", "2", "--gradient_accumulation", "4")
    original = TokenLoss.forward

    def forward(self, *args):
        if not self.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(TokenLoss, "forward", forward)
        stopped = train(tmp_path / "run", *flags, "--batch_size", "2", "--gradient_accumulation", "4")
    assert [row["update_step"] for row in stopped] == [1, 2, 3]
    again = train(tmp_path / "run", *flags, "--batch_size", "2", "--gradient_accumulation", "4")
    assert without_times(again) == without_times(whole)


def test_starting_a_finished_run_changes_nothing(tmp_path, flags, capsys):
    train(tmp_path / "run", *flags)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    train(tmp_path / "run", *flags)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert "finished 6 updates" in capsys.readouterr().out


def test_resume_never_starts_a_new_run_in_a_numbered_folder(tmp_path, flags):
    first = train(tmp_path / "run", *flags)
    assert torchrun_main.main([*flags, "--save_dir", str(tmp_path / "run"), "--resume", "never"]) == 0
    second = [json.loads(line) for line in (tmp_path / "run-2" / "metrics.jsonl").read_text().splitlines()]
    assert without_times(second) == without_times(first)  # same seed


def test_resuming_from_an_earlier_checkpoint_sets_later_ones_aside(tmp_path, flags, capsys):
    """Otherwise the next start would resume from a later one, and --keep_checkpoints would delete the new ones."""
    whole = train(tmp_path / "run", *flags)
    first = list_checkpoints(tmp_path / "run")[0]
    arguments = [*flags, "--continue_from", str(first), "--save_every", "2", "--keep_checkpoints", "1"]
    again = train(tmp_path / "run", *arguments)
    assert without_times(again) == without_times(whole)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step_00000006"]
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "set_aside")] == ["step_00000006"]
    assert "step_00000006 is moved to" in capsys.readouterr().err


def test_a_checkpoint_whose_data_state_does_not_fit_is_refused(tmp_path, flags, capsys):
    train(tmp_path / "run", *flags)
    path = tmp_path / "run" / "step_00000003" / "state.json"
    state = json.loads(path.read_text())
    state["data"]["order"]["version"] = 99
    path.write_text(json.dumps(state))
    reseal(path.parent)
    assert torchrun_main.main([*flags, "--save_dir", str(tmp_path / "other"), "--continue_from", str(path.parent)]) == 2
    message = capsys.readouterr().err
    assert "step_00000003" in message
    assert "order" in message


def test_a_failed_start_of_a_resumed_run_changes_nothing(tmp_path, flags, capsys):
    """Before all parts are built nothing is written: no record is copied and no checkpoint set aside."""
    whole = train(tmp_path / "one", *flags)
    first = list_checkpoints(tmp_path / "one")[0]
    for folder in ("one", "two"):
        arguments = [*flags, "--continue_from", str(first), "--save_dir", str(tmp_path / folder)]
        assert torchrun_main.main([*arguments, "--eval_dataset", "/no/such/data"]) == 2
        assert not (tmp_path / "one" / "set_aside").exists()
    assert not (tmp_path / "two" / "metrics.jsonl").exists()
    again = train(tmp_path / "two", *flags, "--continue_from", str(first))
    assert without_times(again) == without_times(whole)


def test_a_record_without_checkpoint_is_renamed(tmp_path, flags, capsys):
    """A run crashed before its first checkpoint; another run in its folder must not continue its record."""
    train(tmp_path / "run", *flags, "--eval_at_start")
    for path in list_checkpoints(tmp_path / "run"):
        shutil.rmtree(path)
    rows = train(tmp_path / "run", *flags, "--eval_at_start", "--seed", "7")
    assert [row["update_step"] for row in rows if "final_eval_loss" in row] == [0, 3, 6]
    assert without_times(rows) == without_times(train(tmp_path / "other", *flags, "--eval_at_start", "--seed", "7"))
    assert (tmp_path / "run" / "metrics.old-1.jsonl").exists()
    assert "metrics.old-1.jsonl" in capsys.readouterr().err


def test_a_record_of_an_earlier_version_is_read(tmp_path, flags, capsys):
    """Arguments that it lacks had their default values, and unknown ones are ignored."""
    whole = train(tmp_path / "run", *flags)
    first = list_checkpoints(tmp_path / "run")[0]
    document = json.loads((first / "run.json").read_text())
    del document["arguments"]["stochastic_rounding"]
    document["arguments"]["of_another_version"] = 1
    (first / "run.json").write_text(json.dumps(document))
    reseal(first)
    assert without_times(train(tmp_path / "two", *flags, "--continue_from", str(first))) == without_times(whole)
    assert command(["generate", "--checkpoint", str(first), "--max_new_tokens", "2"]) == 0


def test_damaged_tensors_give_a_message(tmp_path, flags, capsys):
    train(tmp_path / "run", *flags)
    last = list_checkpoints(tmp_path / "run")[0]
    for file in (last / "tensors").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    capsys.readouterr()
    assert torchrun_main.main([*flags, "--continue_from", str(last), "--save_dir", str(tmp_path / "two")]) == 2
    message = capsys.readouterr().err
    assert f"{last} is damaged: tensors/__0_0.distcp" in message


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_set_aside_and_the_previous_one_used(tmp_path, flags, capsys):
    whole = train(tmp_path / "run", *flags)
    flip(list_checkpoints(tmp_path / "run")[1] / "state.json")
    capsys.readouterr()
    again = train(tmp_path / "run", *flags)
    message = capsys.readouterr().err
    assert "step_00000006 is damaged: state.json was changed after it was written" in message
    assert "using step_00000003, the newest intact checkpoint" in message
    assert without_times(again) == without_times(whole)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step_00000003", "step_00000006"]
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "set_aside")] == ["step_00000006"]


def test_a_damaged_checkpoint_that_the_user_names_is_refused(tmp_path, flags, capsys):
    train(tmp_path / "run", *flags)
    last = list_checkpoints(tmp_path / "run")[1]
    (last / "tokenizer" / "tokenizer.json").unlink()
    assert torchrun_main.main([*flags, "--save_dir", str(tmp_path / "run"), "--continue_from", str(last)]) == 2
    assert f"{last} is damaged: tokenizer/tokenizer.json is missing" in capsys.readouterr().err
    assert command(["generate", "--checkpoint", str(last)]) == 2
    assert f"{last} is damaged: tokenizer/tokenizer.json is missing" in capsys.readouterr().err


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_from_the_beginning(tmp_path, flags, capsys):
    train(tmp_path / "run", *flags)
    for path in list_checkpoints(tmp_path / "run"):
        flip(path / "tensors" / ".metadata")
    record = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert torchrun_main.main([*flags, "--save_dir", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert "all checkpoints are damaged" in message
    assert message.count("is damaged: tensors/.metadata") == 2
    assert "--resume never" in message
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == record


def test_ctrl_c_while_the_record_is_closed_loses_nothing_and_says_nothing_false(tmp_path, flags, capfd, monkeypatch):
    close = Recorder.close

    def interrupted(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        close(self, *arguments)

    monkeypatch.setattr(Recorder, "close", interrupted)
    assert torchrun_main.main([*flags, "--save_dir", str(tmp_path / "run")]) == 0
    said = "".join(capfd.readouterr())
    assert "SIGINT: ending once the record is complete" in said
    assert "interrupted before training" not in said
    assert not (tmp_path / "run" / "stopped.json").exists()


def test_synchronous_and_background_saves_write_the_same_tensors(tmp_path, flags):
    whole = train(tmp_path / "whole", *flags, "--save_every", "1")
    other = train(tmp_path / "other", *flags, "--save_every", "1", "--keep_checkpoints", "2", "--async_save")
    assert without_times(other) == without_times(whole)
    paths = list_checkpoints(tmp_path / "other")
    assert [path.name for path in paths] == ["step_00000005", "step_00000006"]
    for path in paths:
        expected, found = tensors_of(tmp_path / "whole" / path.name), tensors_of(path)
        assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("saving", [[], ["--async_save"]], ids=["waiting", "in the background"])
def test_checkpoints_by_time_and_those_kept_for_good_change_no_bit(tmp_path, flags, saving, monkeypatch):
    """A minute passes per update, in rank 0's clock; the run resumes exactly from a checkpoint saved by time."""
    whole = train(tmp_path / "whole", *flags, "--save_every", "1")
    numbers = itertools.count(1)
    original = assemble.next_micro_batches
    seconds = [0.0]

    def next_micro_batches(run, world):
        seconds[0] = 60.0 * next(numbers)
        if run.saver._in_flight is not None:
            run.saver._in_flight.join()
        return original(run, world)

    monkeypatch.setattr(assemble, "next_micro_batches", next_micro_batches)
    monkeypatch.setattr(assemble, "Saver", partial(Saver, clock=lambda: seconds[0]))
    flags = [*flags, *saving, "--save_every", "100", "--save_minutes", "2", "--keep_checkpoints", "1"]
    folder = tmp_path / "run"
    # Saved after updates 2, 3 (a multiple), 5 and 6 (the end).
    assert without_times(train(folder, *flags, "--keep_every", "3")) == without_times(whole)
    assert [path.name[-1] for path in list_checkpoints(folder)] == ["3", "6"]
    by_time = train(tmp_path / "by-time", *flags[:-2])
    assert [path.name[-1] for path in list_checkpoints(tmp_path / "by-time")] == ["2", "4", "6"]
    assert without_times(by_time) == without_times(whole)
    shutil.rmtree(tmp_path / "by-time" / "step_00000006")
    assert without_times(train(tmp_path / "by-time", *flags)) == without_times(whole)
    expected, found = tensors_of(tmp_path / "whole" / "step_00000006"), tensors_of(tmp_path / "by-time" / "step_00000006")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_every_process_saves_when_rank_0_says_that_the_time_has_come(tmp_path, monkeypatch):
    """Process 1, whose clock is not asked, saves because process 0 sends a 1."""
    sent, seconds = [], [0.0]
    monkeypatch.setattr(assemble, "largest", lambda value, world: sent.append(value) or 1)
    worlds = [World(rank=rank, size=2) for rank in (0, 1)]
    savers = [Saver(tmp_path, dict, world, minutes=1, clock=lambda: seconds[0]) for world in worlds]
    seconds[0] = 60.0
    for saver, world in zip(savers, worlds, strict=True):
        assert not saver.due(scheduled=False)
        assemble._agreed(SimpleNamespace(stop=StopRequest(), saver=saver), world, lambda: None)
        assert saver.due(scheduled=False)
    assert sent == [1, 0]


def test_a_finished_run_needs_neither_data_nor_network(tmp_path, flags, capsys):
    corpus = tmp_path / "corpus"
    shutil.copytree(Path(flags[flags.index("--dataset") + 1]), corpus)
    flags = [*flags, "--dataset", str(corpus)]
    train(tmp_path / "run", *flags)
    shutil.rmtree(corpus)
    assert torchrun_main.main([*flags, "--save_dir", str(tmp_path / "run")]) == 0
    assert "finished 6 updates" in capsys.readouterr().out
    assert torchrun_main.main([*flags, "--save_dir", str(tmp_path / "other"), "--tokenizer", "./missing.model"]) == 2
    message = capsys.readouterr().err
    assert f"--dataset {corpus}: there is no file or folder" in message
    assert "--tokenizer ./missing.model: there is no file or folder" in message


def test_a_dry_run_opens_the_evaluation_data(tmp_path, flags, capsys):
    (tmp_path / "other.jsonl").write_text('{"text": "a document"}\n')
    assert torchrun_main.main([*flags, "--eval_dataset", str(tmp_path / "other.jsonl"), "--dry_run"]) == 0
    assert "memory" in capsys.readouterr().out
    (tmp_path / "wrong.csv").write_text("a, b")
    assert torchrun_main.main([*flags, "--eval_dataset", str(tmp_path / "wrong.csv"), "--dry_run"]) == 2
    assert "wrong.csv" in capsys.readouterr().err


def test_resuming_into_a_folder_with_another_run_is_refused(tmp_path, flags, capsys):
    train(tmp_path / "one", *flags)
    train(tmp_path / "other", *flags, "--seed", "1")
    arguments = [*flags, "--continue_from", str(tmp_path / "one"), "--save_dir", str(tmp_path / "other")]
    assert torchrun_main.main(arguments) == 2
    assert "already contains another run" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished_run(tiny_run, tmp_path_factory) -> Path:
    """The folder of a finished run, which no test changes."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert torchrun_main.main([*flags_of(tiny_run), "--save_dir", str(folder)]) == 0
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--rank", "4"], ["--rank 4", "made with 8"]),
        (["--seed", "1"], ["--seed 1", "made with 42"]),
        (["--packing"], ["--packing True", "made with False"]),
        (["--total_batch_size", "16"], ["--total_batch_size 16", "made with 8"]),
        (["--optimizer", "sgd"], ["--optimizer sgd", "made with adamw"]),
        (["--lr", "0.001"], ["--lr 0.001", "made with 0.003", "--allow_changes lr"]),
        (
            ["--num_training_steps", "9"],
            ["--num_training_steps 9", "made with 6", "--allow_changes num_training_steps"],
        ),
        (["--scheduler", "linear", "--allow_changes", "lr"], ["--scheduler linear", "--allow_changes scheduler"]),
        (["--grad_clipping", "1"], ["--grad_clipping 1.0", "made without it"]),
        (["--max_train_tokens", "9000"], ["--max_train_tokens 9000", "made without it"]),
        (["--lr", "0.001", "--warmup_steps", "1", "--allow_changes", "lr"], ["--warmup_steps 1", "made with 2"]),
    ],
)
def test_resuming_with_other_arguments_is_refused(finished_run, flags, change, words, capsys):
    assert torchrun_main.main([*flags, "--save_dir", str(finished_run), *change]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words)


def test_allowed_changes_take_effect(tmp_path, flags, capsys):
    """After the next checkpoint the changed values are those that later starts are compared with."""
    whole = train(tmp_path / "run", *flags, "--allow_changes", "lr")
    assert "--allow_changes lr has no effect: the run starts from the beginning" in capsys.readouterr().err
    longer = [*flags, "--num_training_steps", "8", "--lr", "0.001"]
    rows = train(tmp_path / "run", *longer, "--allow_changes", "num_training_steps, lr")
    assert without_times(rows)[: len(whole)] == without_times(whole)
    assert [row["update_step"] for row in rows if "loss" in row] == list(range(1, 9))
    shutil.rmtree(tmp_path / "run" / "step_00000008")
    shutil.rmtree(tmp_path / "run" / "step_00000006")
    train(tmp_path / "run", *longer, "--allow_changes", "num_training_steps,lr")
    capsys.readouterr()
    assert train(tmp_path / "run", *longer, "--allow_changes", "lr")[-1]["update_step"] == 8
    assert "--allow_changes lr has no effect: " in capsys.readouterr().err
    # The record says what the run did, once, although the change was made twice from the same checkpoint.
    changes = json.loads((tmp_path / "run" / "run.json").read_text())["changes"]
    step = changes[0]["after_update"]
    assert changes == [
        {"after_update": step, "name": "lr", "then": 0.003, "now": 0.001},
        {"after_update": step, "name": "num_training_steps", "then": 6, "now": 8},
    ]
    note = f"resumed after update {step} with another lr (0.001 instead of 0.003): no single command repeats it"
    assert note in read_run(tmp_path / "run").notes


def test_the_data_is_compared_by_content_not_by_path(tmp_path, flags, capsys):
    """Data is compared by its fingerprint: the same files at another path are accepted, a changed file is not."""
    corpus = Path(flags[flags.index("--dataset") + 1])
    moved = tmp_path / "moved"
    shutil.copytree(corpus, moved)
    whole = train(tmp_path / "run", *flags)
    middle = list_checkpoints(tmp_path / "run")[0]
    go_on = [*flags, "--dataset", str(moved), "--continue_from", str(middle)]
    assert without_times(train(tmp_path / "two", *go_on)) == without_times(whole)
    with (moved / "words-train.0.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    assert torchrun_main.main([*go_on, "--save_dir", str(tmp_path / "three")]) == 2
    message = capsys.readouterr().err
    assert f"--dataset {moved}: its files" in message
    assert "--allow_changes dataset" in message
    assert torchrun_main.main([*go_on, "--save_dir", str(tmp_path / "three"), "--allow_changes", "dataset"]) == 0
    assert json.loads((tmp_path / "two" / "run.json").read_text())["changes"] == []
    (change,) = json.loads((tmp_path / "three" / "run.json").read_text())["changes"]
    assert (change["name"], change["then"], change["now"]) == ("dataset", str(corpus), str(moved))


def test_changed_held_out_files_are_refused(tmp_path, flags, capsys):
    """Figures of two evaluation sets would stand under one key. A record of an earlier version, without a mark, goes on."""
    corpus = tmp_path / "corpus"
    shutil.copytree(Path(flags[flags.index("--dataset") + 1]), corpus)
    flags = [*flags, "--dataset", str(corpus)]
    train(tmp_path / "run", *flags)
    middle = list_checkpoints(tmp_path / "run")[0]
    with (corpus / "words-validation.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    go_on = [*flags, "--save_dir", str(tmp_path / "other"), "--continue_from", str(middle)]
    assert torchrun_main.main(go_on) == 2
    message = capsys.readouterr().err
    assert f"--eval_dataset {corpus}: its held-out files" in message
    assert torchrun_main.main([*go_on, "--allow_changes", "eval_dataset"]) == 0
    assert "has no effect" not in capsys.readouterr().err
    record = json.loads((middle / "run.json").read_text())
    del record["dataset"]["held_out_fingerprint"]
    (middle / "run.json").write_text(json.dumps(record))
    reseal(middle)
    assert torchrun_main.main([*go_on, "--save_dir", str(tmp_path / "early")]) == 0


def test_a_finished_run_is_not_reported_for_other_data(tmp_path, flags, capsys):
    train(tmp_path / "run", *flags)
    (tmp_path / "other").mkdir()
    for name in ("train.txt", "validation.txt"):
        (tmp_path / "other" / name).write_text("\n\n".join(f"Fox {number} jumps." for number in range(50)))
    argv = [*flags, "--dataset", str(tmp_path / "other"), "--save_dir", str(tmp_path / "run")]
    assert torchrun_main.main(argv) == 2
    assert "--allow_changes dataset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "found", "oldest"),
    [("torch", "2.10.1+cu128", "2.11"), ("torch", "1.13.1", "2.11"), ("transformers", "5.9.0", "5.17")],
)
def test_a_package_that_is_too_old_gets_one_line(tmp_path, flags, capsys, monkeypatch, name, found, oldest):
    original = metadata.version
    monkeypatch.setattr(metadata, "version", lambda package: found if package == name else original(package))
    way_out = f"python -m pip install --upgrade '{name}>={oldest}'"
    text = f"error: {name} {found} is too old, this program needs {oldest} or newer: {way_out}\n"
    assert torchrun_main.main([*flags, "--save_dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"torchrun_main.py: {text}"
    assert command(["generate", "--checkpoint", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"peft_pretraining generate: {text}"


def test_the_oldest_versions_are_those_that_the_requirements_promise():
    requirements = (Path(torchrun_main.__file__).parent / "requirements.txt").read_text().splitlines()
    assert {f"{name}>={version}" for name, version in checks._OLDEST.items()} <= set(requirements)


def test_a_run_that_did_not_record_the_build_of_torch_goes_on_without_a_notice(tmp_path, flags, capsys, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    train(tmp_path / "run", *flags)
    first = list_checkpoints(tmp_path / "run")[0]
    document = json.loads((first / "run.json").read_text())
    assert document["versions"]["torch"] == "2.11.0+cu130"
    for recorded, noticed in (("2.11.0", False), ("2.11.0+cpu", True)):
        document["versions"]["torch"] = recorded
        (first / "run.json").write_text(json.dumps(document))
        reseal(first)
        capsys.readouterr()
        train(tmp_path / recorded, *flags, "--continue_from", str(first))
        assert (f"torch 2.11.0+cu130 (before: {recorded})" in capsys.readouterr().err) is noticed


def test_other_versions_and_threads_give_a_notice(tmp_path, flags, capsys):
    train(tmp_path / "run", *flags)
    first = list_checkpoints(tmp_path / "run")[0]
    document = json.loads((first / "run.json").read_text())
    document["versions"]["torch"] = "2.0.0"
    document["world"]["threads"] = 99
    (first / "run.json").write_text(json.dumps(document))
    reseal(first)
    capsys.readouterr()
    train(tmp_path / "two", *flags, "--continue_from", str(first))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "not be bit-identical" in line]
    assert f"torch {torch.__version__} (before: 2.0.0)" in line
    assert "(before: 99)" in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--dataset", "/no/such/folder"], ["/no/such/folder"]),
        (["--tokenizer", "/no/such/tokenizer.model"], ["/no/such/tokenizer.model"]),
        (["--text_field", "body"], ["body", "text"]),
        (["--device", "cuda"], ["--device cuda", "--device cpu"]),
        (["--data_lanes", "500"], ["--data_lanes"]),
    ],
)
def test_inputs_that_cannot_be_opened_are_named(tmp_path, flags, change, words, capsys):
    if change == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("a GPU is available, so --device cuda is valid")
    assert torchrun_main.main([*flags, "--save_dir", str(tmp_path / "run"), *change]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path, flags, capsys):
    config = json.loads(Path(flags[1]).read_text()) | {"vocab_size": 300}
    (tmp_path / "small.json").write_text(json.dumps(config))
    arguments = [*flags, "--model_config", str(tmp_path / "small.json"), "--save_dir", str(tmp_path / "run")]
    assert torchrun_main.main(arguments) == 2
    message = capsys.readouterr().err
    assert "small.json" in message
    assert "vocab_size 300" in message
    assert "at least 320" in message


def test_c4_is_refused_in_offline_mode(tmp_path, flags, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert torchrun_main.main([*flags, "--dataset", "c4", "--save_dir", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert "HF_HUB_OFFLINE" in message


@pytest.mark.parametrize("log_every", ["1", "100"])
def test_divergence_ends_the_run_and_is_not_saved(tmp_path, flags, capsys, log_every):
    """Ten updates in a row are skipped; checkpoints that are due during them are not written."""
    change = ["--optimizer", "sgd", "--lr", "1e30", "--warmup_steps", "0", "--log_every", log_every]
    change += ["--num_training_steps", "30", "--eval_every", "100"]
    assert torchrun_main.main([*flags, *change, "--save_dir", str(tmp_path / "run")]) == 1
    message = capsys.readouterr().err
    assert "training has diverged" in message
    assert "--lr" in message
    assert list_checkpoints(tmp_path / "run") == []


def poison_loss(monkeypatch, bad_calls: set[int]) -> None:
    """Makes loss and gradient of the given micro-batches (counted from 1) infinite."""
    from peft_pretraining.model.loss import TokenLoss

    original, calls = TokenLoss.forward, itertools.count(1)

    def forward(self, *args):
        loss = original(self, *args)
        return loss * math.inf if self.training and next(calls) in bad_calls else loss

    monkeypatch.setattr(TokenLoss, "forward", forward)


@pytest.mark.parametrize("optimizer", ["adamw", "adam8bit", "adam8bit_per_layer"])
def test_a_non_finite_update_is_skipped_and_counted(tmp_path, flags, monkeypatch, optimizer):
    """Parameters and moments stay unchanged, and the run continues with the next data."""
    flags = [*flags, "--optimizer", optimizer, "--save_every", "1", "--scheduler", "linear"]
    poison_loss(monkeypatch, bad_calls={7})  # a micro-batch of update 4
    rows = [row for row in train(tmp_path / "run", *flags) if "loss" in row]
    assert [row["loss"] is None for row in rows] == [False, False, False, True, False, False]
    assert [row.get("skipped_updates", 0) for row in rows] == [0, 0, 0, 1, 1, 1]
    third, fifth, sixth = (tensors_of(tmp_path / "run" / f"step_0000000{number}") for number in (3, 5, 6))
    assert not (tmp_path / "run" / "step_00000004").exists()
    assert all(torch.isfinite(tensor).all() for tensor in sixth.values() if tensor.is_floating_point())
    steps = [int(value["step"]) for value in scalars_of(tmp_path / "run" / "step_00000006")]
    assert all(step == 5 for step in steps)
    assert any(not torch.equal(third[name], fifth[name]) for name in third if name.startswith("model/"))


def scalars_of(checkpoint: Path) -> list[dict]:
    """Returns the step counts of a checkpoint's optimizer states, which are scalars or tensors."""
    scalars = json.loads((checkpoint / "state.json").read_text())["optimizer"].values()
    tensors = [{"step": tensor} for name, tensor in tensors_of(checkpoint).items() if name.endswith("/step")]
    return [*scalars, *tensors]


@pytest.mark.parametrize(
    ("more", "words"),
    [([], "State before the update"), (["--per_layer", "--accumulate", "moments"], "moments may contain finite micro-batches")],
)
def test_on_nonfinite_stop_saves_state_and_token_ids(tmp_path, flags, monkeypatch, capsys, more, words):
    poison_loss(monkeypatch, bad_calls={8})
    arguments = [*flags, *more, "--on_nonfinite", "stop", "--save_every", "1", "--save_dir", str(tmp_path / "run")]
    assert torchrun_main.main(arguments) == 1
    message = capsys.readouterr().err
    assert words in message
    assert "update 4: non-finite loss (inf)" in message
    kept = tmp_path / "run" / "nonfinite" / "step_00000003"
    assert str(kept) in message
    before, kept_tensors = tensors_of(tmp_path / "run" / "step_00000003"), tensors_of(kept)
    equal = {name: torch.equal(before[name], kept_tensors[name]) for name in before if not name.startswith("random/")}
    assert all(equal[name] for name in equal if not (more and name.startswith("optimizer/")))
    # The first micro-batch of the update is in the moments already, as the message says.
    assert all(equal.values()) != bool(more)
    update = json.loads((tmp_path / "run" / "nonfinite" / "update_00000004.json").read_text())
    assert update["update_step"] == 4
    assert torch.tensor(update["input_ids"]).shape == (1, 2, 4, 64)  # process, micro-batch, sequence, token


def test_a_run_that_loses_the_network_is_saved_and_resumes_exactly(tmp_path, flags, monkeypatch, capsys):
    """The state before the failure is saved, and the same command then resumes exactly."""
    from peft_pretraining.data import NetworkGone
    from peft_pretraining.data.loader import TrainLoader

    original = TrainLoader.__iter__

    def iterate(self):
        for number, batch in enumerate(original(self)):
            if number == 9:  # the second micro-batch of update 5; the first is returned to the loader
                raise NetworkGone("https://example.invalid/train.json.gz: no answer after 10 tries")
            yield batch

    whole = train(tmp_path / "whole", *flags, "--save_every", "100")
    with monkeypatch.context() as patch:
        patch.setattr(TrainLoader, "__iter__", iterate)
        assert torchrun_main.main([*flags, "--save_every", "100", "--save_dir", str(tmp_path / "run")]) == 1
    message = capsys.readouterr().err
    assert "no answer after 10 tries; everything up to update 4 is saved in" in message
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step_00000004"]
    assert without_times(train(tmp_path / "run", *flags, "--save_every", "100")) == without_times(whole)


def test_a_run_whose_evaluation_data_is_gone_is_saved_and_resumes_exactly(tmp_path, flags, monkeypatch, capsys):
    from peft_pretraining.data import NetworkGone
    from peft_pretraining.data.loader import EvalSet

    def gone(self):
        raise NetworkGone("https://example.invalid/validation.json.gz: no answer after 10 tries")

    whole = train(tmp_path / "whole", *flags, "--save_every", "100")
    with monkeypatch.context() as patch:
        patch.setattr(EvalSet, "_tokenised", gone)
        assert torchrun_main.main([*flags, "--save_every", "100", "--save_dir", str(tmp_path / "run")]) == 1
    assert "no answer after 10 tries; everything up to update 3 is saved in" in capsys.readouterr().err
    assert without_times(train(tmp_path / "run", *flags, "--save_every", "100")) == without_times(whole)


def test_the_printed_command_to_resume_leaves_out_continue_from(tmp_path, flags, monkeypatch, capsys):
    train(tmp_path / "run", *flags)
    ask_to_stop(monkeypatch, after_updates=2)
    start = ["--continue_from", str(tmp_path / "run" / "step_00000003"), "--save_dir", str(tmp_path / "branch")]
    assert torchrun_main.main([*flags, *start]) == 0
    said = capsys.readouterr().out
    assert f"without --continue_from {start[1]} and with --save_dir {tmp_path / 'branch'}" in said
    monkeypatch.undo()
    assert torchrun_main.main([*flags, "--save_dir", str(tmp_path / "branch")]) == 0
    assert "finished 6 updates" in capsys.readouterr().out


def test_running_out_of_memory_is_explained(tmp_path, flags, monkeypatch, capsys):
    """The message names the plan's largest entry and the flags that lower the peak."""
    import peft_pretraining.training.update as training

    def step(*args, **kwargs):
        torch.empty(2**60, dtype=torch.int8)

    monkeypatch.setattr(training, "train_step", step)
    assert torchrun_main.main([*flags, "--save_dir", str(tmp_path / "run")]) == 1
    message = capsys.readouterr().err
    assert "memory ran out" in message
    assert "most of it runtime" in message
    assert "--activation_checkpointing" in message
    assert "Traceback" not in message


def test_an_empty_held_out_split_is_refused_before_training(tmp_path, flags, capsys):
    (tmp_path / "few.txt").write_text("\n\n".join(f"Fox {number} jumps over dog 7." for number in range(3)))
    arguments = [*flags, "--dataset", str(tmp_path / "few.txt"), "--save_dir", str(tmp_path / "run")]
    assert torchrun_main.main(arguments) == 2
    assert "--eval_dataset" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_tokenizer_that_does_not_exist_is_refused_by_a_dry_run(flags, capsys):
    assert torchrun_main.main([*flags, "--tokenizer", "./missing.model", "--dry_run"]) == 2
    assert "--tokenizer ./missing.model: there is no file or folder ./missing.model" in capsys.readouterr().err


def test_a_dry_run_does_not_build_the_demo_data(tmp_path, flags, capsys, monkeypatch):
    monkeypatch.setenv("SPARSE_LORA_CACHE", str(tmp_path / "cache"))
    assert torchrun_main.main([*flags, "--dataset", "demo", "--dry_run"]) == 0
    assert "demo" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()


def test_max_train_tokens_ends_at_the_update_that_reaches_it(tmp_path, flags):
    rows = [row for row in train(tmp_path / "run", *flags, "--max_train_tokens", "1500") if "loss" in row]
    assert rows[-1]["tokens_seen"] >= 1500
    assert all(row["tokens_seen"] < 1500 for row in rows[:-1])


def test_max_train_tokens_counts_tokens_not_sequences(tmp_path, flags):
    """The published program divided by the batch size only, and trained max_length times too long."""
    rows = [row for row in train(tmp_path / "run", *flags, "--packing", "--max_train_tokens", "2560") if "loss" in row]
    assert len(rows) == 2560 // (8 * 64)


def test_report_and_generate_work_on_a_run(tmp_path, flags, capsys):
    train(tmp_path / "run", *flags, "--eval_at_start")
    capsys.readouterr()
    assert command(["report", str(tmp_path / "run")]) == 0
    table = capsys.readouterr().out
    assert "final perplexity" in table
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert command(["report", str(tmp_path / "run"), "--json", "--out", str(tmp_path / "out")]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["updates"] == 6
    arguments = ["generate", "--checkpoint", str(tmp_path / "run"), "--prompt", "Fox 1", "--max_new_tokens", "8"]
    texts = []
    for _ in range(2):
        assert command(arguments) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]  # same seed, same text
    assert texts[0].startswith("Fox 1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "nowhere"], ["nowhere", "run.json"]),
        (["generate", "--checkpoint", "nowhere"], ["nowhere"]),
        (["generate", "--checkpoint", "nowhere", "--max_new_tokens", "0"], ["--max_new_tokens 0"]),
    ],
)
def test_commands_name_an_invalid_argument(arguments, words, capsys):
    assert command(arguments) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words)


def test_help_lists_all_commands(capsys):
    """A per cent sign in a command's help must not break it."""
    with pytest.raises(SystemExit) as ended:
        command(["--help"])
    assert ended.value.code == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in COMMANDS)
