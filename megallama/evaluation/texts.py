"""Perplexity and bits per byte of texts, by source and by position; and how much of each task stood in texts."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from megallama.checkpoint.folder import step_folder
from megallama.checkpoint.manifest import read_manifest
from megallama.comm.group import Group
from megallama.config.errors import DataError
from megallama.data.indexed import IndexedDataset
from megallama.data.look import document
from megallama.data.tokenizer import Tokenizer
from megallama.evaluation.results import Results, take
from megallama.evaluation.scorer import Row, Score, Scorer
from megallama.text.documents import RecordReader
from megallama.text.inputs import Losses
from megallama.text.ngrams import Ngrams
from megallama.train.step import by_position

AT_A_TIME = 512  # windows, so that memory does not grow with a text
Text = tuple[str, Any, float]  # source, ids (or what is made of a text), bytes
Asked = Mapping[str, Sequence[list[str]]]  # by task, the passages of each item


def trained_on(folder: Path) -> tuple[Path, ...]:
    """The corpora of the run that saved the model. Raises: DataError where they are not known, or not there."""
    step = step_folder(folder)
    paths = tuple(Path(source["path"]) for source in (read_manifest(step).config["data"]["train"] if step else ()))
    if not paths or (lost := [path for path in paths if not Path(f"{path}.idx").is_file()]):
        why = f"{lost[0]} is not here" if paths else "it does not say so"
        raise DataError(f"what {folder} was trained on: {why}; name it: --check-contamination FILE ...")
    return paths


def check(results: Results, asked: Asked, documents: Iterable[Text], tokenizer: Tokenizer, group: Group) -> Results:
    """Of every item the n-grams that are there; results of clean items, and of dirty ones, which have any of them."""
    of = [(task, i) for task, items in asked.items() for i, item in enumerate(items) for _ in item]  # of a passage
    index = Ngrams([passage for items in asked.values() for item in items for passage in item])
    places, number = dict[int, list[object]](), count()  # of an n-gram, number and source of its first document
    own = islice(zip(number, documents, strict=False), group.rank, None, group.size)
    while batch := list(islice(own, 32)):  # documents
        texts = [text if isinstance(text, str) else tokenizer.decode(text) for _, (_, text, _) in batch]
        for place, gram in index.find(texts).T.tolist():
            places.setdefault(gram, [batch[place][0], batch[place][1][0]])
    for gram, where in (pair for part in group.gather_values([*places.items()]) for pair in part):
        places[gram] = min(where, places.get(gram, where))
    seen = np.isin(np.arange(index.size), [*places])
    shares = {task: np.full(len(items), np.nan) for task, items in asked.items()}
    for (task, i), share in zip(of, index.shares(seen), strict=True):
        shares[task][i] = np.fmax(shares[task][i], share)  # of the passage of which most is there
    out: Results = defaultdict(dict, documents=next(number) - 1)
    for passage, gram, words in index.examples(seen):
        out["examples"].setdefault(of[passage][0], {})[of[passage][1]] = [words, *places[gram]]
    for task, part in shares.items():
        out["shares"][task] = part.tolist()
        for kind, chosen in (("clean", part == 0), ("dirty", part > 0), ("too short", np.isnan(part))):
            values = {name: np.array(own)[chosen] for name, own in results["items"][task].items()}
            if chosen.any():
                take(out, f"{task}: {chosen.sum()} of {len(part)} {kind}", values, results["n-shot"][task], 0.0)
    return out


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
    for data in map(IndexedDataset, pairs):
        size, tokens = data.metadata.get("bytes"), data.metadata.get("tokens")  # of the mean token; nan: not known
        for number in range(data.num_documents)[:limit]:
            ids = document(data, number).tolist()
            yield Path(data.prefix).name, ids, len(ids) * size / tokens if size else math.nan
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
        return numbers | {"tokens": int(tokens), "documents": self.documents, "loss_by_position": by}


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
