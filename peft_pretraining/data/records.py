"""Reads the records of a file in order: lines of JSON, blocks of text, rows of parquet, prepared tokens; from disk or network.

An interrupted network read continues at the record where it broke. Reading returns raw records; `document_in_split` returns the
document that a raw record holds, or why the record is bad. `Health` bounds the number of bad records and files.
"""

import contextlib
import gzip
import hashlib
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any, Literal, NamedTuple, cast

import numpy as np

from peft_pretraining.config.files import encoding_problem
from peft_pretraining.data import DataError, first_line
from peft_pretraining.data.files import content_problem
from peft_pretraining.data.network import ZstdStream, open_network_file
from peft_pretraining.data.prepared import TokenFile, TokenRecord, damaged
from peft_pretraining.data.source import HELD_OUT_ONE_IN, RetryPolicy, Shard, Source, is_remote, refuse_if_offline

UNREADABLE_FILE = "unreadable_file"
_BUFFER_BYTES = 2**18
_HEAD_BYTES = 4096
_ARROW_FILE = b"ARROW1"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Longer records, such as an endless line of a file of another kind, are skipped and never held in memory.
MAX_RECORD_BYTES = 2**28
# Number of bad records that are described in full.
MAX_EXAMPLES = 3
OnBadRecord = Literal["skip", "fail"]

# A reader stops after this many bad records if they are more than this share of all: the data is probably of another kind.
_MIN_BAD, _MAX_BAD_SHARE = 100, 0.25
# A reader also stops after this many unreadable files (of few files: this share of all) if they are more than this share of those
# that it tried.
_MIN_UNREADABLE, _MAX_UNREADABLE_SHARE = 4, 0.25


# --- Raw and bad records ---


class RawRecord(NamedTuple):
    """A record as it was read, before its text is looked at.

    number: of the record in its file, from 0. line: its first line (row for parquet), from 1, for messages. content: bytes of a
    JSON line or a text block; the value of the text column for parquet; a TokenRecord of prepared data; a BadRecord if the record
    is too long or the rest of the file cannot be read.
    """

    number: int
    line: int
    content: Any


class BadRecord(NamedTuple):
    """A record that cannot be used.

    kind: malformed_json | missing_text | text_not_string | invalid_unicode | oversized | unreadable_rest (damaged
    compression) | unreadable_file (the disk or its permissions). detail: the reason, for messages.
    """

    kind: str
    detail: str

    def in_words(self) -> str:
        """Kind and detail, for messages."""
        return f"{self.kind.replace('_', ' ')}: {self.detail}"


def place_of(record: RawRecord, shard: Shard) -> str:
    """File and line of a record, for messages."""
    if shard.format == "tokens":
        return f"{shard.url}, record {record.line} of {shard.name}"
    return f"{shard.url}, line {record.line}"


