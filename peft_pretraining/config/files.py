"""Reads what users write: paths with ~ and environment variables, and YAML and JSON files of names and values.

Imports only the standard library; yaml is imported when a YAML file is read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|([A-Za-z_]\w*))")


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class PathError(ValueError):
    """A path names a user or an environment variable that does not exist; the message continues a sentence about the path."""


def expanded(path: str) -> str:
    """Returns a path with a leading ~ or ~USER and every $NAME and ${NAME} replaced; in an address only ${NAME}.

    Raises PathError: an unknown user, or a variable that is not set or empty.
    """

    def value_of(match: re.Match[str]) -> str:
        name = match[1] if match[1] is not None else match[2]
        if match[1] is None and "://" in path:
            return match[0]
        if not os.environ.get(name):
            raise PathError(f"the environment variable {name} is not set or empty; set it, or write the path out")
        return os.environ[name]

    text = _VARIABLE.sub(value_of, path)
    home = os.path.expanduser(text)
    if home == text and text.startswith("~") and not os.path.lexists(text):
        raise PathError(f"there is no home folder for {text.split('/')[0]}; write the path out, or ./{text} for a name with ~")
    return home


def expanded_paths(value: Any) -> Any:
    """Returns a value of a command line with every Path in it expanded. Raises PathError naming the path."""
    if isinstance(value, list):
        return [expanded_paths(item) for item in value]
    if not isinstance(value, Path):
        return value
    try:
        return Path(expanded(str(value)))
    except PathError as error:
        raise PathError(f"{value}: {error}") from None


def encoding_problem(head: bytes) -> str | None:
    """What is wrong with the encoding of a text that begins with these bytes, with the way out; None for UTF-8."""
    encoding = json.detect_encoding(head[:4])
    if encoding.startswith("utf-8"):
        return None
    name = encoding.upper()[:6]
    return f"is {name} text, not UTF-8; convert it: iconv -f {name} -t UTF-8 OLD > NEW"


def lfs_problem(head: bytes) -> str | None:
    """Returns the problem and the way out if a file that begins with these bytes is a git-lfs pointer; else None."""
    if not head.startswith(_LFS_POINTER):
        return None
    size = re.search(rb"^size (\d+)", head, re.MULTILINE)
    real = f" of {int(size[1]):,} bytes" if size else ""
    return f"is a git-lfs pointer, not the file{real} that it stands for; run `git lfs pull` in its repository"


def beginning(path: str | Path, num_bytes: int = 4096) -> bytes:
    """Returns the first bytes of a file; none of one that cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(num_bytes)
    except OSError:
        return b""


def lfs_reason(path: str | Path, otherwise: str) -> str:
    """Returns why a file cannot be used: that it is a git-lfs pointer, if it is one; otherwise the given reason."""
    return lfs_problem(beginning(path)) or otherwise


def read_text(path: str | Path) -> str:
    """Returns the text of a UTF-8 file, its line ends as \\n and without a byte order mark.

    Raises ValueError: see `decoded`. OSError: the file cannot be read.
    """
    return decoded(Path(path).read_bytes())


def decoded(content: bytes) -> str:
    """Returns the text of a UTF-8 file's content, its line ends as \\n and without a byte order mark.

    Raises ValueError: another encoding, named where it can be told, or a git-lfs pointer.
    """
    if (problem := lfs_problem(content) or encoding_problem(content)) is not None:
        raise ValueError(problem)
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text ({error}); save it as UTF-8") from None


def read_mapping(path: str | Path) -> dict[Any, Any]:
    """Returns the names and values of a YAML file (.yaml, .yml) or a JSON file.

    Raises ValueError, its message to be put after the file's name: it cannot be read, is neither, or has a name twice.
    """
    try:
        text = read_text(path)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from None
    values = _from_yaml(text) if str(path).lower().endswith((".yaml", ".yml")) else _from_json(text)
    if not isinstance(values, dict):
        raise ValueError(f"must hold names and values, not a {type(values).__name__}")
    return values


def _from_json(text: str) -> Any:
    repeated: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        repeated.extend(name for name in names if names.count(name) > 1)
        return dict(pairs)

    try:
        values = json.loads(text, object_pairs_hook=collect)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from None
    _refuse_repeated(repeated)
    return values


def _from_yaml(text: str) -> Any:
    import yaml

    repeated: list[str] = []

    class Loader(yaml.SafeLoader):
        """A SafeLoader that notes keys given more than once in a mapping, of which it would take the last."""

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            lines: dict[str, list[int]] = {}
            for key, _ in node.value:
                lines.setdefault(str(key.value), []).append(key.start_mark.line + 1)
            repeated.extend(
                f"{name} (line{'s' if len(set(numbers)) > 1 else ''} {' and '.join(map(str, dict.fromkeys(numbers)))})"
                for name, numbers in lines.items()
                if len(numbers) > 1
            )
            return node

    try:
        values = yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"not valid YAML ({' '.join(str(error).split())})") from None
    _refuse_repeated(repeated)
    return values


def _refuse_repeated(names: Sequence[str]) -> None:
    if names:
        raise ValueError(f"given more than once: {', '.join(dict.fromkeys(names))}; keep one of each")
