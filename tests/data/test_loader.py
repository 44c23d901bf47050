"""The order of batches is the same for any number of ranks and workers, and when stopped and resumed anywhere."""

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from corpora import json_lines, texts

from peft_pretraining.data import DataError, lanes
from peft_pretraining.data.loader import EvalSet, TrainLoader, merge_states
from peft_pretraining.data.source import open_source
from peft_pretraining.data.workers import Workers

ROOT = Path(__file__).resolve().parents[2]
BAD_LINES = [b"broken\n", b'{"text": null}\n', b'{"text": ""}\n']


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(lanes, "WINDOW_RECORDS", 4)  # forked workers inherit it; see real_workers


@pytest.fixture
def real_workers():
    if sys.platform != "linux" or torch.multiprocessing.get_start_method() != "fork":
        pytest.skip("the small windows of these tests reach workers by fork only")


def make_loaders(source, tokenizer, ranks, workers, **options):
    defaults = {"max_length": 20, "packing": True, "lanes": 12, "seed": 5, "batch_size": 1}
    return [
        TrainLoader(source, tokenizer, rank=rank, world_size=ranks, workers=workers, **{**defaults, **options})
        for rank in range(ranks)
    ]


def take(loaders, batches):
    """Returns (input_ids, labels) of that many batches of each rank, in the global order of positions."""
    iterators = [iter(each) for each in loaders]
    taken = [[next(iterator) for _ in range(batches)] for iterator in iterators]
    rows = [[row for batch in own for row in zip(batch.input_ids, batch.labels, strict=True)] for own in taken]
    return [(ids.tolist(), labels.tolist()) for together in zip(*rows, strict=True) for ids, labels in together]


def merged_state(loaders):
    """Returns the merged state of all ranks, converted through JSON as in a checkpoint."""
    return json.loads(json.dumps(merge_states([each.state_dict() for each in loaders])))


def corpus_with_bad_lines(folder: Path, shards: int) -> Path:
    lines = [json_lines([text]) for text in texts(140)]
    for number in range(12):
        lines.insert(11 * number, BAD_LINES[number % 3])
    for shard in range(shards):
        (folder / f"c4-train.{shard}.json").write_bytes(b"".join(lines[shard::shards]))
    return folder


# --- One epoch, for a pairwise cover of ranks x workers x shards ---

# Every pair (ranks, workers), (ranks, shards), (workers, shards) with 1-4 ranks, 0-3 workers and 1-7 shards occurs.
PAIRWISE = [(1 + shards % 4, (row + shards) % 4, shards) for shards in range(1, 8) for row in range(4)] + [
    (1 + (shards + extra) % 4, (shards * 2 + extra) % 4, shards) for shards in range(1, 8) for extra in range(1, 4)
]


def test_the_cover_is_pairwise():
    values = (range(1, 5), range(4), range(1, 8))
    for a, b in itertools.combinations(range(3), 2):
        assert {(row[a], row[b]) for row in PAIRWISE} == set(itertools.product(values[a], values[b]))


def one_epoch(source, tokenizer, ranks, workers):
    """Returns the documents of the first epoch of all ranks, recognised by the states of their lanes."""
    found = []
    for each in make_loaders(source, tokenizer, ranks, workers, packing=False, max_length=400):
        epochs = dict.fromkeys(each.state_dict()["lanes"], 0)
        for turn, batch in enumerate(each):
            lane = str(each._lanes[turn % len(each._lanes)])
            epochs[lane] = each.state_dict()["lanes"][lane][0]
            if epochs[lane] == 0:
                found.append(tokenizer.decode(batch.input_ids[0]))
            if min(epochs.values()) > 0:
                break
        each.close()
    return found


@pytest.mark.parametrize(("ranks", "workers", "shards"), PAIRWISE)
def test_the_ranks_and_workers_of_an_epoch_see_each_document_once(
    write_shards, byte_tokenizer, inline_workers, ranks, workers, shards
):
    documents = texts(84)
    source = open_source(str(write_shards(documents, shards)), "train", hold_out=False)
    assert Counter(one_epoch(source, byte_tokenizer, ranks, workers)) == Counter(documents)


@pytest.mark.parametrize(("ranks", "workers", "shards"), [(2, 3, 5), (1, 2, 1)])
def test_real_worker_processes_see_each_document_once(write_shards, byte_tokenizer, real_workers, ranks, workers, shards):
    documents = texts(84)
    source = open_source(str(write_shards(documents, shards)), "train", hold_out=False)
    assert Counter(one_epoch(source, byte_tokenizer, ranks, workers)) == Counter(documents)


