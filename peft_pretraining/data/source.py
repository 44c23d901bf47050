"""Finds the files of a data set and the rule by which their documents belong to a split; reads no documents.

Imports neither torch nor datasets nor transformers, so that a dry run describes its data at once.
"""

import fnmatch
import glob
import hashlib
import json
import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from peft_pretraining.data import DataError, first_line
from peft_pretraining.data.demo import build_demo, demo_folder, demo_tokenizer_path
from peft_pretraining.data.prepared import (
    TOKENIZER_FOLDER,
    Manifest,
    PreparedShard,
    is_prepared,
    is_unfinished,
    read_manifest,
)

__all__ = ["DataError", "RetryPolicy", "Shard", "Source", "default_lanes", "open_source"]

Split = Literal["train", "validation"]
DataOrder = Literal["lanes", "global"]
Format = Literal["json", "text", "parquet", "tokens"]
Compression = Literal["gzip", "zstd"]

C4_URL = "hf://datasets/allenai/c4/en"
C4_SHARDS = {"train": 1024, "validation": 8}
HELD_OUT_ONE_IN = 100
# Tokenising 32 MB of English takes a core 11 (T5) to 20 s, compressed about 3 times as long. Stated in --data_order's help.
GLOBAL_ORDER_BYTES = 32_000_000
_FORMATS: dict[str, Format] = {".json": "json", ".jsonl": "json", ".txt": "text", ".parquet": "parquet"}
_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
_EXTENSIONS_TEXT = ".json .jsonl .txt (also .gz and .zst of these) .parquet"


@dataclass(frozen=True)
class Shard:
    """One file. url: local path or fsspec address. name: relative to the data set, for messages and the fingerprint."""

    url: str
    name: str
    format: Format
    compression: Compression | None = None
    size_bytes: int | None = None
    content_tag: str = ""  # distinguishes files of the same name and size: a digest or the server's tag


@dataclass(frozen=True)
class RetryPolicy:
    """How often an interrupted network read is retried; the wait doubles with each attempt.

    The first contact has fewer attempts, so that a run started without a network ends soon.
    """

    first_tries: int = 4
    later_tries: int = 10
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0


@dataclass(frozen=True)
class PreparedWith:
    """The tokenizer that made the tokens of prepared data. vocab_size: all ids lie below. summary: of the data, in words."""

    name: str
    fingerprint: str
    vocab_size: int
    summary: str


@dataclass(frozen=True)
class Source:
    """Files of one split in their order, and the rule that says which of their documents belong to it.

    keep: "all" documents, or the "train" or "validation" side of the hold-out rule (records.is_held_out). prepared: set if the
    files hold tokens. fingerprint: equal for equal files, names and rules, wherever they lie; for local files it covers names,
    sizes, and the first and last 4 kB (where a compressed file has its checksum), for prepared ones their checksums. Immutable
    and picklable.
    """

    dataset: str
    split: Split
    shards: tuple[Shard, ...]
    keep: Literal["all", "train", "validation"]
    text_field: str
    default_tokenizer: str
    location: str
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    prepared: PreparedWith | None = None

    @property
    def fingerprint(self) -> str:
        files = [[shard.name, shard.size_bytes, shard.content_tag] for shard in self.shards]
        content: list[object] = [self.split, self.keep, self.text_field, files]
        if self.prepared is not None:
            content.append(self.prepared.fingerprint)
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()

    @property
    def is_remote(self) -> bool:
        return any(is_remote(shard.url) for shard in self.shards)

    @property
    def has_sizes(self) -> bool:
        """Whether the size of every file is known."""
        return all(shard.size_bytes is not None for shard in self.shards)

    def data_order(self, packing: bool, wanted: DataOrder | None = None) -> DataOrder:
        """The order of training data. wanted: `--data_order`; without it small packed data has the global order.

        Padded, each sequence is a document, of which lanes have about equally many; packed, one long document would unbalance
        them. Prepared data records its original's sizes, so that it has the original's order. Raises DataError.
        """
        if wanted == "global" and not self.has_sizes:
            raise DataError(
                f"--data_order global: the sizes of the files of {self.dataset} are unknown, and the global order holds all text "
                "in memory; use --data_order lanes, or a local copy (`python -m peft_pretraining data fetch`)"
            )
        size = sum(shard.size_bytes or 0 for shard in self.shards)
        small = self.has_sizes and 0 < size <= GLOBAL_ORDER_BYTES
        return wanted or ("global" if packing and small else "lanes")

    def describe(self) -> str:
        """One line for the plan: data set, split, files, place, hold-out rule."""
        if not self.shards:
            return f"{self.dataset} ({self.split}): files are listed when the run starts"
        if self.prepared is not None:
            return f"{self.dataset} ({self.split}): {self.prepared.summary}"
        sizes = [shard.size_bytes for shard in self.shards]
        known_size = f", {_readable_bytes(sum(s for s in sizes if s is not None))}" if None not in sizes else ""
        files = f"{len(self.shards)} file{'s' if len(self.shards) > 1 else ''}{known_size} in {self.location}"
        rule = {
            "all": "",
            "train": f", 1 document in {HELD_OUT_ONE_IN} held out",
            "validation": f", the 1 document in {HELD_OUT_ONE_IN} held out",
        }[self.keep]
        return f"{self.dataset} ({self.split}): {files}{rule}"


