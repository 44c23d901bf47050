"""Writes and reads named tensors in a folder in the format of torch's distributed checkpoint (DCP), safely and hashed.

Files are hashed while they are written. Reading can neither run code nor leave the folder: DCP's index is a pickle, so it is
read by an unpickler that accepts only DCP's own classes, and its entries are checked before use.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, StorageMeta, TensorStorageMetadata

from peft_pretraining.checkpoint.manifest import Digest

INDEX = ".metadata"
# DCP's file names: one file per process and thread.
_DATA_FILE = re.compile(r"__\d+_\d+\.distcp")


class StoreError(ValueError):
    """Raised for tensor files that cannot be read or do not fit; the caller adds the folder to the message."""


def write_tensors(
    folder: Path, tensors: Mapping[str, torch.Tensor], *, alone: bool, group: dist.ProcessGroup | None
) -> dict[str, Digest]:
    """Writes tensors and flushes them to disk; returns the digests of the files that this process wrote, by file name.

    A tensor name given by several processes is written once, by one of them.

    Args:
        folder: where the files are created.
        tensors: by name; of a DTensor each process writes its part.
        alone: True if there is a single process; otherwise every process of `group` calls this.
        group: process group, None for the default one.

    Raises:
        OSError: on every process, if any process failed.
    """
    writer = _HashingWriter(folder, sync_files=True)
    try:
        with no_single_process_warning():
            dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=alone)
    except CheckpointException as error:
        # Torch wraps every failure in it and derives it from BaseException.
        if any(isinstance(failure, KeyboardInterrupt) for failure, _ in error.failures.values()):
            raise KeyboardInterrupt from None
        raise OSError(_first_failure(error)) from None
    return writer.digests()


class _HashingFile(io.RawIOBase):
    """A file opened for writing that computes the SHA-256 of its content; DCP writes files sequentially."""

    def __init__(self, file: IO[bytes]):
        super().__init__()
        self._file, self._hash, self._size = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        count = self._file.write(content)
        self._hash.update(content)
        self._size += memoryview(content).nbytes
        return count

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        # DCP asks for the number in order to call fsync, which needs Python's buffer written first.
        self._file.flush()
        return self._file.fileno()

    def digest(self) -> Digest:
        return Digest(self._size, self._hash.hexdigest())


class _HashingFileSystem(FileSystem):
    """DCP's file system that records the digest of every file it writes."""

    def __init__(self) -> None:
        self.digests: dict[str, Digest] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with Path(path).open(mode) as raw:
            if mode != "wb":
                yield raw
                return
            stream = _HashingFile(raw)
            yield stream
            self.digests[Path(path).name] = stream.digest()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.digests[Path(new_path).name] = self.digests.pop(Path(path).name)


class _HashingWriter(dcp.FileSystemWriter):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._hashing = _HashingFileSystem()
        self.fs = self._hashing

    def digests(self) -> dict[str, Digest]:
        return self._hashing.digests


@contextlib.contextmanager
def no_single_process_warning() -> Iterator[None]:
    """Suppresses DCP's warning that there is no process group, which is intended for a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _memory_format(kind: Any, name: Any) -> Any:
    """Replaces `getattr` in an index: looks up a member of DCP's memory formats by name and refuses anything else."""
    if kind is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError(f"getattr({kind!r}, {name!r}) is not allowed in a checkpoint's index")
    return _MEM_FORMAT_ENCODING[name]


class _IndexUnpickler(pickle.Unpickler):
    """An unpickler for DCP's index that refuses every class not listed here."""

    _ALLOWED = frozenset(
        [
            *(("torch.distributed.checkpoint.metadata", name) for name in (
                "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
                "ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
            )),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch._utils", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib", "WindowsPath"),
            ("pathlib._local", "PosixPath"),
        ]
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            # Python before 3.11.4 pickles a member of an enumeration as a getattr call.
            return _memory_format
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a checkpoint's index")


class _SafeReader(dcp.FileSystemReader):
    """DCP's reader whose index is read by `_IndexUnpickler` and checked."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / INDEX
        try:
            with path.open("rb") as file:
                metadata = _IndexUnpickler(file).load()
            _check_index(metadata, Path(self.path))
        except StoreError:
            raise
        except Exception as error:
            # A manipulated pickle can raise any exception.
            raise StoreError(f"{INDEX}: not the index of a checkpoint ({type(error).__name__}: {error})") from None
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata  # type: ignore[no-any-return]


def _check_index(metadata: Any, folder: Path) -> None:
    """Checks what DCP trusts: refuses files outside the folder and tensors larger than their files. Raises StoreError."""
    if not isinstance(metadata, Metadata):
        raise StoreError(f"{INDEX}: not the index of a checkpoint (it contains a {type(metadata).__name__})")
    sizes: dict[str, int] = {}
    for location in metadata.storage_data.values():
        name = location.relative_path
        if not isinstance(name, str) or not _DATA_FILE.fullmatch(name):
            raise StoreError(f"{INDEX}: names {name!r}, which is not a tensor file of this checkpoint")
        if location.transform_descriptors:
            raise StoreError(
                f"{INDEX}: {name} is transformed ({location.transform_descriptors}); only untransformed files are supported"
            )
        if name not in sizes:
            sizes[name] = _size_of_data_file(folder / name)
        if not 0 <= location.offset <= location.offset + location.length <= sizes[name]:
            raise StoreError(f"{INDEX}: places a tensor outside of {name}")
    claimed = 0
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata):
            raise StoreError(f"{INDEX}: {name!r} is not a tensor")
        if not isinstance(entry.size, torch.Size) or min(entry.size, default=0) < 0:
            raise StoreError(f"{INDEX}: {name!r} has no shape")
        claimed += entry.size.numel() * entry.properties.dtype.itemsize
    if claimed > sum(sizes.values()):
        raise StoreError(f"{INDEX}: its tensors need {claimed:,} bytes, but its files have {sum(sizes.values()):,}")


def _size_of_data_file(path: Path) -> int:
    if path.is_symlink():
        raise StoreError(f"{path.name} is a symbolic link")
    try:
        return path.stat().st_size
    except OSError as error:
        raise StoreError(f"{path.name}: {error.strerror}") from None


def tensor_index(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Returns the shape and dtype of every tensor in a folder. Raises StoreError."""
    metadata = _SafeReader(folder).read_metadata()
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fills the given tensors, in place; of a DTensor each process reads its part. Raises StoreError."""
    try:
        with no_single_process_warning():
            dcp.load({**tensors}, storage_reader=_SafeReader(folder), no_dist=True)
    except StoreError:
        raise
    except CheckpointException as error:
        raise StoreError(_first_failure(error)) from None
    except Exception as error:
        # DCP does not wrap errors caused by malformed files.
        raise StoreError(f"{type(error).__name__}: {error}") from None


def _first_failure(error: CheckpointException) -> str:
    """Returns the error of the first process that failed, without the stack trace that torch adds."""
    for failure, _ in error.failures.values():
        return f"{type(failure).__name__}: {failure}"
    return str(error)
