"""A failed save does not end a run, but several in a row do; a background save stores the state at the time of its call."""

import threading

import pytest
import torch

from peft_pretraining.checkpoint import saver as module
from peft_pretraining.checkpoint.saver import MOST_FAILURES, Saver, SavingFailed
from peft_pretraining.checkpoint.step_folder import Content, list_checkpoints, load_tensors, resolve
from peft_pretraining.distributed.world import World

both_ways = pytest.mark.parametrize("asynchronous", [False, True], ids=["waiting", "in the background"])


class Run:
    """A run whose only tensor is the number of its update."""

    def __init__(self, folder, **options):
        self.folder, self.step, self.tensor = folder, 0, torch.zeros(3)
        self.documents = {"state.json": {"step": 0}}
        self.saver = Saver(folder, lambda: Content(self.step, {"x": self.tensor}, self.documents), World(), **options)

    def update(self, scheduled=False):
        """Makes one update, saves if due, and returns whether it was due."""
        self.step += 1
        self.tensor += 1
        self.documents["state.json"]["step"] = self.step
        due = self.saver.due(scheduled)
        if due:
            self.saver.save()
        return due

    def saved(self):
        """Returns the steps of the checkpoints, and checks that each contains the state of its step."""
        steps = []
        for path in list_checkpoints(self.folder):
            back = torch.zeros(3)
            load_tensors(resolve(path), {"x": back})
            assert back.tolist() == [float(path.name[-8:])] * 3
            steps.append(int(back[0]))
        return steps


@pytest.fixture
def disk(monkeypatch):
    """Saves fail while `disk.full` is set, and wait while `disk.gate` is cleared."""

    class Disk:
        full = False
        gate = threading.Event()

    disk = Disk()
    disk.gate.set()
    write = module.checkpoint.save_checkpoint

    def limited(*args, **options):
        assert disk.gate.wait(60)
        if disk.full:
            raise OSError("disk full")
        return write(*args, **options)

    monkeypatch.setattr(module.checkpoint, "save_checkpoint", limited)
    return disk


@both_ways
def test_scheduled_saves_are_made(tmp_path, asynchronous):
    run = Run(tmp_path, asynchronous=asynchronous, keep=2)
    assert [run.update(scheduled=step % 2 == 0) for step in range(1, 7)] == [False, True] * 3
    run.saver.finish()
    assert run.saved() == [4, 6]


class Clock:
    """A clock that shows what a test sets."""

    seconds = 1000.0

    def __call__(self):
        return self.seconds


@both_ways
def test_a_save_is_due_by_time_once_the_interval_since_the_last_save_has_passed(tmp_path, asynchronous):
    """Since any save, a scheduled one too; and once only."""
    clock = Clock()
    run = Run(tmp_path, asynchronous=asynchronous, minutes=2, clock=clock)
    due = []
    for step in range(1, 11):
        clock.seconds += 50
        due.append(run.saver.due_by_time())
        if due[-1]:
            run.saver.save_by_time()
        run.update(scheduled=step == 5)
        run.saver._settle()
    assert due == [step in (3, 8) for step in range(1, 11)]
    assert run.saved() == [3, 5, 8]


def test_a_save_by_time_waits_for_the_save_under_way_and_not_for_training(tmp_path, disk):
    clock = Clock()
    run = Run(tmp_path, asynchronous=True, minutes=1, clock=clock)
    disk.gate.clear()
    run.update(scheduled=True)
    clock.seconds += 3600
    assert not run.saver.due_by_time()
    disk.gate.set()
    run.saver._in_flight.join()
    assert run.saver.due_by_time()
    run.saver.finish()


def test_the_time_that_a_save_takes_does_not_count(tmp_path, monkeypatch):
    """Otherwise a save that takes longer than the interval would be followed by a save after every update."""
    clock = Clock()
    run = Run(tmp_path, minutes=1, clock=clock)
    write = module.checkpoint.save_checkpoint

    def slow(*args, **options):
        clock.seconds += 90
        return write(*args, **options)

    monkeypatch.setattr(module.checkpoint, "save_checkpoint", slow)
    run.update(scheduled=True)
    assert not run.saver.due_by_time()
    clock.seconds += 60
    assert run.saver.due_by_time()