def order_text(source: Source, order: DataOrder) -> str:
    """One line for the plan about the order of training data; empty for the order by lanes, which costs nothing at the start."""
    if order == "lanes":
        return ""
    cost = "read" if source.prepared is not None else "tokenised (a core takes .5 s per MB of plain text, 1.5 s compressed)"
    return f"global order, every document once per pass: all text is {cost} first, and held in memory"


def default_lanes(dataset: str) -> int:
    """Virtual readers where `--data_lanes` is not given: 64 divide C4's 1,024 files, 24 have many divisors.

    Prepared data has as many as its original, so that the order is the same.
    """
    return 64 if original_dataset(dataset) == "c4" else 24


def original_dataset(dataset: str) -> str:
    """Returns the data set that prepared data was made from; any other data set is returned unchanged."""
    folder = prepared_folder(dataset)
    if folder is None:
        return dataset
    try:
        return read_manifest(folder, check_sizes=False).job.dataset
    except DataError:  # reported when the data is opened
        return dataset


def prepared_folder(dataset: str) -> Path | None:
    """The folder of a prepared data set, None for every other data set."""
    if dataset in ("c4", "demo") or dataset.startswith("hub:") or is_remote(dataset):
        return None
    folder = _local_path(dataset)
    return folder if is_prepared(folder) else None


def open_source(
    dataset: str,
    split: Split,
    *,
    text_field: str = "text",
    cache_dir: str | Path | None = None,
    hold_out: bool = True,
    resolve: bool = True,
) -> Source:
    """Finds the files of a data set.

    Args:
        dataset: "c4" | "demo" | "hub:OWNER/NAME[/folder or pattern]" | local folder, file or glob | folder of prepared data | any
            fsspec address.
        split: chosen by `*train*` and `*validation*` in the names of files (or of their folders). Without
            validation files, 1 document in 100 of the others is held out.
        text_field: key (column) that holds a document's text in JSON and parquet files.
        cache_dir: where the demo is built (default: $SPARSE_LORA_CACHE or ~/.cache/sltrain).
        hold_out: False: if no names mark validation files, every document belongs to both splits; for a data set used only
            for evaluation.
        resolve: False: build nothing and use no network, for a dry run; unknown files are left out.

    Raises:
        DataError: no such file, no match, unknown extension, no files for the split, no network, or a damaged manifest.
    """
    if split not in ("train", "validation"):
        raise DataError(f"split {split!r}: must be train or validation")
    tokenizer, location = "t5-base", dataset
    if dataset == "c4":
        return Source(dataset, split, _c4_shards(split), "all", text_field, tokenizer, C4_URL)
    if dataset == "demo":
        folder = build_demo(cache_dir) if resolve else demo_folder(cache_dir)
        tokenizer, location = str(demo_tokenizer_path(folder)), str(folder)
        shards = _local_shards(str(folder)) if folder.is_dir() else []
    elif dataset.startswith("hub:"):
        location = "hf://datasets/" + dataset.removeprefix("hub:").strip("/")
        shards = _remote_shards(location) if resolve else []
    elif is_remote(dataset):
        shards = _remote_shards(dataset) if resolve else []
    elif (prepared := prepared_folder(dataset)) is not None:
        return _prepared_source(dataset, prepared, split, text_field, hold_out)
    else:
        shards = _local_shards(dataset)
    if not shards:
        return Source(dataset, split, (), "all", text_field, tokenizer, location)
    chosen, keep = _split_files(shards, split, dataset)
    return Source(dataset, split, chosen, keep if hold_out else "all", text_field, tokenizer, location)


