"""Tokenises a data set once into files that training maps into memory; resumable at any point, with bit-identical results.

This process reads and writes, in the order of the records; others may tokenise. Source files are processed one after the other. A
file in progress has two `.partial` files and a progress file with their valid lengths, a finished one a `.done.json`. When all
are finished, the manifest replaces these.
"""

import contextlib
import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np

from peft_pretraining.data import DataError
from peft_pretraining.data.prepared import (
    BAD_KINDS,
    INDEX,
    INDEX_SUFFIX,
    JOB,
    MANIFEST,
    TOKENIZER_FOLDER,
    FileSeal,
    Job,
    Manifest,
    PreparedShard,
    ids_suffix,
    is_prepared,
    manifest_document,
    new_checksum,
    read_manifest,
    seals,
    shard_from,
    verify,
)
from peft_pretraining.data.records import (
    UNREADABLE_FILE,
    BadRecord,
    Health,
    OnBadRecord,
    RawRecord,
    document_text,
    is_held_out,
    read_records,
)
from peft_pretraining.data.source import READING_RULES, Shard, Source, open_source, prepared_folder
from peft_pretraining.data.tokenizer import Ids, Tokenizer, encode_documents
from peft_pretraining.data.workers import prepare_process

_INDEX_BYTES = np.dtype(INDEX).itemsize  # of one record
_TOGETHER = 256  # records that are encoded in one call
_COMMIT_RECORDS = 4096  # what a crash costs at most
_SPLITS: tuple[Literal["train", "validation"], ...] = ("train", "validation")


@dataclass(frozen=True)
class _Task:
    """One file of a source. number: its place among the files of the prepared data."""

    number: int
    source: Source
    shard_index: int
    split: Literal["train", "validation", "both"]

    @property
    def stem(self) -> str:
        return f"{self.number:05d}"


def prepare(
    dataset: str,
    tokenizer: Tokenizer,
    out: Path,
    *,
    text_field: str = "text",
    documents: int | None = None,
    on_bad_record: OnBadRecord = "skip",
    progress: bool = True,
    processes: int = 1,
) -> Manifest:
    """Tokenises both splits of a data set into the folder `out`, or resumes an unfinished preparation there.

    Args:
        documents: use only the first `documents` of each split; None for all.
        on_bad_record: "skip" records a bad record's place and kind; "fail" raises DataError at the first.
        progress: show a bar.
        processes: that tokenise, 1 for this process alone. The result does not depend on it.

    Raises:
        DataError: the data cannot be read, or `out` holds other files or another preparation, or is in use by another process.
        NetworkGone: no answer; the same call resumes.
    """
    if prepared_folder(dataset) is not None:
        raise DataError(f"dataset {dataset!r} is prepared already")
    rules = _rules_of(out)
    train, validation = (open_source(dataset, split, text_field=text_field, rules=rules) for split in _SPLITS)
    fingerprints = train.fingerprint, validation.fingerprint
    job = Job(dataset, text_field, documents, tokenizer.name, tokenizer.fingerprint, *fingerprints, reading_rules=rules)
    try:
        out.mkdir(parents=True, exist_ok=True)
        # The processes begin before the lock: a copy of it would outlive this process, if it is killed, until they end.
        with _Encoders(tokenizer, processes) as encoders, _locked(out):
            if is_prepared(out):
                manifest = _finished(out, job)
            else:
                manifest = _continued(out, job, _tasks(train, validation), encoders, on_bad_record, progress)
            _remove_traces(out)
    except OSError as error:
        raise DataError(f"cannot write to {error.filename or out}: {error.strerror or error}") from error
    return manifest


def _rules_of(out: Path) -> int:
    """The rules for files and splits with which a preparation began, READING_RULES for a new one."""
    if is_prepared(out):
        return read_manifest(out).job.reading_rules
    return _read_job(out).reading_rules if (out / JOB).is_file() else READING_RULES


def _tasks(train: Source, validation: Source) -> list[_Task]:
    if train.keep == "all":
        files = [(train, index, "train") for index in range(len(train.shards))]
        files += [(validation, index, "validation") for index in range(len(validation.shards))]
    else:
        files = [(train, index, "both") for index in range(len(train.shards))]
    return [_Task(number, source, index, split) for number, (source, index, split) in enumerate(files)]  # type: ignore[arg-type]


def _finished(out: Path, job: Job) -> Manifest:
    manifest = read_manifest(out)
    _refuse_other_job(out, manifest.job, job)
    for seal in seals(manifest):
        verify(out, seal)
    return manifest


