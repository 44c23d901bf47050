"""Finds the files of a data set: which of them hold data, to which split they belong, and which only look like data.

Imports only the standard library, so that a dry run lists local files at once.
"""

import fnmatch
import glob
import hashlib
import json
import os
import posixpath
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft_pretraining.config.files import encoding_problem, lfs_problem
from peft_pretraining.data import DataError

Split = Literal["train", "validation"]
Keep = Literal["all", "train", "validation"]
Format = Literal["json", "text", "parquet", "arrow", "tokens"]
Compression = Literal["gzip", "zstd"]

# Raise it with any change of which files are read, as which split, or of what the documents of a text file are. run.json and
# prepared data record it and go on with the rules they began with. 1: links to folders and .arrow files are passed over, splits
# are told by parts of words, and text files keep byte order marks and carriage returns. 2: evaluation data is read whole even if
# it is trained on.
READING_RULES = 3

_FORMATS: dict[str, Format] = {".json": "json", ".jsonl": "json", ".txt": "text", ".parquet": "parquet", ".arrow": "arrow"}
_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
_EXTENSIONS_TEXT = ".json .jsonl .txt (also .gz and .zst of these) .parquet .arrow"
# Words of a name that tell its split; data of the split "test" is never trained on.
_SPLIT_WORDS = {
    "train": "train",
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "eval", "evaluation"), "test"),
}
# Files that the datasets library writes beside its data.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_MAGIC = {
    b"\x1f\x8b": "is compressed by gzip; add .gz to its name",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; add .zst to its name",
    b"PAR1": "is a Parquet file; name it .parquet",
    b"ARROW1": "is an Arrow file; name it .arrow",
    b"PK\x03\x04": "is a zip archive; unpack it",
    b"\xfd7zXZ\x00": "is compressed by xz; unpack it",
}
_SHOWN_NAMES = 3
_HEAD_BYTES = 4096


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


@dataclass
class Listing:
    """The data files of a data set in the order of their names. left_out: names of the other files, by reason.

    problems: by file name, what a file holds instead of data.
    """

    shards: list[Shard] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    def leave_out(self, reason: str, name: str) -> None:
        """Notes a file or folder that is not read."""
        self.left_out.setdefault(reason, []).append(name)


# --- Local files ---


def local_listing(dataset: str, path: Path, rules: int) -> Listing:
    """Lists a local folder, file or glob. Raises DataError."""
    listing = Listing()
    try:
        if path.is_dir():
            files = _folder_files(path, listing) if rules > 1 else _unlinked_files(path)
        elif path.is_file():
            files = [(str(path), path.name)]
        elif path.is_symlink():
            raise DataError(f"dataset {dataset!r}: is a broken link, to {os.readlink(path)}")
        elif glob.has_magic(str(path)):
            files = _glob_files(dataset, str(path), rules, listing)
        else:
            raise DataError(
                f"dataset {dataset!r}: no such file or folder; give c4, demo, hub:NAME, a folder, a file, a glob or an address"
            )
        add_known(files, dataset, rules, listing)
        if rules > 1:
            listing.shards = _without_unlisted(listing, dataset)
        listing.shards = [_tagged(shard, listing) for shard in listing.shards]
    except OSError as error:
        raise DataError(f"dataset {dataset!r}: cannot read {error.filename}: {error.strerror}") from error
    return listing


def _unlinked_files(root: Path) -> list[tuple[str, str]]:
    """(path, name) of the files below a folder, without those below linked folders: rules 1."""
    files = [path for path in root.rglob("*") if path.is_file() and not is_hidden(path.relative_to(root).as_posix())]
    return [(str(path), path.relative_to(root).as_posix()) for path in files]


