"""Perplexity and bits per byte of texts, by source and by position in the context."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megallama.config.errors import DataError
from megallama.data.indexed import IndexedDataset
from megallama.evaluation.scorer import Row, Score, Scorer
from megallama.text.documents import RecordReader
from megallama.text.inputs import Losses
from megallama.train.step import by_position

AT_A_TIME = 512  # windows, so that memory does not grow with a text

Text = tuple[str, Any, float]  # source, ids (or what is made of a text), bytes


def windows(ids: Sequence[int], prefix: int, context: int) -> list[Row]:
    """Rows that score every id once, the first after `prefix`, the others after as many ids as fit a full window."""
    everything = [prefix, *ids]
    out = [Row(everything[a : a + context + 1], 1) for a in range(0, len(ids), context)]
    if len(out) > 1 and (rest := len(out[-1].ids) - 1) < context:
        out[-1] = Row(everything[-context - 1 :], context + 1 - rest)
    return out


def read_texts(
    inputs: Sequence[Path], encode: Any, json_key: str, limit: int | None, say: Callable[[str], None]
) -> Iterator[Text]:
    """Of files, folders and .bin/.idx pairs the first `limit` documents each; `encode` texts. Raises: DataError."""
    prefixes = {path: re.sub(r"\.(bin|idx|json|sums)$", "", str(path)) for path in inputs}  # a pattern names them all
    pairs = dict.fromkeys(prefix for prefix in prefixes.values() if Path(f"{prefix}.idx").is_file())
    for prefix in pairs:
        yield from islice(_of_pair(Path(prefix)), limit)
    files = [path for path, prefix in prefixes.items() if prefix not in pairs]
    if not files:
        return
    if encode is None:
        raise DataError("texts need a tokenizer, and the checkpoint has none; give --tokenizer")
    losses = Losses()
    for file in losses.find(files, say):
        for _, text in islice(losses.texts(RecordReader([file], json_key=json_key)), limit):
            yield file.name, encode(text), float(len(text.encode()))
    losses.check()
    for line in losses.lines() if losses.bad or losses.faults else ():
        say(line)


def _of_pair(path: Path) -> Iterator[Text]:
    """Of a corpus its documents; their bytes by the mean of the corpus, nan where it does not say."""
    data = IndexedDataset(path)
    size, tokens = data.metadata.get("bytes"), data.metadata.get("tokens")
    for first in range(0, data.num_documents, AT_A_TIME):
        starts = data.starts(first, min(first + AT_A_TIME, data.num_documents))
        for a, b in pairwise(starts.tolist()):
            yield Path(data.prefix).name, data.read(a, b - a).tolist(), (b - a) * size / tokens if size else math.nan


@dataclass
class Sums:
    """Of the scored tokens of a source; `at`: log p [nats] and tokens, by log2 of the tokens before."""

    bytes: float = 0.0
    documents: int = 0
    at: np.ndarray = field(default_factory=lambda: np.zeros((2, 40)))

    def add(self, row: Row, score: Score) -> None:
        buckets = np.log2(np.arange(row.first, len(row.ids))).astype(int)
        np.add.at(self.at[0], buckets, score.token_log_probs)
        np.add.at(self.at[1], buckets, 1)

    def metrics(self) -> dict[str, Any]:
        """Loss [nats per token], perplexity, bits per byte of the text, and the loss by position."""
        total, tokens = self.at.sum(1).tolist()
        loss, bits = -total / tokens, -total / math.log(2) / self.bytes if self.bytes > 0 else None
        by = by_position(*(self.at * [[-1], [1]]).tolist())
        numbers = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": bits}
        return {**numbers, "tokens": int(tokens), "documents": self.documents, "loss_by_position": by}


def score_texts(scorer: Scorer, texts: Iterable[Text], prefix: int | None) -> dict[str, dict[str, Any]]:
    """Metrics by source, of the same texts on every rank; without a `prefix` the first id of each is not scored."""
    sums: dict[str, Sums] = defaultdict(Sums)

    def rows() -> Iterator[tuple[str, Row]]:
        for source, ids, size in texts:
            start, rest = (ids[0], ids[1:]) if ids and prefix in (None, ids[0]) else (prefix, ids)
            if start is not None and rest:
                own = sums[source]
                own.documents, own.bytes = own.documents + 1, own.bytes + size
                yield from ((source, row) for row in windows(rest, start, scorer.longest))

    waiting = rows()
    while chunk := list(islice(waiting, AT_A_TIME)):
        for (source, row), score in zip(chunk, scorer([row for _, row in chunk]), strict=True):
            sums[source].add(row, score)
    if not sums:
        raise DataError("the texts hold no token to score; give files with text in them")
    return {source: own.metrics() for source, own in sums.items()}