@dataclass
class SkippedRecords:
    """Skipped records: counts by kind (kinds of bad records, and "empty" documents), and messages about the first bad ones."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, kind: str, example: str | None = None) -> None:
        self.counts[kind] += 1
        if example is not None and len(self.examples) < MAX_EXAMPLES:
            self.examples.append(example)

    def take(self) -> "SkippedRecords | None":
        """Returns and clears the records skipped since the last call; None if there are none."""
        if not self.counts:
            return None
        taken = SkippedRecords(self.counts, self.examples)
        self.counts, self.examples = Counter(), []
        return taken


class Health:
    """Counts the bad records and unreadable files of one reader (a lane, an evaluation, a preparation); raises at too many."""

    def __init__(self, source: Source, on_bad_record: OnBadRecord):
        self._source, self._on_bad_record = source, on_bad_record
        self.records = self.bad = 0
        self.first_bad = ""
        # Numbers of the files that were opened.
        self.tried: set[int] = set()
        # Numbers of the files that could not be read.
        self.unreadable: set[int] = set()

    def bad_record(self, bad: BadRecord, shard_index: int, record: RawRecord) -> str:
        """Counts a bad record and returns a message about it. Raises DataError if it ends the run."""
        place = f"{place_of(record, self._source.shards[shard_index])}: {bad.in_words()}"
        if self._on_bad_record == "fail":
            raise DataError(f"bad record in {place}; repair it, or skip such records with --on_bad_record skip")
        self.bad += 1
        self.first_bad = self.first_bad or place
        if self.bad >= _MIN_BAD and self.bad > _MAX_BAD_SHARE * self.records:
            raise DataError(f"{self.bad} of {self.records} records are bad, the first one in {self.first_bad}")
        return place

    def file_unreadable(self, shard_index: int, why: str) -> None:
        """Counts a file that cannot be read to its end. Raises DataError if that ends the run."""
        place = f"{self._source.shards[shard_index].url} cannot be read: {why}"
        if self._on_bad_record == "fail":
            raise DataError(place)
        self.unreadable.add(shard_index)
        count, files = len(self.unreadable), len(self._source.shards)
        enough = count >= _MIN_UNREADABLE or count > _MAX_UNREADABLE_SHARE * files
        if enough and count > _MAX_UNREADABLE_SHARE * len(self.tried):
            raise DataError(f"{count} of {len(self.tried)} files tried cannot be read, the last one: {place}")

    def empty_lane(self, lane: int, num_lanes: int) -> DataError:
        """Returns the error for a lane that read a whole epoch without a document."""
        bad = f" ({self.bad} bad records, the first one in {self.first_bad})" if self.bad else ""
        return DataError(
            f"dataset {self._source.dataset!r} is too small for --data_lanes {num_lanes}: lane {lane} got no "
            f"document in a whole epoch{bad}; lower --data_lanes, or use --data_order global"
        )


# --- What a record holds ---


def document_in_split(record: RawRecord, shard: Shard, source: Source) -> str | np.ndarray | BadRecord | None:
    """The text of a record (of prepared data: its ids), None if it belongs to the other split, or a BadRecord.

    Raises DataError: prepared data is damaged.
    """
    if isinstance(record.content, TokenRecord):
        return _prepared_ids(record.content, record, shard, source)
    text = document_text(record, shard, source.text_field)
    return text if isinstance(text, BadRecord) or belongs_to_split(text, source) else None


def documents_in_split(records: list[RawRecord], shard: Shard, source: Source) -> list[str | np.ndarray | BadRecord | None]:
    """`document_in_split` of each record."""
    return [document_in_split(record, shard, source) for record in records]


def document_text(record: RawRecord, shard: Shard, text_field: str) -> str | BadRecord:
    """The text of a record, or a BadRecord."""
    content = record.content
    if isinstance(content, BadRecord):
        return content
    if shard.format == "json":
        try:
            content = json.loads(content)
        except UnicodeDecodeError as error:
            return _not_utf8(error)
        except (ValueError, RecursionError) as error:
            return BadRecord("malformed_json", first_line(error))
        if not isinstance(content, dict):
            return BadRecord("malformed_json", f"expected an object with a text, found {_kind(content)}")
        if text_field not in content:
            present = ", ".join(sorted(map(repr, content))[:20]) or "none"
            return BadRecord("missing_text", f"no field {text_field!r}; the fields are {present}; see --text_field")
        content = content[text_field]
    elif isinstance(content, bytes):
        # A block of a text file, or a binary column.
        try:
            content = content.decode("utf-8")
        except UnicodeDecodeError as error:
            return _not_utf8(error)
    if not isinstance(content, str):
        kind = "missing_text" if content is None else "text_not_string"
        return BadRecord(kind, f"{text_field!r} is {_kind(content)}, not a text")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        # Half of a surrogate pair, as "\ud83d" in JSON.
        return BadRecord("invalid_unicode", str(error))
    return content


def _not_utf8(error: UnicodeDecodeError) -> BadRecord:
    return BadRecord("invalid_unicode", f"{error}; text must be UTF-8, convert it with iconv")


def _prepared_ids(content: TokenRecord, record: RawRecord, shard: Shard, source: Source) -> np.ndarray | BadRecord | None:
    if content.bad:
        return BadRecord(content.bad, "it was bad when the data was prepared")
    if source.keep != "all" and content.held_out != (source.keep == "validation"):
        return None
    if source.prepared is not None and len(content.ids) and content.ids.max() >= source.prepared.vocab_size:
        raise damaged(shard.url, record.number)
    return content.ids


def belongs_to_split(text: str, source: Source) -> bool:
    """Whether a document is on the source's side of the hold-out rule."""
    return source.keep == "all" or is_held_out(text) == (source.keep == "validation")