# --- Stop and resume on other numbers of ranks and workers ---

CHAINS = [
    [(2, 2, 12), (1, 0, 24), (3, 4, 8), (4, 3, 6), (6, 2, 8), (1, 2, 12)],
    [(1, 1, 7 * 12), (12, 1, 3), (2, 5, 18), (1, 3, 48)],
    [(3, 0, 1), (3, 1, 1), (1, 2, 6), (4, 0, 9), (2, 1, 30), (6, 0, 5), (1, 0, 60)],
    [(1, 2, 5), (1, 3, 6), (1, 0, 1), (2, 2, 24), (4, 1, 15), (1, 12, 31)],
]


def follow(chain, source, tokenizer, **options):
    """Returns sequences and final state of a run with stages (ranks, workers, batches per rank)."""
    sequences, state = [], None
    for ranks, workers, batches in chain:
        loaders = make_loaders(source, tokenizer, ranks, workers, **options)
        for each in loaders:
            if state is not None:
                each.load_state_dict(state)
        sequences += take(loaders, batches)
        state = merged_state(loaders)
        for each in loaders:
            each.close()
    return sequences, state


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("data_order", ["lanes", "global"])
@pytest.mark.parametrize(("packing", "shards"), [(True, 1), (False, 3), (True, 7)])
def test_a_chain_of_ranks_and_workers_equals_one_process(
    tmp_path, byte_tokenizer, inline_workers, chain, packing, shards, data_order
):
    """Sequences, final state and counts of bad records are equal, over several epochs and with bad lines."""
    source = open_source(str(corpus_with_bad_lines(tmp_path, shards)), "train", hold_out=False)
    total = sum(ranks * batches for ranks, _, batches in chain)
    options = {"packing": packing, "max_length": 400 if packing else 20, "data_order": data_order}
    sequences, state = follow(chain, source, byte_tokenizer, **options)
    expected, expected_state = follow([(1, 0, total)], source, byte_tokenizer, **options)
    assert sequences == expected
    assert state == expected_state
    assert state["position"] == total


@pytest.mark.parametrize("data_order", ["lanes", "global"])
def test_a_chain_with_real_worker_processes_equals_one_process(tmp_path, byte_tokenizer, real_workers, data_order):
    source = open_source(str(corpus_with_bad_lines(tmp_path, 3)), "train", hold_out=False)
    chain = [(2, 2, 30), (1, 0, 24), (3, 3, 20), (1, 2, 60)]
    sequences, state = follow(chain, source, byte_tokenizer, data_order=data_order)
    expected, expected_state = follow([(1, 0, 204)], source, byte_tokenizer, data_order=data_order)
    assert sequences == expected
    assert state == expected_state


def test_the_corpus_of_the_chains_lasts_several_epochs_and_counts_bad_lines(tmp_path, byte_tokenizer):
    """Otherwise the tests above would not test several epochs and bad records."""
    source = open_source(str(corpus_with_bad_lines(tmp_path, 3)), "train", hold_out=False)
    _, state = follow([(1, 0, 400)], source, byte_tokenizer, packing=False)
    assert min(lane[0] for lane in state["lanes"].values()) >= 2
    assert set(state["bad_records"]) == {"malformed_json", "missing_text", "empty"}


