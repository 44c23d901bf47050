"""Streams that report damage and survive interruptions: files on other machines, and zstd-compressed files.

A network read that breaks is retried and continues at the byte where it broke, so a decompressor or a parser sees an ordinary
file. Retried are failures that may pass: dropped connections, silence, and HTTP 408, 429 and 5xx, after the wait that the server
asks for.
"""

import asyncio
import contextlib
import glob
import http.client
import io
import posixpath
import re
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import IO, Any, TypeVar

from peft_pretraining.data import DataError, NetworkGone, causes, first_line
from peft_pretraining.data.files import Listing, RetryPolicy, Shard, add_known, format_of, is_hidden

T = TypeVar("T")

_BUFFER_BYTES = 2**18
# One request of this size at a time: an idle reader holds no connection that the server could drop.
_BLOCK_BYTES = 2**21
_SILENCE_S = 60.0
# Where a compressed file is damaged, at most this much before the damage is lost.
_ZSTD_STEP_BYTES = 2**13


def open_network_file(url: str, retry: RetryPolicy, block_bytes: int | None = None) -> IO[bytes]:
    """Opens a seekable file at an fsspec address; it is requested in blocks of `block_bytes` (default: 2 MiB).

    Reading raises DataError for errors that a retry cannot cure, and NetworkGone when all retries failed.
    """
    return io.BufferedReader(_NetworkFile(url, retry, block_bytes or _BLOCK_BYTES), _BUFFER_BYTES)


class _NetworkFile(io.RawIOBase):
    """A remote file; a read that breaks is retried from the byte where it broke."""

    def __init__(self, url: str, retry: RetryPolicy, block_bytes: int):
        self._url, self._block_bytes = url, block_bytes
        self._attempts = _Attempts(url, retry)
        self._offset = 0
        self._size: int | None = None
        self._file: Any = None
        self._file_offset = 0
        # Whether the server sends parts of files, not only whole files.
        self._ranges = True

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: 0}[whence]
        if whence == io.SEEK_END:
            base = self._retried(lambda file: int(file.size))
        self._offset = base + offset
        return self._offset

    def readinto(self, buffer: Any) -> int:
        content = self._retried(lambda file: self._read(file, len(buffer)))
        self._offset += len(content)
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._drop()
        super().close()

    def _retried(self, action: Callable[[Any], T]) -> T:
        """Returns the result of an action on the open file, retried until it succeeds. Raises DataError, NetworkGone."""
        while True:
            try:
                if self._file is None:
                    self._file, self._file_offset = self._open(), 0
                result = action(self._file)
            except Exception as error:
                # Every file system and HTTP library has its own exceptions.
                self._drop()
                if self._ranges and isinstance(error, ValueError) and "range request" in str(error):
                    self._ranges = False
                else:
                    self._attempts.wait_or_raise(error)
            else:
                self._attempts.succeeded()
                return result

    def _open(self) -> Any:
        file_system, path = file_system_of(self._url)
        file = file_system.open(path, "rb", block_size=self._block_bytes if self._ranges else 0)
        # A file opened as a stream does not report its size, so the size reported earlier is kept.
        self._size = getattr(file, "size", None) or self._size
        return file

    def _read(self, file: Any, count: int) -> bytes:
        if self._ranges and self._file_offset != self._offset:
            file.seek(self._offset)
            self._file_offset = self._offset
        while self._file_offset < self._offset:
            skipped = len(file.read(min(_BUFFER_BYTES, self._offset - self._file_offset)))
            if not skipped:
                raise ConnectionError("the transfer ended early")
            self._file_offset += skipped
        content: bytes = file.read(count)
        if not content and self._size is not None and self._offset < self._size:
            raise ConnectionError("the transfer ended early")
        self._file_offset += len(content)
        return content

    def _drop(self) -> None:
        if self._file is not None:
            # The connection may be broken already.
            with contextlib.suppress(Exception):
                self._file.close()
        self._file = None


def file_system_of(url: str) -> tuple[Any, str]:
    """Returns (fsspec file system, path in it) of an address."""
    import fsspec

    options = {}
    if url.startswith(("http://", "https://")):
        import aiohttp

        # Silence is a dropped connection; the total time is not limited, since a file may stay open for days.
        timeout = aiohttp.ClientTimeout(None, sock_connect=30, sock_read=_SILENCE_S)
        # trust_env: through the proxy that HTTP_PROXY, HTTPS_PROXY and NO_PROXY name.
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
    file_system, path = fsspec.core.url_to_fs(url, **options)
    return file_system, path


def network_file_info(url: str, retry: RetryPolicy) -> dict[str, Any]:
    """Returns what the server reports about a file: size, version tags, checksums. Raises DataError, NetworkGone."""
    attempts = _Attempts(url, retry)
    while True:
        try:
            file_system, path = file_system_of(url)
            return dict(file_system.info(path))
        except Exception as error:
            # Every file system and HTTP library has its own exceptions.
            attempts.wait_or_raise(error)