def _folder_files(root: Path, listing: Listing) -> list[tuple[str, str]]:
    """(path, name) of the files below a folder and below the folders that links in it lead to, each folder once."""
    files: list[tuple[str, str]] = []
    seen: set[str] = set()
    # Names of folders: the root, then those that are links.
    waiting = [""]
    while waiting:
        start = waiting.pop(0)
        for place, folders, names in os.walk(root / start, onerror=_raise):
            name = Path(place).relative_to(root).as_posix().removeprefix(".")
            real = os.path.realpath(place)
            # A link to a folder around the root would read everything there, and the root again.
            if real in seen or (start and Path(real) in Path(os.path.realpath(root)).parents):
                listing.leave_out("a link to a folder that is read anyway or contains this one", name)
                folders.clear()
                continue
            seen.add(real)
            kept = [folder for folder in sorted(folders) if not _hidden_noted(posixpath.join(name, folder), listing, True)]
            waiting += [posixpath.join(name, folder) for folder in kept if os.path.islink(os.path.join(place, folder))]
            folders[:] = kept
            for file in names:
                path = os.path.join(place, file)
                if os.path.isfile(path):
                    if not _hidden_noted(posixpath.join(name, file), listing, False):
                        files.append((path, posixpath.join(name, file)))
                else:
                    _note_broken(path, posixpath.join(name, file), listing)
    return files


def _raise(error: OSError) -> None:
    raise error


def _hidden_noted(name: str, listing: Listing, folder: bool) -> bool:
    """Whether a file or folder is hidden; one that could hold data is noted in the listing."""
    last = posixpath.basename(name)
    if not is_hidden(last):
        return False
    if last.startswith("_") if folder else format_of(last, READING_RULES):
        listing.leave_out("the name begins with . or _", name)
    return True


def _note_broken(path: str, name: str, listing: Listing) -> None:
    if os.path.islink(path):
        listing.leave_out("a broken link", f"{name} -> {os.readlink(path)}")


def _glob_files(dataset: str, pattern: str, rules: int, listing: Listing) -> list[tuple[str, str]]:
    if rules > 1 and "**" in Path(pattern).parts:
        files = _recursive_matches(Path(pattern), listing)
    else:
        matches = sorted(glob.glob(pattern, recursive=True))
        files = [match for match in matches if os.path.isfile(match)]
        for match in matches if rules > 1 else []:
            if os.path.isdir(match):
                listing.leave_out("a folder, of which a pattern with ** reads the files", match)
            elif not os.path.exists(match):
                _note_broken(match, match, listing)
    if not files:
        raise DataError(f"dataset {dataset!r}: the pattern matches no file{left_out_text(listing.left_out)}")
    root = os.path.commonpath([os.path.dirname(match) for match in files])
    return [(match, Path(match).relative_to(root).as_posix()) for match in files]


def _recursive_matches(pattern: Path, listing: Listing) -> list[str]:
    """The files that a pattern with ** matches. The library's glob walks circles of links up to 40 levels deep."""
    fixed = next(number for number, part in enumerate(pattern.parts) if glob.has_magic(part))
    wanted = pattern.parts[fixed:]
    paths_and_names = _folder_files(Path(*pattern.parts[:fixed]), listing)
    return [path for path, name in paths_and_names if _matches(tuple(name.split("/")), wanted)]


def _matches(parts: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    """Whether the parts of a path match those of a pattern, in which ** stands for any number of folders."""
    if not wanted:
        return not parts
    if wanted[0] == "**":
        return any(_matches(parts[number:], wanted[1:]) for number in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], wanted[0]) and _matches(parts[1:], wanted[1:])


def _without_unlisted(listing: Listing, dataset: str) -> list[Shard]:
    """The shards without those .arrow files that the state.json of a folder written by save_to_disk does not list.

    Such files hold what datasets' map() computed. Raises DataError: a listed file is missing, or rows were selected.
    """
    listed: dict[str, set[str] | None] = {}
    for folder in {os.path.dirname(shard.url) for shard in listing.shards if shard.format == "arrow"}:
        listed[folder] = _files_of_state(Path(folder), dataset)
    kept = []
    for shard in listing.shards:
        names = listed.get(os.path.dirname(shard.url)) if shard.format == "arrow" else None
        if names is None or os.path.basename(shard.url) in names:
            kept.append(shard)
        else:
            listing.leave_out("not listed in state.json", shard.name)
    return kept