@pytest.mark.parametrize("batch_size", [1, 2, 5, 24])
def test_the_micro_batch_size_does_not_change_the_order(tmp_path, byte_tokenizer, inline_workers, batch_size):
    source = open_source(str(corpus_with_bad_lines(tmp_path, 2)), "train", hold_out=False)
    (one,) = make_loaders(source, byte_tokenizer, 1, 0, data_order="lanes")
    (other,) = make_loaders(source, byte_tokenizer, 1, 2, batch_size=batch_size, data_order="lanes")
    assert take([other], 120 // batch_size) == take([one], 120 // batch_size * batch_size)


def test_iterating_again_continues_after_the_last_batch(tmp_path, byte_tokenizer, real_workers):
    """Batches that workers had prefetched are read again, not lost."""
    source = open_source(str(corpus_with_bad_lines(tmp_path, 2)), "train", hold_out=False)
    (whole,) = make_loaders(source, byte_tokenizer, 1, 0, data_order="lanes")
    (parted,) = make_loaders(source, byte_tokenizer, 1, 2, data_order="lanes")
    assert take([parted], 7) + take([parted], 20) + take([parted], 3) == take([whole], 30)
    parted.close()
    parted.close()


# --- Batches ---


def test_batches_have_correct_shapes_and_counts(tmp_path, byte_tokenizer):
    source = open_source(str(corpus_with_bad_lines(tmp_path, 2)), "train", hold_out=False)
    for packing in (True, False):
        (each,) = make_loaders(source, byte_tokenizer, 1, 0, packing=packing, max_length=40, batch_size=6)
        for batch in itertools.islice(each, 10):
            assert batch.input_ids.shape == batch.labels.shape == (6, 40)
            assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
            valid = batch.labels != -100
            assert torch.equal(batch.labels[valid], batch.input_ids[valid])
            assert batch.num_tokens == valid.sum()
            assert batch.num_targets == valid[:, 1:].sum()
            assert packing == (batch.num_tokens == 240)
            assert (batch.input_ids[~valid] == byte_tokenizer.pad_id).all()


def test_padding_is_distinguished_from_text_that_contains_the_pad_id(tmp_path, byte_tokenizer):
    """With eos as padding id, the document's own eos is still a target."""
    byte_tokenizer.pad_id = byte_tokenizer.eos_id
    (tmp_path / "x.jsonl").write_bytes(json_lines(["abc"] * 12))
    source = open_source(str(tmp_path), "train", hold_out=False)
    (each,) = make_loaders(source, byte_tokenizer, 1, 0, packing=False, max_length=6)
    batch = next(iter(each))
    assert batch.labels.tolist() == [[99, 100, 101, 1, -100, -100]]
    assert (batch.num_tokens, batch.num_targets) == (4, 3)


@pytest.mark.parametrize("pinned", [False, True])
def test_batches_are_in_pinned_memory_if_requested(tmp_path, byte_tokenizer, monkeypatch, pinned):
    """Ids and labels, in training and evaluation; copies to a GPU from unpinned memory make the host wait."""
    (tmp_path / "x.jsonl").write_bytes(json_lines(["abc"] * 12))
    source = open_source(str(tmp_path), "train", hold_out=False)
    made = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: made.append(copy := tensor.clone()) or copy)
    (training,) = make_loaders(source, byte_tokenizer, 1, 0, pin_memory=pinned)
    held_out = EvalSet(source, byte_tokenizer, max_length=20, packing=True, max_tokens=None, pin_memory=pinned)
    batches = [next(iter(training)), *held_out]
    returned = [tensor for batch in batches for tensor in (batch.input_ids, batch.labels)]
    assert len(returned) > 4
    assert [any(tensor is copy for copy in made) for tensor in returned] == [pinned] * len(returned)


# --- States ---


def test_a_state_of_another_order_is_refused(tmp_path, byte_tokenizer):
    source = open_source(str(corpus_with_bad_lines(tmp_path, 2)), "train", hold_out=False)
    (each,) = make_loaders(source, byte_tokenizer, 1, 0)
    state = each.state_dict()
    for change in ({"seed": 6}, {"lanes": 24}, {"packing": False}, {"max_length": 21}):
        (other,) = make_loaders(source, byte_tokenizer, 1, 0, **change)
        with pytest.raises(ValueError, match="another order"):
            other.load_state_dict(state)


def test_states_that_do_not_fit_are_refused(tmp_path, byte_tokenizer):
    source = open_source(str(corpus_with_bad_lines(tmp_path, 2)), "train", hold_out=False)
    two = make_loaders(source, byte_tokenizer, 2, 0)
    with pytest.raises(ValueError, match="lacks lanes"):
        two[0].load_state_dict(two[1].state_dict())
    take(two, 1)
    merged = merged_state(two)
    (three, *_) = make_loaders(source, byte_tokenizer, 3, 0)
    with pytest.raises(ValueError, match="position 2 is no multiple of the 3 processes"):
        three.load_state_dict(merged)
    take(two[:1], 1)
    with pytest.raises(ValueError, match=r"different positions: \[2, 4\]"):
        merged_state(two)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lanes": 10, "world_size": 4}, r"--data_lanes 10: must be a multiple of the 4 processes, such as 8, 12, 16"),
        ({"lanes": 0}, "--data_lanes 0"),
        ({"max_length": 1}, "--max_length 1"),
        ({"batch_size": 0}, "--batch_size 0"),
        ({"workers": -1}, "--workers -1"),
    ],
)
def test_invalid_loader_arguments_are_refused(write_shards, byte_tokenizer, options, said):
    source = open_source(str(write_shards(texts(30))), "train")
    defaults = {"max_length": 20, "packing": True, "lanes": 12, "seed": 5}
    with pytest.raises(ValueError, match=said):
        TrainLoader(source, byte_tokenizer, **{**defaults, **options})