def is_held_out(text: str) -> bool:
    """Whether a document of a data set without a validation split belongs to validation: 1 in 100 by a hash of its text."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def _kind(value: object) -> str:
    names: dict[type, str] = {
        dict: "an object",
        list: "a list",
        type(None): "null",
        bool: "true or false",
        str: "a text",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), f"of type {type(value).__name__}")


def check_source(source: Source) -> None:
    """Reads a first document of the split, to report a wrong address, field or format before anything is built.

    Raises DataError: the source is unreachable or empty, no file can be opened, the first 100 records of the first file with
    records are bad, all documents belong to the other split, or any local table has no column with the text.
    """
    _check_local_tables(source)
    of_other_split = 0
    unreadable: str | None = None
    for shard in source.shards:
        problem: str | None = None
        with contextlib.closing(read_records(shard, source)) as records:
            for record in records:
                text = document_in_split(record, shard, source)
                if isinstance(text, BadRecord):
                    if text.kind == UNREADABLE_FILE:
                        unreadable = unreadable or f"{shard.url} cannot be read: {text.detail}"
                    else:
                        problem = problem or f"{place_of(record, shard)}: {text.in_words()}"
                elif text is not None:
                    return
                else:
                    of_other_split += 1
                if record.number >= 99 and not of_other_split:
                    break
        if problem is not None and not of_other_split:
            raise DataError(f"dataset {source.dataset!r}: no usable record at the start of a file; {problem}")
    if unreadable is not None:
        raise DataError(f"dataset {source.dataset!r}: no file with a document; {unreadable}")
    if of_other_split:
        raise DataError(
            f"dataset {source.dataset!r}: none of its {of_other_split} documents is in the {source.split} split, which is "
            "chosen by a hash of the text if no file is named *validation*; name one so, or give --eval_dataset or more data"
        )
    raise DataError(f"dataset {source.dataset!r}: all {len(source.shards)} files are empty")


def _check_local_tables(source: Source) -> None:
    """Raises DataError for a Parquet or Arrow file without the column, which would end a run when its turn comes.

    Files on the network are not opened for this, and damaged ones are reported when they are read.
    """
    tables = [shard for shard in source.shards if shard.format in ("parquet", "arrow") and not is_remote(shard.url)]
    if not tables:
        return
    import pyarrow
    import pyarrow.parquet

    for shard in tables:
        with contextlib.suppress(OSError, pyarrow.ArrowInvalid), _open_binary(shard.url, source.retry) as file:
            table = pyarrow.parquet.read_schema(file) if shard.format == "parquet" else _arrow_table(file)[0].schema
            _check_columns(table.names, shard, source.text_field)


# --- Reading files ---


class WindowReader:
    """Reads the records of a source in windows, one list each; the next window continues in the open file."""

    def __init__(self, source: Source, health: Health):
        self._source, self._health = source, health
        self._shard_index: int | None = None
        self._records: Iterator[RawRecord] = iter(())
        self._next_window = 0
        # The first record of the next window.
        self._ahead: RawRecord | None = None
        self._tokens: TokenFile | None = None

    def window(self, shard_index: int, start: int, span: int, parts: int, residue: int) -> list[RawRecord] | None:
        """The records start to start + span - 1 of a file whose number is `residue` modulo `parts`, perhaps none.

        None at the end of the file.
        """
        if self._source.prepared is not None:
            return self._token_window(shard_index, start, span, parts, residue)
        if shard_index != self._shard_index or start != self._next_window:
            self.close()
            self._records = read_records(self._source.shards[shard_index], self._source, start)
            self._shard_index = shard_index
            self._health.tried.add(shard_index)
            self._ahead = self._read()
        self._next_window = start + span
        if self._ahead is None:
            return None
        window = []
        record: RawRecord | None = self._ahead
        while record is not None and record.number < start + span:
            if record.number % parts == residue:
                window.append(record)
            record = self._read()
        self._ahead = record
        return window

    def _read(self) -> RawRecord | None:
        record = next(self._records, None)
        if record is not None and isinstance(record.content, BadRecord) and record.content.kind == UNREADABLE_FILE:
            assert self._shard_index is not None
            # Each lane that reads the file notices that it is unreadable, though the record is counted in one lane only.
            self._health.file_unreadable(self._shard_index, record.content.detail)
        return record

    def _token_window(self, shard_index: int, start: int, span: int, parts: int, residue: int) -> list[RawRecord] | None:
        """`window` of prepared data, of which any record is read directly."""
        if self._tokens is None or shard_index != self._shard_index:
            self._tokens, self._shard_index = TokenFile(self._source.shards[shard_index].url), shard_index
        if start >= len(self._tokens):
            return None
        first = start + (residue - start) % parts
        numbers = range(first, min(start + span, len(self._tokens)), parts)
        contents = self._tokens.select(numbers)
        return [RawRecord(number, number + 1, content) for number, content in zip(numbers, contents, strict=True)]

    def close(self) -> None:
        """Close the file, if one is open."""
        close = getattr(self._records, "close", None)
        if close is not None:
            close()
        self._records, self._shard_index, self._ahead, self._tokens = iter(()), None, None, None


def read_records(shard: Shard, source: Source, start: int = 0) -> Generator[RawRecord]:
    """Records of a file from number `start` on; blank lines do not count as records.

    If the rest of a file is damaged (truncated or corrupt compression) or cannot be read from disk (missing, not permitted,
    broken), the last record is a BadRecord with the reason. Raises DataError: wrong kind of file, or a server refuses access;
    NetworkGone: no answer for longer than `source.retry`.
    """
    if shard.format == "tokens":
        for index, tokens in enumerate(TokenFile(shard.url).records(start), start=start):
            yield RawRecord(index, index + 1, tokens)
        return
    number, line = start - 1, 0
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(_open_binary(shard.url, source.retry))
            if shard.format in ("parquet", "arrow"):
                read_rows = _parquet_rows if shard.format == "parquet" else _arrow_rows
                records = read_rows(file, shard, source.text_field, start)
            else:
                # Not so for rows: their reader begins at the end of the file, and looking at its beginning costs a request.
                _refuse_other_content(file, shard, source)
                split = _json_lines if shard.format == "json" else _text_blocks
                records = split(stack.enter_context(_decompressed(file, shard)), shard, source.rules)
            for record in records:
                if record.number >= start:
                    yield record
                    number, line = record.number, record.line
    except (EOFError, gzip.BadGzipFile, zlib.error, _DamagedFile) as error:
        yield RawRecord(number + 1, line + 1, BadRecord("unreadable_rest", first_line(error)))
    except OSError as error:
        yield RawRecord(number + 1, line + 1, BadRecord(UNREADABLE_FILE, error.strerror or first_line(error)))


def _refuse_other_content(file: IO[bytes], shard: Shard, source: Source) -> None:
    """Raises DataError if a file's first bytes show that it is something else, such as a git-lfs pointer."""
    head = cast(io.BufferedReader, file).peek(_HEAD_BYTES)[:_HEAD_BYTES]
    if shard.compression is None and _begins_an_object(head):
        return
    if source.rules > 1 and (problem := content_problem(head, shard)) is not None:
        raise DataError(f"{shard.url} {problem}")