def _refuse_other_job(out: Path, existing: Job, wanted: Job) -> None:
    before, now = asdict(existing), asdict(wanted)
    # The names may differ if the contents agree: the same folder by another path, a copy of the tokenizer.
    differing = [name for name in before if before[name] != now[name] and name not in ("dataset", "tokenizer")]
    if differing:
        changes = ", ".join(f"{name} {before[name]} (now {now[name]})" for name in differing)
        raise DataError(f"{out} was begun with {changes}; prepare into another --out, or remove this one")


def _continued(
    out: Path, job: Job, tasks: list[_Task], encoders: "_Encoders", on_bad_record: OnBadRecord, progress: bool
) -> Manifest:
    if (out / JOB).is_file():
        existing = _read_job(out)
        _refuse_other_job(out, existing, job)
        job = existing
    elif any(not path.name.startswith(".") for path in out.iterdir()):
        raise DataError(f"--out {out} holds other files; name a new folder")
    else:
        _write_json(out / JOB, asdict(job))
    tokenizer = encoders.tokenizer
    _save_tokenizer(tokenizer, out)
    shards: list[PreparedShard] = []
    done: Counter[str] = Counter()
    with _bar(job.documents, progress) as bar:
        for task in tasks:
            wanted = "train" if task.split == "both" else task.split
            left = None if job.documents is None else job.documents - done[wanted]
            if left == 0:
                continue
            name = task.source.shards[task.shard_index].name
            bar.set_description_str(f"file {task.number + 1} of {len(tasks)}, {wanted} {name}")
            preparation = _Preparation(out, task, encoders, Health(task.source, on_bad_record), left, bar)
            shards.append(preparation.finished() or preparation.run())
            done.update(shards[-1].counts)
    if job.documents is not None:
        shards = [_with_token_size(shard) for shard in shards]
    manifest = Manifest(job, tokenizer.text_vocab_size, tuple(shards))
    if not manifest.total("train"):
        raise DataError(f"dataset {job.dataset!r}: no document to train on")
    _write_json(out / MANIFEST, manifest_document(manifest))
    return manifest


def _with_token_size(shard: PreparedShard) -> PreparedShard:
    """Replaces the source file's size by that of the tokens: with --documents the source's sizes no longer show which files
    are about equal."""
    return PreparedShard(**{**vars(shard), "size_bytes": shard.ids.size_bytes})