def is_remote(url: str) -> bool:
    """Whether an address goes through a network or another file system than the local one."""
    return "://" in url and not url.startswith(("file://", "local://"))


# --- Files ---


def _c4_shards(split: Split) -> tuple[Shard, ...]:
    # Built instead of listed, so that a dry run needs no network; the names have not changed since 2020.
    count = C4_SHARDS[split]
    names = [f"c4-{split}.{index:05d}-of-{count:05d}.json.gz" for index in range(count)]
    return tuple(Shard(f"{C4_URL}/{name}", name, "json", "gzip") for name in names)


def _local_path(dataset: str) -> Path:
    return Path(dataset.removeprefix("file://").removeprefix("local://")).expanduser()


def _local_shards(dataset: str) -> list[Shard]:
    path = _local_path(dataset)
    if is_unfinished(path):
        raise DataError(f"dataset {dataset!r}: its preparation has not finished; run `data prepare` again, which resumes it")
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(path).as_posix())]
        shards = _with_known_extension([(str(p), p.relative_to(path).as_posix()) for p in files], dataset)
    elif path.is_file():
        shards = _with_known_extension([(str(path), path.name)], dataset)
    elif glob.has_magic(str(path)):
        matches = [p for p in glob.glob(str(path), recursive=True) if os.path.isfile(p)]
        if not matches:
            raise DataError(f"dataset {dataset!r}: the pattern matches no file")
        root = os.path.commonpath([os.path.dirname(match) for match in matches])
        shards = _with_known_extension([(m, Path(m).relative_to(root).as_posix()) for m in matches], dataset)
    else:
        raise DataError(
            f"dataset {dataset!r}: no such file or folder; give c4, demo, hub:NAME, a folder, a file, a glob or an address"
        )
    try:
        return [_with_local_tag(shard) for shard in shards]
    except OSError as error:
        raise DataError(f"dataset {dataset!r}: cannot read {error.filename}: {error.strerror}") from error


def _with_local_tag(shard: Shard) -> Shard:
    size = os.path.getsize(shard.url)
    with open(shard.url, "rb") as file:
        head = file.read(4096)
        file.seek(max(0, size - 4096))  # holds the checksum of a .gz and .zst file and the footer of a .parquet one
        tag = hashlib.blake2b(head + file.read(), digest_size=8).hexdigest()
    return Shard(shard.url, shard.name, shard.format, shard.compression, size, tag)


def _prepared_source(dataset: str, folder: Path, split: Split, text_field: str, hold_out: bool) -> Source:
    manifest = read_manifest(folder)
    job = manifest.job
    if text_field not in ("text", job.text_field):
        raise DataError(
            f"--text_field {text_field}: {dataset} was prepared from the field {job.text_field!r}; leave the flag out"
        )
    chosen = [shard for shard in manifest.shards if shard.split in (split, "both")]
    if not sum(shard.counts[split] for shard in chosen):
        raise DataError(f"dataset {dataset!r}: no document of the {split} split was prepared")
    shards = tuple(
        Shard(
            str(folder / shard.ids.name),
            shard.name,
            "tokens",
            size_bytes=shard.size_bytes,
            content_tag=f"{shard.ids.checksum} {shard.index.checksum}",
        )
        for shard in chosen
    )
    uses_rule = hold_out and any(shard.split == "both" for shard in chosen)
    return Source(
        dataset,
        split,
        shards,
        split if uses_rule else "all",
        job.text_field,
        str(folder / TOKENIZER_FOLDER),
        str(folder),
        prepared=PreparedWith(job.tokenizer, job.tokenizer_fingerprint, manifest.vocab_size, _summary(manifest, chosen, split)),
    )


def _summary(manifest: Manifest, shards: Sequence[PreparedShard], split: Split) -> str:
    documents, tokens = (sum(shard.counts[name] for shard in shards) for name in (split, f"{split}_tokens"))
    files = f"{len(shards)} file{'s' if len(shards) > 1 else ''}"
    job = manifest.job
    return f"{documents:,} documents, {tokens:,} tokens of {job.tokenizer}, prepared from {job.dataset}, {files}"


