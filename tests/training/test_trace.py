"""A traced run writes a Chrome trace and a table of its updates, and trains as without."""

import gzip
import json
import re
from contextlib import contextmanager, nullcontext

import pytest
import torch
from outcomes import tensors_of, without_times
from tiny_runs import flags_of

import torchrun_main
from peft_pretraining.training.trace import Trace


def train(folder, tiny_run, *flags):
    argv = [*flags_of("sltrain", tiny_run), "--num_training_steps", "5", "--save_dir", str(folder), *flags]
    assert torchrun_main.main(argv) == 0
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events_of(path) -> list[dict]:
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def spans(events) -> int:
    """The number of updates that the profiler marks."""
    return len({event["name"] for event in events if str(event.get("name")).startswith("ProfilerStep#")})


def test_a_trace_has_the_updates_after_the_warm_up_and_changes_no_bit(tmp_path, tiny_run, capfd):
    traced, plain = (train(tmp_path / name, tiny_run, *flags) for name, flags in {"a": ["--trace", "2"], "b": []}.items())
    assert without_times(traced) == without_times(plain)
    expected, found = tensors_of(tmp_path / "b"), tensors_of(tmp_path / "a")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    folder = tmp_path / "a" / "trace"
    assert sorted(path.name for path in folder.iterdir()) == [
        "updates_00000003-00000004.rank_0.json.gz",
        "updates_00000003-00000004.rank_0.txt",
    ]
    events = events_of(folder / "updates_00000003-00000004.rank_0.json.gz")
    assert spans(events) == 2
    names = [str(event.get("name")) for event in events]
    # Each update has one optimizer step, and seven factored linears in each of the two layers.
    assert sum(name.startswith("Optimizer.step#") for name in names) == 2
    assert sum(name == "_SparseLowRankLinear" for name in names) == 2 * 14
    table = (folder / "updates_00000003-00000004.rank_0.txt").read_text()
    assert re.search(r"^ +_SparseLowRankLinear\w* ", table, re.MULTILINE)
    printed = capfd.readouterr().err
    assert "2 updates traced" in printed
    assert "profiler_start" not in printed  # torch's own lines


def test_a_run_that_ends_too_early_has_the_updates_that_it_made(tmp_path, tiny_run, capsys):
    train(tmp_path / "run", tiny_run, "--trace", "7")
    assert "notice: --trace 7: 3 of 7 updates are traced; the run ended after 5 updates" in capsys.readouterr().err
    (path,) = (tmp_path / "run" / "trace").glob("*.json.gz")
    assert path.name.startswith("updates_00000003-00000005.")
    assert spans(events_of(path)) >= 3


@pytest.mark.parametrize("made", [0, 1, 2])
def test_a_run_that_ends_in_the_warm_up_has_no_trace_and_says_so(tmp_path, made):
    said = []
    trace = Trace(tmp_path, 3, 10, 0, torch.device("cpu"), said.append)
    for _ in range(made):
        trace.after_update(nullcontext)
    trace.close()
    assert not (tmp_path / "trace").exists()
    assert said == [
        f"notice: --trace 3: 0 of 3 updates are traced; the run ended after {made} updates, of which the first 2 are warm-up"
    ]


def test_a_trace_that_cannot_be_written_costs_a_warning_of_its_process(tmp_path, capsys):
    (tmp_path / "trace").write_text("a file")
    said = []
    trace = Trace(tmp_path, 1, 0, 3, torch.device("cpu"), said.append)
    for _ in range(4):
        trace.after_update(nullcontext)
    trace.close()
    assert said == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the trace of process 3 cannot be written (")
    assert line.endswith("training continues")


def test_the_time_of_writing_is_no_time_of_training(tmp_path):
    """Only that of writing: a pause waits for all updates before it, which would slow the others."""
    pauses, made = [], 0

    @contextmanager
    def paused():
        yield pauses.append((made, list((tmp_path / "trace").glob("*.txt"))))
        assert list((tmp_path / "trace").glob("*.txt"))

    trace = Trace(tmp_path, 2, 0, 0, torch.device("cpu"), lambda _: None)
    for _ in range(6):
        made += 1
        trace.after_update(paused)
    assert pauses == [(4, [])]


@pytest.mark.gpu
def test_a_trace_on_a_gpu_has_kernels_and_a_memory_snapshot(tmp_path):
    device = torch.device("cuda")
    trace = Trace(tmp_path, 1, 0, 0, device, lambda _: None)
    for _ in range(3):
        torch.ones(512, 512, device=device) @ torch.ones(512, 512, device=device)
        trace.after_update(nullcontext)
    names = sorted(path.name.partition(".rank_0.")[2] for path in (tmp_path / "trace").iterdir())
    assert names == ["json.gz", "memory.pickle", "txt"]
    (path,) = (tmp_path / "trace").glob("*.json.gz")
    assert any(event.get("cat") == "kernel" for event in events_of(path))
