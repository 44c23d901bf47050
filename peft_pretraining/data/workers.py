"""Worker processes that prepare data: torch's DataLoader without its collation, error handling and signal handling.

A worker's DataError is raised in the main process, at its position among the items. Workers ignore the
signals that stop a run, which reach the whole process group: the current update still needs their data.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from peft_pretraining.data import DataError
from peft_pretraining.distributed.world import stop_signals

# A stop signal may interrupt its constructor before it has started workers, and its destructor reads this attribute.
_MultiProcessingDataLoaderIter._shutdown = True
# Items that each worker reads ahead.
_PREFETCHED_ITEMS = 4

ItemT = TypeVar("ItemT", covariant=True)
T = TypeVar("T")


class Work(Protocol[ItemT]):
    """A picklable job; `items` yields the share of one of `workers` processes."""

    def items(self, worker: int, workers: int) -> Iterator[ItemT]: ...


class _Failure(NamedTuple):
    kind: type[DataError]
    message: str


class _WorkerItems(IterableDataset):
    def __init__(self, work: Work[Any]):
        self._work = work

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        # Only a DataLoader with workers iterates it.
        assert info is not None
        try:
            yield from self._work.items(info.id, info.num_workers)
        except DataError as error:
            yield _Failure(type(error), str(error))


class Workers(Generic[T]):
    """The items of all workers in turn: item 0 of each, then item 1 of each, ...; with 0 workers made in this process.

    Can be iterated once. Keep a reference to this object while iterating, because its processes end with it.
    """

    def __init__(self, work: Work[T], workers: int):
        self._running: _Running | None = None
        if workers == 0:
            self._items = work.items(0, 1)
            return
        self._running = _Running(work, workers)
        self._items = self._running.items()
        # Also runs at the interpreter's exit, before multiprocessing waits for its children.
        self._finalizer = weakref.finalize(self, self._running.stop)

    def __iter__(self) -> Iterator[T]:
        return self._items

    def __next__(self) -> T:
        return next(self._items)

    def close(self) -> None:
        """Stop the processes; safe to call twice."""
        if self._running is not None:
            self._finalizer()


class _Running:
    def __init__(self, work: Work[Any], workers: int):
        children_before = set(multiprocessing.active_children())
        loader: DataLoader[Any] = DataLoader(
            _WorkerItems(work),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=_PREFETCHED_ITEMS,
            worker_init_fn=partial(prepare_process, os.getpid()),
            # A DataLoader without a generator draws from the default one, which belongs to the training run.
            generator=torch.Generator(),
        )
        with _child_signals_kept():
            self._iterator: Iterator[Any] | None = iter(loader)
        self._processes = [child for child in multiprocessing.active_children() if child not in children_before]

    def items(self) -> Iterator[Any]:
        while self._iterator is not None:
            try:
                item = next(self._iterator)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise DataError(f"a data worker died ({error}); if memory ran out, lower --workers") from error
            if isinstance(item, _Failure):
                raise item.kind(item.message)
            yield item

    def stop(self) -> None:
        # Killed, because they hold nothing that could be lost, ignore SIGTERM, and may be in a long read.
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        if self._iterator is not None and not self._iterator._shutdown:  # type: ignore[attr-defined]
            # torch's own shutdown sets an event whose lock a killed worker may have held, and would wait forever. The rest of
            # it is done here: joining the workers and removing their ids.
            self._iterator._shutdown = True  # type: ignore[attr-defined]
            signal_handling._remove_worker_pids(id(self._iterator))
        self._iterator = None


@contextlib.contextmanager
def _child_signals_kept() -> Iterator[None]:
    """Keep torch from raising an error at once when a worker dies; the next item raises it, within seconds."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, handler if handler is not None else signal.SIG_DFL)


def prepare_process(parent: int, worker: int = 0) -> None:
    """Makes this process a worker: it ignores signals that stop the run, tokenises in one thread and ends with its parent."""
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)
    # The worker processes are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if multiprocessing.get_start_method() == "forkserver":
        # The fork server, which ends with the process that it forks for.
        parent = os.getppid()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process when its parent has ended; torch's watchdog checks only between items, which may be too late."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