def _files_of_state(folder: Path, dataset: str) -> set[str] | None:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8-sig"))
        names = {str(entry["filename"]) for entry in state["_data_files"]}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"dataset {dataset!r}: {folder / 'state.json'} is not that of Dataset.save_to_disk ({error})") from None
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(
            f"dataset {dataset!r}: {folder} was saved with a selection or order of its rows, which is not read here; save it "
            "again: load_from_disk(OLD).flatten_indices().save_to_disk(NEW)"
        )
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise DataError(f"dataset {dataset!r}: {folder / 'state.json'} lists files that are missing: {some_of(missing)}")
    return names


def size_and_ends(path: str | Path) -> tuple[int, bytes, bytes]:
    """Returns the size of a file and its first and last 4 kB, which tell most changes without reading all of it."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
        file.seek(max(0, size - _HEAD_BYTES))
        return size, head, file.read()


def _tagged(shard: Shard, listing: Listing) -> Shard:
    """The shard with its size and tag; what its first bytes say against it is noted in the listing."""
    size, head, end = size_and_ends(shard.url)
    # The end holds the checksum of a .gz and .zst file and the footer of a .parquet one.
    tag = hashlib.blake2b(head + end, digest_size=8).hexdigest()
    if (problem := content_problem(head, shard)) is not None:
        listing.problems[shard.name] = problem
    return Shard(shard.url, shard.name, shard.format, shard.compression, size, tag)


# --- What is data ---


def is_hidden(relative_path: str) -> bool:
    """Whether a file, or a folder it lies in, has a name that begins with . or _."""
    return any(part.startswith((".", "_")) for part in relative_path.split("/") if part)


def format_of(name: str, rules: int) -> tuple[Format, Compression | None] | None:
    """Format and compression of a file by its name, None for a file of another kind."""
    stem, extension = posixpath.splitext(name.lower())
    compression = _COMPRESSIONS.get(extension)
    if compression is not None:
        extension = posixpath.splitext(stem)[1]
    file_format = _FORMATS.get(extension)
    if file_format is None or (compression and file_format in ("parquet", "arrow")):
        return None
    return None if rules == 1 and file_format == "arrow" else (file_format, compression)


def add_known(files: Iterable[tuple[str, str]], dataset: str, rules: int, listing: Listing) -> None:
    """Adds the (path, name) of known kinds to a listing, in the order of their names. Raises DataError: there are none."""
    files = sorted(files, key=lambda file: file[1])
    for url, name in files:
        kind = format_of(name, rules)
        if kind is None:
            listing.leave_out("another extension", name)
        elif rules > 1 and posixpath.basename(name) in _DESCRIPTIONS and len(files) > 1:
            listing.leave_out("describes a data set", name)
        else:
            listing.shards.append(Shard(url, name, *kind))
    if not listing.shards and files:
        names = ", ".join(sorted(name for _, name in files)[:_SHOWN_NAMES])
        raise DataError(f"dataset {dataset!r}: no file with a known extension ({_EXTENSIONS_TEXT}) among: {names}")
    if not listing.shards:
        raise DataError(f"dataset {dataset!r}: the folder holds no files{left_out_text(listing.left_out)}")


def content_problem(head: bytes, shard: Shard) -> str | None:
    """What a file holds instead of data, by its first bytes, with the way out; None if they say nothing against it."""
    if (pointer := lfs_problem(head)) is not None:
        return pointer
    if shard.compression == "gzip":
        try:
            head = zlib.decompressobj(31).decompress(head, 1024)
        except zlib.error:
            # Damage is reported when the file is read.
            return None
    elif shard.compression is not None or shard.format not in ("json", "text"):
        return None
    problem = next((text for magic, text in _MAGIC.items() if head.startswith(magic)), None)
    if problem is None and shard.format == "json" and head[:100].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        problem = "is a web page, such as a server's answer to a failed download; download the file again"
    return problem or encoding_problem(head)


# --- Which split ---


def split_files(listing: Listing, split: Split, dataset: str, hold_out: bool, rules: int) -> tuple[tuple[Shard, ...], Keep]:
    """The files of a split, and which side of the hold-out rule applies to them; files left out are noted in the listing.

    hold_out: False for a data set that is used only for evaluation. Raises DataError.
    """
    if rules == 1:
        return _split_by_parts_of_words(listing.shards, split, dataset)
    by_role: dict[str | None, list[Shard]] = {"train": [], "validation": [], "test": [], None: []}
    for shard in listing.shards:
        by_role[_role(shard.name)].append(shard)
    validation, test = by_role["validation"], by_role["test"]
    # If all files are named test, the word does not tell them apart.
    if len(test) == len(listing.shards):
        test = []
    # Files named train alone are no split: "train_travel" among other subjects.
    others_left_out = bool(by_role["train"] and (validation or test) and by_role[None])
    training = by_role["train"] if others_left_out else [s for s in listing.shards if s not in validation and s not in test]
    for_evaluation = validation or ([] if hold_out else test)
    if split == "validation" and for_evaluation:
        chosen, keep = for_evaluation, "all"
    elif not training:
        raise DataError(
            f"dataset {dataset!r}: only validation files, none to train on: {some_of([s.name for s in validation or test])}; "
            "rename those that are for training, or give them alone"
        )
    else:
        chosen, keep = training, "all" if validation else split
    for reason, files in (
        ("for training", training),
        ("for validation", validation),
        ("for tests", test),
        ("no split in the name", by_role[None] if others_left_out else []),
    ):
        if files is not chosen:
            for shard in files:
                listing.leave_out(reason, shard.name)
    return tuple(chosen), keep  # type: ignore[return-value]


def _role(name: str) -> str | None:
    """The split that a whole word of a file's name tells, or else of the folders it lies in, the innermost first."""
    for part in reversed(name.lower().split("/")):
        roles = {_SPLIT_WORDS.get(word) for word in re.findall(r"[^\W\d_]+", part)}
        for role in ("validation", "test", "train"):
            if role in roles:
                return role
    return None