def _remote_shards(url: str) -> list[Shard]:
    refuse_if_offline(url)
    import fsspec

    protocol = url.split("://", 1)[0]
    try:
        file_system, path = fsspec.core.url_to_fs(url)
        path = str(path).rstrip("/")
        if glob.has_magic(path):
            listing = file_system.glob(path, detail=True)
            root = posixpath.dirname(re.split(r"[*?[]", path)[0])
        elif _format_of(path) is not None:
            listing, root = {path: file_system.info(path)}, posixpath.dirname(path)
        else:
            listing, root = file_system.find(path, detail=True), path
    except (ImportError, ValueError) as error:
        raise DataError(f"dataset {url!r}: {error}") from error
    except Exception as error:  # every file system has its own exceptions
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"dataset {url!r} cannot be listed ({reason}); check the address and the network") from error
    files = {name: info for name, info in listing.items() if info.get("type") == "file" and not _is_hidden(name[len(root) :])}
    if not files:
        raise DataError(f"dataset {url!r}: no file at this address")
    names = [(name if "://" in name else f"{protocol}://{name.lstrip('/')}", name) for name in files]
    shards = _with_known_extension([(address, name[len(root) :].lstrip("/")) for address, name in names], url)
    infos = {address: files[name] for address, name in names}
    return [Shard(s.url, s.name, s.format, s.compression, infos[s.url].get("size"), _server_mark(infos[s.url])) for s in shards]


def _server_mark(info: dict[str, object]) -> str:
    return str(next((info[key] for key in ("blob_id", "ETag", "etag", "md5Hash") if info.get(key)), ""))


def refuse_if_offline(url: str) -> None:
    """Raises DataError if `url` is on the hub and an environment variable forbids network access."""
    if not url.startswith("hf://"):
        return
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}:
            raise DataError(f"{url} is on the hub and {variable} is set: unset it, or give --dataset a local folder or demo")


def _is_hidden(relative_path: str) -> bool:
    return any(part.startswith((".", "_")) for part in relative_path.split("/") if part)


def _format_of(name: str) -> tuple[Format, Compression | None] | None:
    stem, extension = posixpath.splitext(name.lower())
    compression = _COMPRESSIONS.get(extension)
    if compression is not None:
        extension = posixpath.splitext(stem)[1]
    file_format = _FORMATS.get(extension)
    if file_format is None or (compression and file_format == "parquet"):
        return None
    return file_format, compression


def _with_known_extension(files: Sequence[tuple[str, str]], dataset: str) -> list[Shard]:
    """Shards in the order of their names; files of other kinds (a README) are passed over unless there is nothing else."""
    shards = []
    for url, name in sorted(files, key=lambda file: file[1]):
        kind = _format_of(name)
        if kind is not None:
            shards.append(Shard(url, name, *kind))
    if not shards and files:
        names = ", ".join(sorted(name for _, name in files)[:3])
        raise DataError(f"dataset {dataset!r}: no file with a known extension ({_EXTENSIONS_TEXT}) among: {names}")
    if not shards:
        raise DataError(f"dataset {dataset!r}: the folder holds no files")
    return shards


def _split_files(
    shards: list[Shard], split: Split, dataset: str
) -> tuple[tuple[Shard, ...], Literal["all", "train", "validation"]]:
    """The files of a split, and which side of the hold-out rule applies to them."""
    validation = _named(shards, "validation")
    train = [shard for shard in _named(shards, "train") if shard not in validation]
    if split == "validation" and validation:
        return tuple(validation), "all"
    # Without files named train, all that are not validation are for training; with them, others (test) are left out.
    rest = train or [shard for shard in shards if shard not in validation]
    if not rest:
        raise DataError(f"dataset {dataset!r}: only validation files, none to train on: {validation[0].name}, …")
    return tuple(rest), "all" if validation else split


def _named(shards: list[Shard], word: str) -> list[Shard]:
    """Shards with `word` in their file names, or else in their folders' names below the data set's root."""
    by_file = [shard for shard in shards if fnmatch.fnmatch(posixpath.basename(shard.name).lower(), f"*{word}*")]
    return by_file or [shard for shard in shards if word in posixpath.dirname(shard.name).lower()]


def _readable_bytes(count: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"