class _DamagedFile(Exception):
    """The content of a file cannot be decompressed or parsed from some point on."""


def _open_binary(url: str, retry: RetryPolicy) -> IO[bytes]:
    """Opens a local file or one at an fsspec address. Raises OSError, DataError."""
    path = url.removeprefix("file://").removeprefix("local://")
    if "://" not in path:
        return open(path, "rb")
    refuse_if_offline(url)
    return open_network_file(url, retry)


# --- Formats ---


@contextlib.contextmanager
def _decompressed(file: IO[bytes], shard: Shard) -> Iterator[IO[bytes]]:
    """Yields the uncompressed content of a shard's file."""
    if shard.compression is None:
        yield file
    elif shard.compression == "gzip":
        # No second buffer: at damaged data it would drop complete lines before the damage.
        with gzip.GzipFile(fileobj=file, mode="rb") as stream:
            yield cast(IO[bytes], stream)
    else:
        yield io.BufferedReader(ZstdStream(file, shard.url), _BUFFER_BYTES)


def _lines(stream: IO[bytes]) -> Iterator[bytes | None]:
    """The lines of a stream; None for one that is longer than a record may be, which is read past."""
    while line := stream.readline(MAX_RECORD_BYTES):
        if len(line) < MAX_RECORD_BYTES or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(2**20)
        yield None


def _oversized() -> BadRecord:
    return BadRecord("oversized", f"longer than {MAX_RECORD_BYTES:,} bytes")


def _json_lines(stream: IO[bytes], shard: Shard, rules: int) -> Iterator[RawRecord]:
    index = 0
    for number, line in enumerate(_lines(stream), start=1):
        if line is None:
            yield RawRecord(index, number, _oversized())
            index += 1
        # A line of nothing but a byte order mark was a bad record by the first rules.
        elif stripped := (line.removeprefix(_BYTE_ORDER_MARK) if rules > 1 else line).strip():
            if index == 0:
                _refuse_encoding(line, shard, rules)
                _refuse_json_array(stripped, shard)
            yield RawRecord(index, number, stripped)
            index += 1


def _refuse_encoding(first_line: bytes, shard: Shard, rules: int) -> None:
    """Refuses UTF-16 and UTF-32 where the file's first bytes did not show it, as in a .zst file."""
    if rules > 1 and not _begins_an_object(first_line) and (problem := encoding_problem(first_line)) is not None:
        raise DataError(f"{shard.url} {problem}")