def _split_by_parts_of_words(shards: list[Shard], split: Split, dataset: str) -> tuple[tuple[Shard, ...], Keep]:
    """The files of a split by rules 1: "train" and "validation" anywhere in a name."""

    def named(word: str) -> list[Shard]:
        by_file = [shard for shard in shards if word in posixpath.basename(shard.name).lower()]
        return by_file or [shard for shard in shards if word in posixpath.dirname(shard.name).lower()]

    validation = named("validation")
    train = [shard for shard in named("train") if shard not in validation]
    if split == "validation" and validation:
        return tuple(validation), "all"
    rest = train or [shard for shard in shards if shard not in validation]
    if not rest:
        raise DataError(f"dataset {dataset!r}: only validation files, none to train on: {validation[0].name}, …")
    return tuple(rest), "all" if validation else split


def some_of(names: Sequence[str]) -> str:
    """Names for a message: all if they are few, else the first ones and how many there are."""
    if len(names) <= _SHOWN_NAMES:
        return ", ".join(names)
    return f"{', '.join(names[:_SHOWN_NAMES])} and {len(names) - _SHOWN_NAMES:,} more"


def left_out_text(left_out: dict[str, Any]) -> str:
    """The files that are not read, by reason, as the end of a sentence; "" if there are none."""
    used = [f"; {reason}: {some_of(sorted(names))}" for reason, names in left_out.items() if reason.startswith("for ")]
    passed = [f"{some_of(sorted(names))} ({reason})" for reason, names in left_out.items() if not reason.startswith("for ")]
    return "".join(used) + (f"; left out: {', '.join(passed)}" if passed else "")
