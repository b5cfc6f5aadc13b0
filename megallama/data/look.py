"""Looking into a tokenized corpus: one document, or whether all is as it was written."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megallama.config.errors import DataError
from megallama.data.blocks import AGAIN
from megallama.data.indexed import CHUNK, HEADER, IndexedDataset


def verify(
    dataset: IndexedDataset, vocab_size: int | None = None, progress: Callable[[int], None] = lambda size: None
) -> str:
    """Read everything: blocks as they were written, offsets contiguous, marks ascending, tokens in range.

    "", or why the blocks cannot be compared.  `progress(bytes of .bin checked)`.  Raises: DataError.
    """
    lacking, expected = dataset.check_blocks(), 0
    for first in range(0, dataset.num_sequences, CHUNK):
        count = min(CHUNK, dataset.num_sequences - first)
        lengths = dataset.array(HEADER.size + 4 * first, count, "<i4").astype(np.int64)
        pointers = dataset.array(dataset.pointers_at + 8 * first, count, "<i8")
        ends = expected + np.cumsum(lengths) * dataset.dtype.itemsize
        bad = np.flatnonzero((pointers != np.append(expected, ends[:-1])) | (lengths < 0))
        if len(bad):
            raise DataError(
                f"{dataset.prefix}.idx: the offset of sequence {first + bad[0]} does not follow the one before; {AGAIN}"
            )
        expected = int(ends[-1])
    for first in range(0, dataset.num_documents, CHUNK):
        dataset.starts(first, min(first + CHUNK, dataset.num_documents))
    for offset in range(0, dataset.num_tokens, CHUNK):
        tokens = dataset.read(offset, min(CHUNK, dataset.num_tokens - offset))
        wrong = tokens < 0 if vocab_size is None else (tokens < 0) | (tokens >= vocab_size)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise DataError(
                f"{dataset.prefix}.bin: token {offset + at} of the stream is id {tokens[at]}, "
                f"outside the vocabulary of {vocab_size} ids; use the tokenizer this corpus was made with"
            )
        progress((offset + len(tokens)) * dataset.dtype.itemsize)
    return lacking


def document(dataset: IndexedDataset, number: int) -> np.ndarray:
    """The tokens of one document, in the file's type. Raises: DataError."""
    if not 0 <= number < dataset.num_documents:
        raise DataError(f"{dataset.prefix} holds documents 0..{dataset.num_documents - 1}, not {number}")
    start, stop = (int(x) for x in dataset.starts(number, number + 1))
    return dataset.read(start, stop - start)