class _Attempts:
    """Counts failed attempts since the last success, waits before each retry, and raises NetworkGone after the last one."""

    # Whether this process has reached any file.
    _contact_made = False

    def __init__(self, url: str, policy: RetryPolicy):
        self._url, self._policy = url, policy
        self._failures = 0

    def succeeded(self) -> None:
        self._failures = 0
        _Attempts._contact_made = True

    def wait_or_raise(self, error: Exception) -> None:
        """Sleeps before the next attempt. Raises DataError if a retry cannot help, NetworkGone if no attempts are left."""
        if isinstance(error, ImportError):
            raise DataError(f"{self._url} cannot be read: {error}") from error
        reason = f"{type(error).__name__}: {first_line(error)}"
        if not _is_transient(error):
            raise DataError(f"{self._url} cannot be read ({reason}); check the address and your access to it") from error
        self._failures += 1
        tries = self._policy.later_tries if _Attempts._contact_made else self._policy.first_tries
        if self._failures >= tries:
            raise NetworkGone(
                f"{self._url}: no answer after {self._failures} tries ({reason}); check the network, "
                "or use --dataset demo or a local folder"
            ) from error
        wait_s = min(self._policy.longest_wait_s, self._policy.first_wait_s * 2 ** (self._failures - 1))
        time.sleep(max(wait_s, min(_retry_after_s(error), 10 * self._policy.longest_wait_s)))


def _http_status(error: BaseException) -> int | None:
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: dropped connections, timeouts, HTTP 408, 429 and 5xx."""
    chain = list(causes(error))
    for status in map(_http_status, chain):
        if status is not None:
            return status in (408, 429) or status >= 500
    # fsspec reports every HTTP failure as FileNotFoundError, so the error that caused it is examined first.
    if any(_is_connection_error(cause) for cause in chain):
        return True
    permanent = FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError
    return any(isinstance(cause, OSError) and not isinstance(cause, permanent) for cause in chain)


def _is_connection_error(error: BaseException) -> bool:
    # asyncio.TimeoutError is another class than TimeoutError before Python 3.11.
    if isinstance(error, ConnectionError | TimeoutError | asyncio.TimeoutError | http.client.HTTPException):
        return True
    return type(error).__module__.split(".")[0] in ("aiohttp", "httpx", "httpcore", "requests", "urllib3", "botocore")


def _retry_after_s(error: BaseException) -> float:
    """Returns the wait in the server's Retry-After header (seconds or a date); 0 without one."""
    for cause in causes(error):
        headers = getattr(cause, "headers", None) or getattr(getattr(cause, "response", None), "headers", None)
        value = headers.get("Retry-After") if headers is not None else None
        if value:
            try:
                return max(0.0, float(value))
            except ValueError:
                with contextlib.suppress(ValueError, TypeError):
                    return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


# --- Listing ---


def remote_listing(url: str, rules: int) -> Listing:
    """Lists a folder, file or glob at an fsspec address. Raises DataError."""
    protocol = url.split("://", 1)[0]
    try:
        file_system, path = file_system_of(url)
        path = str(path).rstrip("/")
        if glob.has_magic(path):
            info_by_name = file_system.glob(path, detail=True)
            root = posixpath.dirname(re.split(r"[*?[]", path)[0])
        elif format_of(path, rules) is not None:
            info_by_name, root = {path: file_system.info(path)}, posixpath.dirname(path)
        else:
            info_by_name, root = file_system.find(path, detail=True), path
    except (ImportError, ValueError) as error:
        raise DataError(f"dataset {url!r}: {error}") from error
    except Exception as error:
        # Every file system has its own exceptions.
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"dataset {url!r} cannot be listed ({reason}); check the address and the network") from error
    files = {name: info for name, info in info_by_name.items() if info.get("type") == "file" and not is_hidden(name[len(root) :])}
    if not files:
        raise DataError(f"dataset {url!r}: no file at this address")
    names = [(name if "://" in name else f"{protocol}://{name.lstrip('/')}", name) for name in files]
    listing = Listing()
    add_known([(address, name[len(root) :].lstrip("/")) for address, name in names], url, rules, listing)
    infos = {address: files[name] for address, name in names}
    listing.shards = [
        Shard(s.url, s.name, s.format, s.compression, infos[s.url].get("size"), _server_mark(infos[s.url]))
        for s in listing.shards
    ]
    return listing


def _server_mark(info: dict[str, object]) -> str:
    return str(next((info[key] for key in ("blob_id", "ETag", "etag", "md5Hash") if info.get(key)), ""))


# --- Streams of compressed files ---


class ZstdStream(io.RawIOBase):
    """Decompresses zstd frames; unlike the library's own stream it tells a truncated file (EOFError) from a whole one."""

    def __init__(self, file: IO[bytes], url: str):
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f"{url}: reading .zst files needs the package zstandard") from error
        self._error = zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new_frame()
        self._file = file
        self._inside_frame = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            compressed = self._file.read(_ZSTD_STEP_BYTES)
            if not compressed:
                if self._inside_frame:
                    raise EOFError("compressed file ended before the end of its last frame")
                return 0
            self._ready = memoryview(self._decompress(compressed))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, compressed: bytes) -> bytes:
        parts = []
        try:
            while compressed:
                parts.append(self._frame.decompress(compressed))
                self._inside_frame = not self._frame.eof
                compressed = b""
                if self._frame.eof:
                    compressed = self._frame.unused_data
                    self._frame = self._new_frame()
        except self._error as error:
            raise EOFError(str(error)) from error
        return b"".join(parts)
