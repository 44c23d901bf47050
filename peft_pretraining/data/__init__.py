"""Text to micro-batches: source -> lanes -> tokenizer -> packing -> loader, every stage resumable.

This file defines the errors that a user can correct, each with one complete message. It imports no module of the package, so that
`peft_pretraining.data.source` stays as light as a dry run needs it.
"""

from collections.abc import Iterator


class DataError(ValueError):
    """The data source, a file or a record cannot be used as asked."""


class NetworkGone(DataError):
    """A server has not answered for longer than the retry policy waits; the data delivered so far is complete, so
    the run can be saved and resumed later."""


class TokenizerError(ValueError):
    """The tokenizer cannot be found, loaded or used as asked."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, its type's name if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what caused it, what caused that, ..."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__