def test_only_rank_0_looks_at_its_clock(tmp_path):
    clock = Clock()
    savers = [Saver(tmp_path, dict, World(rank=rank, size=2), minutes=1, clock=clock) for rank in (0, 1)]
    without = Saver(tmp_path, dict, World(), clock=clock)
    clock.seconds += 61
    assert [saver.due_by_time() for saver in (*savers, without)] == [True, False, False]


def test_a_background_save_stores_the_state_at_its_call(tmp_path, disk):
    """Tensors and documents change while the save waits, and the next save reuses the copy's buffers."""
    run = Run(tmp_path, asynchronous=True)
    disk.gate.clear()
    run.update(scheduled=True)
    assert not run.update()
    assert not list_checkpoints(tmp_path)
    disk.gate.set()
    run.update(scheduled=True)
    run.saver.finish()
    assert run.saved() == [1, 3]
    assert '"step": 1' in (tmp_path / "step_00000001" / "state.json").read_text()


def test_only_one_save_runs_at_a_time(tmp_path, disk):
    """A save waits until the previous one has finished."""
    run = Run(tmp_path, asynchronous=True)
    disk.gate.clear()
    run.update(scheduled=True)
    second = threading.Thread(target=run.update, kwargs={"scheduled": True})
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("save-")] == ["save-step-1"]
    disk.gate.set()
    second.join()
    run.saver.finish()
    assert run.saved() == [1, 2]


@both_ways
def test_a_failed_save_gives_a_warning_and_is_repeated(tmp_path, disk, capsys, asynchronous):
    run = Run(tmp_path, asynchronous=asynchronous)
    disk.full = True
    run.update(scheduled=True)
    if asynchronous:
        run.saver._in_flight.join()
    disk.full = False
    assert run.update()  # not scheduled, but due
    assert capsys.readouterr().err.count("warning: disk full; training continues") == 1
    if asynchronous:
        run.saver._in_flight.join()
    assert not run.update()
    run.saver.finish()
    assert run.saved() == [2]


@both_ways
def test_several_failed_saves_in_a_row_end_the_run(tmp_path, disk, asynchronous):
    run = Run(tmp_path, asynchronous=asynchronous)
    run.update(scheduled=True)
    run.saver.finish()
    disk.full = True
    updates = 0
    with pytest.raises(SavingFailed, match=r"disk full \(5 consecutive attempts failed.*newest checkpoint is step_00000001"):  # noqa: PT012
        while True:
            run.update(scheduled=True)
            updates += 1
    assert updates in (MOST_FAILURES - 1, MOST_FAILURES)  # in the background the fifth failure is noticed at the next save
    assert run.saved() == [1]


@both_ways
def test_only_consecutive_failures_are_counted(tmp_path, disk, asynchronous):
    run = Run(tmp_path, asynchronous=asynchronous)
    for _ in range(3):
        disk.full = True
        for _ in range(MOST_FAILURES - 2):
            run.update(scheduled=True)
            run.saver._settle()
        disk.full = False
        run.update(scheduled=True)
        run.saver._settle()
    assert len(run.saved()) == 3


@both_ways
@pytest.mark.parametrize("recovers", [True, False])
def test_the_last_save_is_awaited_and_repeated_after_a_failure(tmp_path, disk, capsys, asynchronous, recovers):
    run = Run(tmp_path, asynchronous=asynchronous)
    disk.full = True
    run.update(scheduled=True)
    if asynchronous:
        run.saver._settle()
    disk.full = not recovers
    if recovers:
        run.saver.finish()
        assert run.saved() == [1]
    else:
        with pytest.raises(SavingFailed, match="last state is not saved: disk full; there is no checkpoint"):
            run.saver.finish()


@both_ways
def test_a_saved_state_is_not_saved_again(tmp_path, disk, asynchronous):
    """For instance after a signal just after a scheduled save, or just after a start."""
    run = Run(tmp_path, asynchronous=asynchronous, saved_step=0)
    disk.full = True
    run.saver.save()
    disk.full = False
    run.update(scheduled=True)
    run.saver._settle()
    disk.full = True
    run.saver.save()
    run.saver.finish()
    assert run.saved() == [1]


@both_ways
def test_programming_errors_in_a_save_are_raised(tmp_path, asynchronous):
    run = Run(tmp_path, asynchronous=asynchronous)
    run.documents["state.json"] = {"step": 0, "no JSON": {1, 2}}
    with pytest.raises(TypeError):  # noqa: PT012
        run.update(scheduled=True)
        run.saver.finish()
    assert not list(tmp_path.iterdir())
