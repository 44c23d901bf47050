"""Builds the demo data set: English technical prose from the installed Python packages, in C4's file format.

The text comes from the docstrings of the standard library, torch, transformers, numpy and sympy (read from their source
files; nothing is imported or run) and from the topic pages of `pydoc`. Code samples are removed, a repeated paragraph is
kept once, and a hash of the text assigns each document to training or validation. A SentencePiece tokenizer is trained on
the training split. The result depends only on the installed versions, so it is built once per set of versions.
"""

import ast
import contextlib
import gzip
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import re
import shutil
import sysconfig
import tempfile
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

from peft_pretraining.config.dataset_list import DEMOS
from peft_pretraining.data import DataError
from peft_pretraining.data.sentencepiece_training import train_sentencepiece

PACKAGES = ("torch", "transformers", "numpy", "sympy")
TRAIN_SHARDS = 4
# One document in 50 is held out, about 300: one in 100 would give a noisier perplexity.
VALIDATION_ONE_IN = 50
MIN_CHARACTERS = 200
# Part of the folder's name: increase it with every change of the text or the tokenizer.
FORMAT_VERSION = 3
_SKIPPED_PATHS = re.compile(r"(^|/)(tests?|testing|idlelib|lib2to3|site-packages|dist-packages|__pycache__)/|(^|/)test_")
_COMMON_WORDS = re.compile(
    r"\b(a|an|and|are|as|be|by|can|for|from|if|in|is|it|not|of|on|or|that|the|this|to|will|with)\b", re.IGNORECASE
)