def test_more_workers_than_lanes_are_not_started(write_shards, byte_tokenizer, inline_workers, caplog):
    source = open_source(str(write_shards(texts(30))), "train")
    (each,) = make_loaders(source, byte_tokenizer, 1, 16, lanes=4)
    assert "--workers 16: only 4 start" in caplog.text
    (plain,) = make_loaders(source, byte_tokenizer, 1, 0, lanes=4)
    assert take([each], 20) == take([plain], 20)


# --- Bad records and errors ---


def test_the_first_bad_records_are_logged_and_all_are_counted(tmp_path, byte_tokenizer, caplog):
    lines = [json_lines([text]) for text in texts(200)]
    lines[::10] = [b"broken\n"] * 20
    (tmp_path / "x.jsonl").write_bytes(b"".join(lines))
    source = open_source(str(tmp_path), "train", hold_out=False)
    (each,) = make_loaders(source, byte_tokenizer, 1, 0, packing=False, lanes=1)
    take([each], 400)
    assert each.state_dict()["bad_records"]["malformed_json"] >= 40
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert all("x.jsonl, line " in message and "malformed json" in message for message in messages)
    assert messages[-1].endswith("further ones are only counted")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_error_in_a_worker_is_raised_unchanged(tmp_path, byte_tokenizer, workers):
    """The error has the same type and message as without workers, without the worker's traceback."""
    (tmp_path / "x.jsonl").write_bytes(json_lines(texts(30)) + b"broken\n")
    source = open_source(str(tmp_path), "train", hold_out=False)
    (each,) = make_loaders(source, byte_tokenizer, 1, workers, packing=False, on_bad_record="fail")
    with pytest.raises(DataError) as caught:
        take([each], 100)
    assert str(caught.value).startswith("bad record in ")
    assert "line 31: malformed json" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert each.state_dict()["position"] <= 30  # the state is that after the last returned batch, so it can be saved
    each.close()


def test_a_killed_worker_is_an_error_of_the_next_batch(write_shards, byte_tokenizer):
    """The error is not raised asynchronously, during an update (the loop below), but by the next batch."""
    source = open_source(str(write_shards(texts(60))), "train")
    (each,) = make_loaders(source, byte_tokenizer, 1, 2, data_order="lanes")
    iterator = iter(each)
    next(iterator)
    for process in each._running._running._processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    for _ in range(100_000):
        pass
    with pytest.raises(DataError, match="a data worker died"):
        list(itertools.islice(iterator, 10_000))
    each.close()


# --- Processes ---


def test_workers_ignore_stop_signals_and_end_with_close(write_shards, byte_tokenizer):
    """Slurm and terminals signal all processes of a run, but the current update still needs its data."""
    source = open_source(str(write_shards(texts(60))), "train")
    (each,) = make_loaders(source, byte_tokenizer, 1, 2, data_order="lanes")
    iterator = iter(each)
    next(iterator)
    processes = each._running._running._processes
    for process in processes:
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(process.pid, name)
    for _ in range(200):
        next(iterator)
    assert [process.is_alive() for process in processes] == [True, True]
    each.close()
    assert [process.is_alive() for process in processes] == [False, False]


class _Stuck:
    """Work that hangs after its first item, as a read from a failed disk does."""

    def items(self, worker, workers):
        yield worker
        time.sleep(3600)


def test_a_worker_that_hangs_does_not_delay_closing():
    workers = Workers(_Stuck(), 1)
    assert next(workers) == 0
    (process,) = workers._running._processes
    workers.close()
    assert not process.is_alive()