def _begins_an_object(head: bytes) -> bool:
    """Whether these are the first bytes of a JSON object in UTF-8, as they nearly always are; no closer look is needed then."""
    return head.startswith(b"{") and 0 not in head[:4]


def _refuse_json_array(first_line: bytes, shard: Shard) -> None:
    start = first_line.removeprefix(_BYTE_ORDER_MARK)
    if start == b"[" or start.startswith((b"[{", b"[ {")):
        raise DataError(f"{shard.url} holds a JSON array, not one object per line; convert it to .jsonl")


def _text_blocks(stream: IO[bytes], shard: Shard, rules: int) -> Iterator[RawRecord]:
    """Documents of a text file: blocks of lines between blank ones, without byte order marks and carriage returns."""
    index, first = 0, 1
    block: list[bytes] = []
    # Beyond the limit, the block's lines are counted and no longer kept.
    size = 0
    for number, line in enumerate(_lines(stream), start=1):
        if line is not None and rules > 1:
            if number == 1:
                _refuse_encoding(line, shard, rules)
            line = line.removeprefix(_BYTE_ORDER_MARK)
            line = line[:-2] + b"\n" if line.endswith(b"\r\n") else line
        if line is None or line.strip():
            first = first if size else number
            size += MAX_RECORD_BYTES + 1 if line is None else len(line)
            if line is not None and size <= MAX_RECORD_BYTES:
                block.append(line)
            else:
                block = []
        elif size:
            yield RawRecord(index, first, _block_content(block, size))
            index, block, size = index + 1, [], 0
    if size:
        yield RawRecord(index, first, _block_content(block, size))


def _block_content(block: list[bytes], size: int) -> bytes | BadRecord:
    return b"".join(block).rstrip() if size <= MAX_RECORD_BYTES else _oversized()


def _parquet_rows(file: IO[bytes], shard: Shard, text_field: str, start: int) -> Iterator[RawRecord]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        _check_columns(table.schema_arrow.names, shard, text_field)
        groups = (
            (table.metadata.row_group(group).num_rows, partial(_column_of_group, table, group, text_field))
            for group in range(table.num_row_groups)
        )
        yield from _rows_from(groups, start)
    except pyarrow.ArrowInvalid as error:
        _refuse_pointer(file, shard)
        raise _DamagedFile(first_line(error)) from error


def _arrow_rows(file: IO[bytes], shard: Shard, text_field: str, start: int) -> Iterator[RawRecord]:
    """Rows of an Arrow stream, as Dataset.save_to_disk writes it, or of an Arrow file."""
    import pyarrow

    try:
        table, batches = _arrow_table(file)
        _check_columns(table.schema.names, shard, text_field)
        column = table.schema.names.index(text_field)
        yield from _rows_from(((batch.num_rows, partial(batch.column, column)) for batch in batches), start)
    except pyarrow.ArrowInvalid as error:
        _refuse_pointer(file, shard)
        raise _DamagedFile(first_line(error)) from error


def _column_of_group(table: Any, group: int, name: str) -> Any:
    return table.read_row_group(group, columns=[name]).column(0)


def _rows_from(groups: Iterable[tuple[int, Callable[[], Any]]], start: int) -> Iterator[RawRecord]:
    """Yields the texts from row `start` on. groups: (number of rows, function that reads their texts), not read if before it."""
    first = 0
    for num_rows, column in groups:
        if first + num_rows > start:
            for index, value in enumerate(column().to_pylist(), start=first):
                if index >= start:
                    yield RawRecord(index, index + 1, value)
        first += num_rows


def _arrow_table(file: IO[bytes]) -> tuple[Any, Iterable[Any]]:
    """Opens an Arrow file or stream; returns what has its schema, and its batches. Raises pyarrow.ArrowInvalid."""
    import pyarrow

    if file.read(len(_ARROW_FILE)) == _ARROW_FILE:
        table = pyarrow.ipc.open_file(file)
        return table, (table.get_batch(number) for number in range(table.num_record_batches))
    file.seek(0)
    stream = pyarrow.ipc.open_stream(file)
    return stream, stream


def _check_columns(names: list[str], shard: Shard, text_field: str) -> None:
    if text_field not in names:
        raise DataError(f"{shard.url}: no column {text_field!r}; the columns are {', '.join(map(repr, names))}; see --text_field")


def _refuse_pointer(file: IO[bytes], shard: Shard) -> None:
    """Raises DataError if a file that could not be parsed is a git-lfs pointer."""
    file.seek(0)
    if (problem := content_problem(file.read(_HEAD_BYTES), shard)) is not None:
        raise DataError(f"{shard.url} {problem}")
