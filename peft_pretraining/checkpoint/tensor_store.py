"""Named tensors in a folder, as torch's distributed checkpoint (DCP) keeps them: hashed while written, read without risk.

Nothing that is read back can run code or lead out of the folder: DCP's index is a pickle, so it is read with an unpickler
that knows DCP's own classes only, and what it says is checked before it is used.
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
_DATA_FILE = re.compile(r"__\d+_\d+\.distcp")  # as DCP names them: one per process and thread


class StoreError(ValueError):
    """Tensor files that cannot be read or do not fit; the message says what is wrong, not where."""


def write_tensors(
    folder: Path, tensors: Mapping[str, torch.Tensor], *, alone: bool, group: dist.ProcessGroup | None
) -> dict[str, Digest]:
    """Write tensors, flushed to disk; every process of `group` calls it, `alone` where there is one process.

    A name that several processes give is written once, by one of them. Returns the files that this process wrote, by name.

    Raises:
        OSError: on every process, whichever of them failed.
    """
    writer = _HashingWriter(folder, sync_files=True)
    try:
        with no_single_process_warning():
            dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=alone)
    except CheckpointException as error:  # no Exception: torch derives it from BaseException, and wraps up all of them
        if any(isinstance(failure, KeyboardInterrupt) for failure, _ in error.failures.values()):
            raise KeyboardInterrupt from None
        raise OSError(_first_failure(error)) from None
    return writer.digests()


class _HashingFile(io.RawIOBase):
    """A file open for writing that keeps the SHA-256 of what went through it; DCP writes from front to end."""

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
        self._file.flush()  # whoever asks is about to call fsync
        return self._file.fileno()

    def digest(self) -> Digest:
        return Digest(self._size, self._hash.hexdigest())


class _HashingFileSystem(FileSystem):
    """DCP's access to files, with the digest of every file that was written."""

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
    """DCP warns that no process group is there, which is what we ask for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _memory_format(kind: Any, name: Any) -> Any:
    """The one use of `getattr` that an index has: a member of DCP's memory formats by its name."""
    if kind is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError(f"getattr({kind!r}, {name!r}) has no place in a checkpoint's index")
    return _MEM_FORMAT_ENCODING[name]


class _IndexUnpickler(pickle.Unpickler):
    """Reads DCP's index and nothing else: any other class in the pickle is refused."""

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
            return _memory_format  # how Python before 3.11.4 pickles a member of an enumeration
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's index")


class _SafeReader(dcp.FileSystemReader):
    """DCP's reader, with the index read by `_IndexUnpickler` and checked."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / INDEX
        try:
            with path.open("rb") as file:
                metadata = _IndexUnpickler(file).load()
            _check_index(metadata, Path(self.path))
        except StoreError:
            raise
        except Exception as error:  # a pickle that was tampered with fails in every way there is
            raise StoreError(f"{INDEX}: not the index of a checkpoint ({type(error).__name__}: {error})") from None
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata  # type: ignore[no-any-return]


def _check_index(metadata: Any, folder: Path) -> None:
    """Refuse what DCP would believe: files elsewhere, and tensors larger than the files that hold them. Raises StoreError."""
    if not isinstance(metadata, Metadata):
        raise StoreError(f"{INDEX}: not the index of a checkpoint (it holds a {type(metadata).__name__})")
    sizes: dict[str, int] = {}
    for place in metadata.storage_data.values():
        name = place.relative_path
        if not isinstance(name, str) or not _DATA_FILE.fullmatch(name):
            raise StoreError(f"{INDEX}: names {name!r}, which is no tensor file of this checkpoint")
        if place.transform_descriptors:
            raise StoreError(f"{INDEX}: {name} is transformed ({place.transform_descriptors}), which we never write")
        if name not in sizes:
            sizes[name] = _size_of_data_file(folder / name)
        if not 0 <= place.offset <= place.offset + place.length <= sizes[name]:
            raise StoreError(f"{INDEX}: places a tensor outside of {name}")
    claimed = 0
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata):
            raise StoreError(f"{INDEX}: {name!r} is no tensor")
        if not isinstance(entry.size, torch.Size) or min(entry.size, default=0) < 0:
            raise StoreError(f"{INDEX}: {name!r} has no shape")
        claimed += entry.size.numel() * entry.properties.dtype.itemsize
    if claimed > sum(sizes.values()):
        raise StoreError(f"{INDEX}: tensors of {claimed:,} bytes in files of {sum(sizes.values()):,}")


def _size_of_data_file(path: Path) -> int:
    if path.is_symlink():
        raise StoreError(f"{path.name} is a link")
    try:
        return path.stat().st_size
    except OSError as error:
        raise StoreError(f"{path.name}: {error.strerror}") from None


def tensor_index(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor in a folder. Raises StoreError."""
    metadata = _SafeReader(folder).read_metadata()
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill the given tensors, in place; each process reads what it holds of them. Raises StoreError."""
    try:
        with no_single_process_warning():
            dcp.load({**tensors}, storage_reader=_SafeReader(folder), no_dist=True)
    except StoreError:
        raise
    except CheckpointException as error:
        raise StoreError(_first_failure(error)) from None
    except Exception as error:  # DCP raises whatever its files provoke
        raise StoreError(f"{type(error).__name__}: {error}") from None


def _first_failure(error: CheckpointException) -> str:
    """What went wrong on the first process that failed; torch wraps it up with a stack trace."""
    for failure, _ in error.failures.values():
        return f"{type(failure).__name__}: {failure}"
    return str(error)
