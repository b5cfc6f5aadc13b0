"""Several .bin/.idx pairs as one: the documents of the first, then those of the second, and so on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from megallama.config.errors import DataError
from megallama.data.indexed import IndexedDataset, IndexedWriter, strip_suffix, write_metadata

ROWS, SPAN = 1 << 16, 1 << 20  # documents, tokens copied at a time
SAME = ("tokenizer_sha256", "vocab_size", "eos_id", "bos_id")
SUMS = ("documents", "tokens", "bytes")


def merge(
    prefixes: Sequence[str | Path],
    output: str | Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> IndexedDataset:
    """Join pairs into OUTPUT.bin/.idx/.json, the bytes of preprocessing all the text at once, in bounded memory.

    Blocks are compared with PREFIX.sums; `say` gets a line where there is none.  `progress(bytes done, of all)`.
    Raises: DataError naming two pairs of different token types or tokenizers, or an output that is an input.
    """
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    for note in filter(None, [dataset.check_blocks() for dataset in datasets]):
        say(note)
    metadata = [dataset.metadata for dataset in datasets]
    _check(datasets, metadata, strip_suffix(output))
    dtype, done = datasets[0].dtype, 0
    total = sum(dataset.num_tokens for dataset in datasets) * dtype.itemsize
    with IndexedWriter(output, dtype) as writer:
        for dataset in datasets:
            for first in range(0, dataset.num_documents, ROWS):
                starts = dataset.starts(first, min(first + ROWS, dataset.num_documents))
                cuts = [0, *(np.flatnonzero(np.diff((starts[1:] - starts[0]) // SPAN)) + 1), len(starts) - 1]
                for low, high in zip(cuts, cuts[1:], strict=False):
                    tokens = dataset.read(int(starts[low]), int(starts[high] - starts[low]))
                    writer.add(tokens, np.diff(starts[low : high + 1]))
                    done += tokens.nbytes
                    progress(done, total)
    if all(metadata):
        skipped: Counter[str] = sum((Counter(each.get("skipped", {})) for each in metadata), Counter())
        own: dict[str, Any] = {key: sum(each.get(key, 0) for each in metadata) for key in SUMS}
        own["skipped"] = dict(sorted(skipped.items()))
        own["fingerprint"] = IndexedDataset(output).fingerprint()["sha256"]
        write_metadata(writer.prefix, metadata[0] | own)
    return IndexedDataset(output)


def _check(datasets: Sequence[IndexedDataset], metadata: Sequence[dict[str, Any]], output: str) -> None:
    first, known = datasets[0], metadata[0]
    for dataset, own in zip(datasets, metadata, strict=True):
        with suppress(OSError):
            if Path(dataset.prefix + ".bin").samefile(output + ".bin"):
                raise DataError(f"{output} is one of the inputs; write to another --output")
        if dataset.dtype != first.dtype:
            raise DataError(
                f"{dataset.prefix} holds {dataset.dtype.name} tokens and {first.prefix} {first.dtype.name}: they were "
                "made with vocabularies of different sizes; preprocess one of them again with the other's tokenizer"
            )
        if bool(own) != bool(known):
            none, some = (dataset, first) if known else (first, dataset)
            raise DataError(
                f"{none.prefix}.json is missing, so nothing says that it was made with the tokenizer of {some.prefix}; "
                f"preprocess it again, or move {some.prefix}.json away if you know that it has"
            )
        for key in SAME:
            if own.get(key) != known.get(key):
                raise DataError(
                    f"{dataset.prefix} and {first.prefix} were made with different tokenizers ({key}: {own.get(key)} "
                    f"and {known.get(key)}); preprocess one of them again with the other's"
                )