def test_loading_does_not_use_the_runs_random_generator(write_shards, byte_tokenizer):
    """Otherwise dropout would depend on the number of workers."""
    source = open_source(str(write_shards(texts(60))), "train")
    for workers in (0, 1):
        (each,) = make_loaders(source, byte_tokenizer, 1, workers, data_order="lanes")
        before = torch.get_rng_state()
        take([each], 5)
        each.close()
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("end", ["pass", "raise SystemExit(3)", "os.kill(os.getpid(), 9)"])
def test_workers_end_with_their_run(write_shards, tmp_path, end):
    """If the program ends, fails or is killed without closing the loader, its workers end soon."""
    folder = write_shards(texts(60))
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        import os
        from corpora import ByteTokenizer
        from peft_pretraining.data.loader import TrainLoader
        from peft_pretraining.data.source import open_source

        if __name__ == "__main__":
            loader = TrainLoader(open_source({str(folder)!r}, "train"), ByteTokenizer(), max_length=20, packing=True, lanes=12,
                                 seed=1, workers=2, data_order="lanes")
            next(iter(loader))
            print(*(process.pid for process in loader._running._running._processes), flush=True)
            {end}
        """)
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}
    ended = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == {"pass": 0, "raise SystemExit(3)": 3}.get(end, -9), ended.stderr
    assert "Traceback" not in ended.stderr
    pids = [int(pid) for pid in ended.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 60
    while any(_is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlive their run"
        time.sleep(0.1)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")
    return not (status.exists() and "\nState:\tZ" in status.read_text())


# --- Evaluation ---


def eval_set(source, tokenizer, rank=0, world_size=1, **options):
    defaults = {"max_length": 32, "packing": False, "max_tokens": None, "batch_size": 4}
    return EvalSet(source, tokenizer, rank=rank, world_size=world_size, **{**defaults, **options})


def rows(batches):
    return [row.tolist() for batch in batches for row in batch.labels]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("max_tokens", [None, 1, 500])
def test_the_eval_set_is_independent_of_batch_size_ranks_and_workers(write_shards, byte_tokenizer, packing, max_tokens):
    source = open_source(str(write_shards(texts(150), 3)), "train", hold_out=False)
    options = {"packing": packing, "max_tokens": max_tokens}
    reference = eval_set(source, byte_tokenizer, batch_size=1, **options)
    expected = rows(reference)
    assert len(expected) == reference.num_sequences
    assert sum(batch.num_targets for batch in reference) == reference.num_targets
    for batch_size, ranks, workers in [(1, 2, 0), (7, 1, 2), (32, 3, 0), (32, 1, 1), (5, 4, 3)]:
        parts = [
            eval_set(source, byte_tokenizer, rank, ranks, batch_size=batch_size, workers=workers, **options)
            for rank in range(ranks)
        ]
        own = [rows(part) for part in parts]
        assert {part.num_targets for part in parts} == {reference.num_targets}
        assert [own[i % ranks][i // ranks] for i in range(len(expected))] == expected
        assert rows(parts[0]) == own[0]  # the second pass, from memory


def test_the_eval_set_ends_with_the_sequence_that_reaches_its_tokens(write_shards, byte_tokenizer):
    source = open_source(str(write_shards(texts(150))), "train", hold_out=False)
    whole = [len([i for i in row if i != -100]) - 1 for row in rows(eval_set(source, byte_tokenizer))]
    for max_tokens in (1, whole[0], whole[0] + 1, 500, sum(whole), 10**9):
        expected = next((n for n in range(1, 151) if sum(whole[:n]) >= max_tokens), 150)
        assert eval_set(source, byte_tokenizer, max_tokens=max_tokens).num_sequences == expected


def test_the_packed_eval_set_contains_every_token_in_order(write_shards, byte_tokenizer):
    documents = texts(50)
    source = open_source(str(write_shards(documents)), "train", hold_out=False)
    ids = [i for row in rows(eval_set(source, byte_tokenizer, packing=True)) for i in row if i != -100]
    assert ids == [i for document in byte_tokenizer.encode_batch(documents) for i in [*document, 1]]


def test_an_eval_set_without_documents_is_refused(tmp_path, byte_tokenizer):
    (tmp_path / "x.jsonl").write_bytes(json_lines(["only one"]))
    held_out = [split for split in ("train", "validation") if not _documents(tmp_path, split, byte_tokenizer)]
    assert len(held_out) == 1
    with pytest.raises(DataError, match=r"split, which is chosen by a hash.*give --eval_dataset"):
        assert eval_set(open_source(str(tmp_path), held_out[0]), byte_tokenizer).num_sequences
    with pytest.raises(ValueError, match="--eval_tokens 0"):
        eval_set(open_source(str(tmp_path), "train"), byte_tokenizer, max_tokens=0)


def _documents(folder, split, tokenizer):
    try:
        return eval_set(open_source(str(folder), split), tokenizer).num_sequences
    except DataError:
        return 0


def test_bad_records_are_left_out_of_the_eval_set(tmp_path, byte_tokenizer, caplog):
    (tmp_path / "x.jsonl").write_bytes(b"broken\n" + json_lines(["one"]) + b'{"text": ""}\n' + json_lines(["two"]))
    source = open_source(str(tmp_path), "validation", hold_out=False)
    found = rows(eval_set(source, byte_tokenizer, workers=2))
    assert [byte_tokenizer.decode(i for i in row if i > 1) for row in found] == ["one", "two"]
    assert "x.jsonl, line 1: malformed" in caplog.text