def _read_job(out: Path) -> Job:
    try:
        return Job(**json.loads((out / JOB).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"{out / JOB} is damaged ({error}); remove the folder and start again") from None


def _save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    if (out / TOKENIZER_FOLDER).is_dir():
        return
    partial = out / ".tokenizer.partial"
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save(partial)
    partial.rename(out / TOKENIZER_FOLDER)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    with (out / ".lock").open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{out}: another process is preparing data there") from None
        except (ImportError, OSError):
            # This system or disk has no locks.
            pass
        yield


def _bar(total: int | None, enabled: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit=" documents", desc="train", disable=not enabled, smoothing=0.05)


# --- Tokenising, in this process or others ---


class _Encoded(NamedTuple):
    """A document. characters: of its text. held_out: by the hold-out rule, where it is asked for."""

    ids: np.ndarray
    characters: int
    held_out: bool


def _encode(
    tokenizer: Tokenizer, records: list[RawRecord], shard: Shard, text_field: str, by_rule: bool
) -> list[_Encoded | BadRecord]:
    contents = [document_text(record, shard, text_field) for record in records]
    ids = encode_documents(tokenizer, [text for text in contents if isinstance(text, str)])
    return [
        content
        if isinstance(content, BadRecord)
        else _Encoded(np.asarray(next(ids), np.int32), len(content), by_rule and is_held_out(content))
        for content in contents
    ]


_OF_WORKER: dict[str, Tokenizer] = {}


def _begin_worker(parent: int, tokenizer: Tokenizer) -> None:
    prepare_process(parent)
    _OF_WORKER["tokenizer"] = tokenizer


def _encode_in_worker(*work: Any) -> list[_Encoded | BadRecord]:
    return _encode(_OF_WORKER["tokenizer"], *work)


class _Encoders:
    """Tokenises records in several processes, or in this one; a context manager. tokens: made so far."""

    def __init__(self, tokenizer: Tokenizer, processes: int):
        self.tokenizer, self.tokens, self._processes = tokenizer, 0, processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "_Encoders":
        if self._processes > 1:
            self._pool = ProcessPoolExecutor(self._processes, initializer=_begin_worker, initargs=(os.getpid(), self.tokenizer))
            self._pool.submit(int).result()
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def encoded(
        self, records: Iterator[RawRecord], shard: Shard, text_field: str, by_rule: bool
    ) -> Iterator[tuple[list[RawRecord], list[_Encoded | BadRecord]]]:
        """Yields the records, some together, with what they hold, in their order. Raises DataError: a process died."""
        batches = iter(lambda: list(islice(records, _TOGETHER)), [])
        settings = shard, text_field, by_rule
        if self._pool is None:
            yield from ((together, _encode(self.tokenizer, together, *settings)) for together in batches)
            return
        waiting: deque[tuple[list[RawRecord], Future[list[_Encoded | BadRecord]]]] = deque()
        try:
            for together in batches:
                waiting.append((together, self._pool.submit(_encode_in_worker, together, *settings)))
                # Enough that no process waits for this one, and few enough to be held in memory.
                if len(waiting) > 2 * self._processes:
                    yield waiting[0][0], waiting.popleft()[1].result()
            while waiting:
                yield waiting[0][0], waiting.popleft()[1].result()
        except BrokenProcessPool:
            raise DataError(
                f"a process that tokenised {shard.url} died; if memory ran out, lower --processes; the same command resumes"
            ) from None


# --- One file ---


class _Preparation:
    """Tokenises one file of the source."""

    def __init__(self, out: Path, task: _Task, encoders: "_Encoders", health: Health, documents: int | None, bar: Any):
        self._out, self._task, self._encoders, self._health = out, task, encoders, health
        self._documents, self._bar = documents, bar
        self._shard = task.source.shards[task.shard_index]
        self._limited = "train" if task.split == "both" else task.split
        self._done_file = out / f".{task.stem}.done.json"

    def finished(self) -> PreparedShard | None:
        """Returns the result of an earlier call that finished the file, if its checksums still agree; otherwise None."""
        if not self._done_file.is_file():
            return None
        shard = shard_from(json.loads(self._done_file.read_text(encoding="utf-8")))
        try:
            self._put_into_place(shard)
            for seal in (shard.ids, shard.index):
                verify(self._out, seal)
        except DataError as error:
            self._bar.write(f"notice: {error}. The file is prepared again")
            self._done_file.unlink()
            return None
        self._count(shard.counts[self._limited])
        return shard

    def run(self) -> PreparedShard:
        """Tokenise the file, or the rest of it."""
        with _Writer(self._out, self._task.stem, self._encoders.tokenizer.text_vocab_size) as writer:
            self._health.records, self._health.bad = writer.counts["records"], writer.bad_records.total()
            self._count(writer.counts[self._limited])
            records = read_records(self._shard, self._task.source, writer.counts["records"])
            by_rule = self._task.split == "both"
            with contextlib.closing(records):
                for together in self._encoders.encoded(records, self._shard, self._task.source.text_field, by_rule):
                    self._add(writer, *together)
                    if self._enough(writer):
                        break
            shard = self._sealed(writer)
        _write_json(self._done_file, asdict(shard))
        self._put_into_place(shard)
        return shard

    def _add(self, writer: "_Writer", records: list[RawRecord], contents: "list[_Encoded | BadRecord]") -> None:
        by_rule = self._task.split == "both"
        before = writer.counts.copy()
        for record, content in zip(records, contents, strict=True):
            if self._enough(writer):
                break
            self._health.records += 1
            if isinstance(content, BadRecord):
                self._note_bad(writer, content, record)
            else:
                split = self._task.split if self._task.split != "both" else "validation" if content.held_out else "train"
                writer.add_document(content.ids, content.characters, split, by_rule)
        self._count(writer.counts[self._limited] - before[self._limited])
        self._encoders.tokens += sum(writer.counts[f"{split}_tokens"] - before[f"{split}_tokens"] for split in _SPLITS)
        elapsed = self._bar.format_dict["elapsed"]
        self._bar.set_postfix_str(f"{self._encoders.tokens / elapsed:,.0f} tokens/s" if elapsed else "", refresh=False)

    def _note_bad(self, writer: "_Writer", bad: BadRecord, record: RawRecord) -> None:
        if bad.kind == UNREADABLE_FILE:
            # A run has to continue without the file; a preparation can wait until it is repaired.
            raise DataError(
                f"{self._shard.url} cannot be read: {bad.detail}; repair it and run the same command again, which resumes here"
            )
        self._health.bad_record(bad, self._task.shard_index, record)
        writer.add_bad(bad.kind)

    def _enough(self, writer: "_Writer") -> bool:
        return self._documents is not None and writer.counts[self._limited] >= self._documents

    def _count(self, documents: int) -> None:
        self._bar.update(documents if self._limited == "train" else 0)

    def _sealed(self, writer: "_Writer") -> PreparedShard:
        ids, index = writer.seal()
        return PreparedShard(
            name=self._shard.name,
            split=self._task.split,
            size_bytes=self._shard.size_bytes,
            counts=dict(sorted(writer.counts.items())),
            bad_records=dict(sorted(writer.bad_records.items())),
            ids=ids,
            index=index,
        )

    def _put_into_place(self, shard: PreparedShard) -> None:
        for seal in (shard.ids, shard.index):
            partial = _partial(self._out, seal.name)
            if partial.is_file():
                partial.rename(self._out / seal.name)
        (self._out / f".{self._task.stem}.progress.json").unlink(missing_ok=True)


class _Writer:
    """Writes the files of ids and index of one source file; a context manager that closes them."""

    def __init__(self, out: Path, stem: str, vocab_size: int):
        """Opens the files, truncated to the valid lengths in the progress file."""
        self._out = out
        self._names = f"{stem}{ids_suffix(vocab_size)}", f"{stem}{INDEX_SUFFIX}"
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._progress_file = out / f".{stem}.progress.json"
        progress = self._read_progress()
        self.counts = Counter(dict.fromkeys(_COUNTS, 0) | progress["counts"])
        self.bad_records: Counter[str] = Counter(progress["bad_records"])
        # Number of ids written.
        self._end = int(progress["ids"])
        sizes = self._end * self._dtype.itemsize, self.counts["records"] * _INDEX_BYTES
        self._checksums = new_checksum(), new_checksum()
        self._files: list[IO[bytes]] = []
        for name, size, checksum in zip(self._names, sizes, self._checksums, strict=True):
            self._files.append(_reopened(_partial(out, name), size, checksum))
        self._ids: list[np.ndarray] = []
        self._index: list[tuple[int, int, int, bool]] = []

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def _read_progress(self) -> dict[str, Any]:
        empty: dict[str, Any] = {"counts": {}, "bad_records": {}, "ids": 0}
        if not self._progress_file.is_file():
            return empty
        progress: dict[str, Any] = json.loads(self._progress_file.read_text(encoding="utf-8"))
        sizes = progress["ids"] * self._dtype.itemsize, progress["counts"].get("records", 0) * _INDEX_BYTES
        for name, size in zip(self._names, sizes, strict=True):
            path = _partial(self._out, name)
            if not path.is_file() or path.stat().st_size < size:
                # A partial file was removed or cut: the preparation starts again.
                return empty
        return progress

    def add_document(self, ids: Ids, characters: int, split: str, by_rule: bool) -> None:
        """Append a document of `split`; by_rule: the hold-out rule chose the split."""
        self._ids.append(np.asarray(ids, dtype=self._dtype))
        self._end += len(ids)
        kind = split if len(ids) else "empty"
        self.counts.update({kind: 1, f"{split}_tokens": len(ids), f"{split}_characters": characters})
        self._add_record(characters, 0, by_rule and split == "validation")

    def add_bad(self, kind: str) -> None:
        """Appends an index entry for a bad record."""
        self.bad_records[kind] += 1
        self._add_record(0, BAD_KINDS.index(kind), False)

    def _add_record(self, characters: int, kind: int, held_out: bool) -> None:
        self._index.append((self._end, characters, kind, held_out))
        self.counts["records"] += 1
        if self.counts["records"] % _COMMIT_RECORDS == 0:
            self.commit()

    def commit(self) -> None:
        """Writes what was added to the disk, and then the progress file that counts it."""
        contents = b"".join(part.tobytes() for part in self._ids), np.array(self._index, dtype=INDEX).tobytes()
        for file, content, checksum in zip(self._files, contents, self._checksums, strict=True):
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            checksum.update(content)
        self._ids, self._index = [], []
        progress = {"counts": dict(self.counts), "bad_records": dict(self.bad_records), "ids": self._end}
        _write_json(self._progress_file, progress)

    def seal(self) -> tuple[FileSeal, FileSeal]:
        """Name, size and checksum of the finished files."""
        self.commit()
        ids, index = (
            FileSeal(name, file.tell(), checksum.hexdigest())
            for name, file, checksum in zip(self._names, self._files, self._checksums, strict=True)
        )
        return ids, index


_COUNTS = (
    *("records", "empty", "train", "train_tokens", "train_characters"),
    *("validation", "validation_tokens", "validation_characters"),
)


def _partial(out: Path, name: str) -> Path:
    return out / f".{name}.partial"


def _reopened(path: Path, size: int, checksum: Any) -> IO[bytes]:
    """Opens the file, created if missing, cut to `size` bytes, which are added to the checksum; positioned at its end."""
    path.touch()
    file = path.open("r+b")
    file.truncate(size)
    left = size
    while left:
        content = file.read(min(left, 2**20))
        checksum.update(content)
        left -= len(content)
    return file


def _write_json(path: Path, document: dict[str, Any]) -> None:
    """Whole or not at all, even if the machine fails."""
    partial = path.with_name(f".{path.name.lstrip('.')}.writing")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(document, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _remove_traces(out: Path) -> None:
    """What only an unfinished preparation needs."""
    for pattern in (JOB, ".*.done.json", ".*.progress.json", ".*.partial", ".*.writing"):
        for path in out.glob(pattern):
            path.unlink()
