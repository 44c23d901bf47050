"""The two errors of this package that a user can mend; both carry one complete message and need no traceback."""


class DataError(ValueError):
    """The data source, a file or a record cannot be used as asked."""


class TokenizerError(ValueError):
    """The tokenizer cannot be found, loaded or used as asked."""