def default_cache_dir() -> Path:
    """Returns the cache folder: $SPARSE_LORA_CACHE, or ~/.cache/sltrain."""
    configured = os.environ.get("SPARSE_LORA_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "sltrain"


def demo_folder(cache_dir: str | Path | None = None, vocab_size: int = DEMOS["demo"]) -> Path:
    """Returns the folder that `build_demo` creates for the installed versions; it may not exist yet."""
    versions = [f"format {FORMAT_VERSION}", f"python {platform.python_version()}", f"vocabulary {vocab_size}"]
    for package in (*PACKAGES, "sentencepiece"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    key = hashlib.blake2b("\n".join(versions).encode(), digest_size=6).hexdigest()
    return (Path(cache_dir) if cache_dir else default_cache_dir()) / f"demo-{key}"


def demo_tokenizer_path(folder: str | Path) -> Path:
    """Returns the path of the SentencePiece model in a folder made by `build_demo`, for `load_tokenizer`."""
    return Path(folder) / "demo.model"


def build_demo(cache_dir: str | Path | None = None, vocab_size: int = DEMOS["demo"]) -> Path:
    """Builds the demo shards and tokenizer if they do not exist yet, and returns their folder.

    The folder holds `demo-train.0000i-of-00004.json.gz`, `demo-validation.00000-of-00001.json.gz`, `demo.model`
    (SentencePiece BPE, pad 0, eos 1, unk 2, no bos, byte fallback, `vocab_size` pieces) and `demo.json` with counts.
    It is built under a temporary name and renamed, so it appears complete or not at all. If several processes call this, one
    builds and the others wait. Raises DataError if the cache folder cannot be written.
    """
    folder = demo_folder(cache_dir, vocab_size)
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _build_into_place(folder, vocab_size)
    except OSError as error:
        raise DataError(
            f"cannot build the demo data in {folder.parent}: {error.strerror or error}; "
            "set SPARSE_LORA_CACHE to a writable folder"
        ) from error
    return folder


def _build_into_place(folder: Path, vocab_size: int) -> None:
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        documents = collect_documents()
        train = [d for d in documents if not _is_validation(d[1])]
        validation = [d for d in documents if _is_validation(d[1])]
        for index in range(TRAIN_SHARDS):
            _write_shard(building / f"demo-train.{index:05d}-of-{TRAIN_SHARDS:05d}.json.gz", train[index::TRAIN_SHARDS])
        _write_shard(building / "demo-validation.00000-of-00001.json.gz", validation)
        model = train_sentencepiece((text for _, text in train), "bpe", vocab_size)
        demo_tokenizer_path(building).write_bytes(model)
        counts = {
            "train_documents": len(train),
            "train_bytes": sum(len(text.encode()) for _, text in train),
            "validation_documents": len(validation),
            "validation_bytes": sum(len(text.encode()) for _, text in validation),
            "vocab_size": vocab_size,
        }
        (building / "demo.json").write_text(json.dumps(counts, indent=2) + "\n")
        # mkdtemp creates private folders, but other users may read a shared cache.
        building.chmod(0o755)
        try:
            building.rename(folder)
        except OSError:
            # If the folder exists, another process was faster, on a file system without locks.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Holds an advisory file lock, so that one process builds at a time; without effect on file systems without locks."""
    with path.open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass
        yield


def _is_validation(text: str) -> bool:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % VALIDATION_ONE_IN == 0


def _write_shard(path: Path, documents: list[tuple[str, str]]) -> None:
    lines = (
        json.dumps({"text": text, "timestamp": "1970-01-01T00:00:00Z", "url": origin}, ensure_ascii=False)
        for origin, text in documents
    )
    # Without a time and a file name in gzip's header, the same text gives the same bytes.
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0) as file:
        file.write("".join(line + "\n" for line in lines).encode())


# --- Collecting documents ---


def collect_documents() -> list[tuple[str, str]]:
    """Returns all demo documents as (origin, text), without repetitions, sorted by a hash of their text.

    A document is left out if it is short, is mostly not prose, or equals another one except for case, digits and
    punctuation. A paragraph that several documents share is kept in the first of them.
    """
    roots = {"python": Path(sysconfig.get_path("stdlib"))}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            roots[package] = Path(spec.origin).parent
    documents = _topic_pages()
    for package, root in roots.items():
        for path in _source_files(root):
            documents += _documents_of_file(package, path, root)
    return _distinct(documents)


def _source_files(root: Path) -> list[Path]:
    files = root.rglob("*.py")
    return sorted(path for path in files if not _SKIPPED_PATHS.search(path.relative_to(root).as_posix()))


def _topic_pages() -> list[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    # Some distributions put pydoc's topics into a separate package.
    except ImportError:
        return []
    return [(f"python:topics/{name}", text) for name, page in sorted(topics.items()) if (text := prose(page))]


# Matches comments and strings of Python source, both in order, so that quotes inside a comment start no string.
# Parsing the same 130 MB with ast takes ten times as long.
_COMMENT_OR_STRING = re.compile(
    r"""
    \#[^\n]*
    | (?P<triple> [rRuU]? (?: \"{3} [^"\\]* (?: (?: \\. | "(?!"") ) [^"\\]* )* \"{3}
                          | \'{3} [^'\\]* (?: (?: \\. | '(?!'') ) [^'\\]* )* \'{3} ) )
    | "(?:[^"\\\n]|\\.)*"
    | '(?:[^'\\\n]|\\.)*'
    """,
    re.DOTALL | re.VERBOSE,
)
_DOC_CALL = re.compile(r"doc\w*\([^)]*$")


def _documents_of_file(package: str, path: Path, root: Path) -> list[tuple[str, str]]:
    """Returns a source file's prose as (origin, text): docstrings, and strings passed to functions like `add_docstr`."""
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    module = path.relative_to(root).with_suffix("").as_posix()
    documents = []
    for match in _COMMENT_OR_STRING.finditer(source):
        if match["triple"] and len(match[0]) >= MIN_CHARACTERS and _is_documentation(source, match.start()):
            try:
                with warnings.catch_warnings():
                    # The packages' strings contain invalid escapes.
                    warnings.simplefilter("ignore")
                    docstring = inspect.cleandoc(ast.literal_eval(match[0]))
            except (ValueError, SyntaxError):
                continue
            if text := prose(docstring):
                line = source.count("\n", 0, match.start()) + 1
                documents.append((f"{package}:{module}#{line}", text))
    return documents


def _is_documentation(source: str, start: int) -> bool:
    """Tells whether the string at `start` is a docstring, or an argument of a documenting call such as `add_docstr`."""
    before = re.sub(r"[ \t]*#[^\n\"']*$", "", source[max(0, start - 300) : start].rstrip()).rstrip()
    if not before:
        return start < 300
    return (before.endswith(":") and before[-2:-1] not in "\"'") or _DOC_CALL.search(before) is not None


def _distinct(documents: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Removes repeated paragraphs and documents; returns the rest sorted by a hash of the text."""
    seen_paragraphs: set[bytes] = set()
    kept: dict[bytes, tuple[str, str]] = {}
    for origin, text in documents:
        paragraphs = []
        for paragraph in text.split("\n\n"):
            key = _text_key(paragraph)
            # Short paragraphs are headings and list items, which may be repeated.
            if len(paragraph) < 60 or key not in seen_paragraphs:
                paragraphs.append(paragraph)
            seen_paragraphs.add(key)
        text = "\n\n".join(_without_empty_headings(paragraphs))
        if _is_prose(text):
            kept.setdefault(_text_key(text), (origin, text))
    # Sorting by a hash separates docstrings about the same subject, in the same order on every machine.
    return sorted(kept.values(), key=lambda document: hashlib.blake2b(document[1].encode(), digest_size=16).digest())


def _text_key(text: str) -> bytes:
    """Returns a hash of the text's words, independent of case, digits and punctuation."""
    words = re.sub(r"[\W\d_]+", " ", text).lower()
    return hashlib.blake2b(words.encode(), digest_size=16).digest()


# --- Turning a docstring into prose ---

_MARKUP = (
    (re.compile(r":[a-zA-Z:+-]+:`!?~?\.?([^`<>]+?)(?:\s*<[^<>`]*>)?`"), r"\1"),  # :func:`torch.div` -> torch.div
    (re.compile(r"`([^`<>]+?)\s*<[^<>`]*>`__?"), r"\1"),  # `text <link>`_ -> text
    (re.compile(r"\[`+~?([^`\]]+)`+\](?:\([^)\s]*\))?"), r"\1"),  # [`Trainer`] -> Trainer
    (re.compile(r"\[([^\]\[]+)\]\(https?://[^)\s]*\)"), r"\1"),
    (re.compile(r"``([^`]+)``"), r"\1"),
    (re.compile(r"`([^`\n]+)`_?"), r"\1"),
    (re.compile(r"^( *)\.\. ([\w-]+)::", re.MULTILINE), r"\1\2:"),  # .. note:: -> note:
    (re.compile(r"\*\*([^*\n]+)\*\*"), r"\1"),
    (re.compile(r"(?<![\w*])\*([^*\s][^*\n]*?)\*(?![\w*])"), r"\1"),
)
_FENCED_CODE = re.compile(r"^[ \t]*(```|~~~).*?^[ \t]*\1[^\n]*$", re.DOTALL | re.MULTILINE)
_RULE = re.compile(r"[=\-~^*#\"+]{3,}")
_UNDERLINED = re.compile(r"^([^\n]*[^\n:]):?\n[ ]*[=\-~^*#\"+]{3,}[ ]*$", re.MULTILINE)
_CODE_DIRECTIVE = re.compile(r"\.\. (code|code-block|sourcecode|math|plot|doctest|testcode|image|figure|ipython)::")


def prose(docstring: str) -> str:
    """Returns a dedented docstring without code samples, displayed formulas and inline markup; "" if too little is left."""
    text = _FENCED_CODE.sub("", docstring.expandtabs().replace("\r\n", "\n"))
    paragraphs = [paragraph for paragraph in re.split(r"\n[ \t]*\n", text) if paragraph.strip()]
    paragraphs = [_plain(paragraph) for paragraph in _without_code(paragraphs)]
    cleaned = "\n\n".join(_without_empty_headings(paragraphs))
    return cleaned if _is_prose(cleaned) else ""


def _indentation(paragraph: str) -> int:
    return len(paragraph) - len(paragraph.lstrip(" "))


def _without_code(paragraphs: list[str]) -> list[str]:
    """Removes literal blocks, code directives and interpreter sessions."""
    kept = []
    # Paragraphs indented deeper than this belong to a literal block.
    code_below: int | None = None
    for paragraph in paragraphs:
        paragraph = paragraph.strip("\n").rstrip()
        indentation, first_line = _indentation(paragraph), paragraph.strip().split("\n")[0]
        if code_below is not None and indentation > code_below:
            continue
        code_below = None
        if _CODE_DIRECTIVE.match(first_line):
            code_below = indentation
        elif any(line.lstrip().startswith((">>>", "... ", "In [")) for line in paragraph.split("\n")):
            continue
        else:
            if paragraph.endswith("::") and not first_line.startswith(".. "):
                last_line = paragraph.split("\n")[-1]
                code_below = _indentation(last_line)
                paragraph = paragraph[:-1]
            kept.append(paragraph)
    return kept


def _is_heading(paragraph: str) -> bool:
    return len(paragraph) < 40 and "\n" not in paragraph and paragraph.endswith(":")


def _without_empty_headings(paragraphs: list[str]) -> list[str]:
    """Removes headings such as "Examples" whose content was a code sample."""
    kept: list[str] = []
    for paragraph in reversed(paragraphs):
        if _is_heading(paragraph) and (not kept or _is_heading(kept[-1])):
            continue
        kept.append(paragraph)
    return kept[::-1]


def _plain(paragraph: str) -> str:
    """Removes inline markup, rules and indentation."""
    for pattern, replacement in _MARKUP:
        paragraph = pattern.sub(replacement, paragraph)
    paragraph = _UNDERLINED.sub(r"\1:", paragraph)
    lines = [line.rstrip() for line in paragraph.split("\n") if not _RULE.fullmatch(line.strip())]
    return textwrap.dedent("\n".join(lines))


def _is_prose(text: str) -> bool:
    """Tells whether the text is English sentences rather than tables, formulas or lists of names."""
    if len(text) < MIN_CHARACTERS:
        return False
    words = text.split()
    alphabetic = sum(character.isalpha() for character in text)
    common = len(_COMMON_WORDS.findall(text))
    return alphabetic >= 0.75 * sum(map(len, words)) and common >= 0.15 * len(words)
