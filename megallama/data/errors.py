"""The error of this room."""

from __future__ import annotations

from megallama.config.errors import MegallamaError


class DataError(MegallamaError):
    """Something is wrong with a corpus, a tokenizer or a data file; the text says what and what to do about it."""
