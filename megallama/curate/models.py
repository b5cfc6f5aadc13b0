"""Models that judge a text: an n-gram language model of pieces, and a linear classifier of words."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from megallama.config.errors import DataError
from megallama.config.schema import option
from megallama.curate.hashing import BASE, mix, ngram_hashes, word_hashes
from megallama.curate.readers import Bad, cut, documents, find
from megallama.curate.stage import Apply, Document, Stage

HELD_OUT = 10  # one of so many reference texts is not trained on, but measures
CHARS_PER_PIECE = 4
PRUNED = 3  # n-grams from this length on that are seen once are left out


def texts_of(inputs: tuple[str, ...], what: str) -> Iterator[str]:
    """The texts of files. Raises: DataError where there are none."""
    if not inputs:
        raise DataError(f"{what} is empty; name files, folders or patterns with the texts to train on")
    skip: Bad = lambda file, why: None  # noqa: E731
    units = cut(0, find(inputs, skip), 1 << 26)
    texts = (document.text for unit in units for document, _ in documents(unit, "", (), 1 << 24, skip))
    if (first := next(texts, None)) is None:
        raise DataError(f"{what}: {', '.join(inputs)} holds no text")
    yield from chain([first], texts)


class Table:
    """Log-probabilities and back-off weights by the hash of an n-gram (float32, natural logarithms)."""

    def __init__(self, keys: np.ndarray, logp: np.ndarray, backoff: np.ndarray) -> None:
        self.keys, self.logp, self.backoff = map(np.asarray, (keys, logp, backoff))
        self._shift = np.uint64(63 - max(len(keys), 2).bit_length())
        slots = np.arange(1 << (64 - int(self._shift)), dtype=np.uint64) << self._shift
        self._starts = np.append(np.searchsorted(keys, slots), len(keys)).astype(np.int32)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """int64: where each key stands; -1 where it does not."""
        slot = keys >> self._shift
        at, end = self._starts[slot], self._starts[slot + np.uint64(1)]
        found, left = np.full(len(keys), -1, np.int64), np.flatnonzero(at < end)
        at, end, keys = at[left], end[left], keys[left]
        while len(left):
            hit = self.keys[at] == keys
            found[left[hit]] = at[hit]
            at += 1
            more = np.flatnonzero(~hit & (at < end))
            left, at, end, keys = left[more], at[more], end[more], keys[more]
        return found

    def score(self, keys: np.ndarray, place: np.ndarray) -> np.ndarray:
        """float32: the log-probability of each piece after those before it in its line."""
        found = self.find(keys.reshape(-1)).reshape(keys.shape)
        found[place < np.arange(len(keys))[:, None]] = -1
        logp, context = self.logp[found], found[:-1, :-1]  # a context ends a piece earlier
        seen = (found >= 0) & ~np.isnan(logp)
        weights = np.where(context >= 0, self.backoff[context], np.float32(0))
        out = np.where(seen[0], logp[0], self.logp[0])  # key 0: never seen
        for n in range(1, len(keys)):
            out[1:] += weights[n - 1]
            np.copyto(out, logp[n], where=seen[n])
        return out


def hashes(ids: np.ndarray, order: int) -> np.ndarray:
    """uint64 [order, pieces]: of the 1, 2, ... pieces that end there; wrong where the line is shorter."""
    ids = ids.astype(np.uint64) + np.uint64(1)
    keys = np.zeros((order, len(ids)), np.uint64)
    keys[0] = mix(ids)
    for n in range(1, order):
        keys[n, n:] = mix(keys[n - 1, n:] * BASE + ids[:-n])
    return keys


def estimate(ids: np.ndarray, place: np.ndarray, order: int, vocabulary: int) -> Table:
    """Interpolated Kneser-Ney of lines that begin with <s> at place 0 (Kneser and Ney 1995; one discount an order).

    Contexts keep what pruned n-grams had: probabilities of all pieces sum to 1.
    """
    keys, table = hashes(ids, order), Table(*_arrays({}, {}))
    logp, backoff = dict[int, Any](), dict[int, Any]()
    for n in range(1, order + 1):
        at = np.flatnonzero(place >= max(n - 1, 1))
        grams, first, counts = np.unique(keys[n - 1][at], return_index=True, return_counts=True)
        first = at[first]
        if n < order:  # how many pieces come before it, where one can
            longer = np.flatnonzero(place >= n)
            ends = longer[np.unique(keys[n][longer], return_index=True)[1]]
            suffixes, kinds = np.unique(keys[n - 1][ends], return_counts=True)
            inside = place[first] >= n
            counts = counts.copy()
            counts[inside] = kinds[np.searchsorted(suffixes, grams[inside])]
        once, twice = (int(np.count_nonzero(counts == times)) for times in (1, 2))
        discount = min(max(once / max(once + 2 * twice, 1), 0.1), 0.9)
        context = keys[n - 2][first - 1] if n > 1 else np.zeros(len(grams), np.uint64)
        contexts, which = np.unique(context, return_inverse=True)
        total = np.bincount(which, counts)
        share = np.maximum(counts - discount, 0) / total[which]
        kept = (counts > 1) | (n < PRUNED)
        left = 1 - np.bincount(which[kept], share[kept], len(contexts))
        lower = 1 / vocabulary if n == 1 else np.exp(_lower(table, keys[: n - 1], place, first))
        if n == 1:
            logp[0] = np.zeros(1, np.uint64), np.log(left * lower)
        logp[n] = grams[kept], np.log(share + left[which] * lower)[kept]
        if n > 1:
            backoff[n] = contexts, np.log(np.maximum(left, 1e-12))
        table = Table(*_arrays(logp, backoff))
    return table


def _lower(table: Table, keys: np.ndarray, place: np.ndarray, at: np.ndarray) -> np.ndarray:
    """What lower orders say, at some places only; a million at a time, which bounds memory."""
    out = [np.zeros(0, np.float32)]
    for some in np.array_split(at, len(at) // (1 << 20) + 1):
        near = np.unique(np.append(np.maximum(some - 1, 0), some))
        out.append(table.score(keys[:, near], place[near])[np.searchsorted(near, some)])
    return np.concatenate(out)


def _arrays(logp: dict[int, Any], backoff: dict[int, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One table of all orders."""
    some = [*logp.values(), *backoff.values()]
    keys = np.unique(np.concatenate([np.zeros(1, np.uint64), *(k for k, _ in some)]))
    columns = np.full(len(keys), np.nan, np.float32), np.zeros(len(keys), np.float32)
    for column, rows in zip(columns, (logp, backoff), strict=True):
        for name, values in rows.values():
            column[np.searchsorted(keys, name)] = values
    return keys, *columns


class Perplexity(Stage):
    """How likely a text is to a 5-gram model of reference text, as in CCNet: head, middle, tail of its percentiles."""

    kind: Literal["perplexity"]
    model: str = option("", "folder of the model; --train writes it")
    reference: tuple[str, ...] = option((), "files of good text that --train reads")
    keep: tuple[Literal["head", "middle", "tail"], ...] = option(("head", "middle"), "parts that stay")
    head: int = option(60, "percentile of held-out reference texts where the head ends", ge=0, le=100)
    middle: int = option(95, "percentile of held-out reference texts where the middle ends", ge=0, le=100)
    order: int = option(5, "longest n-gram [pieces]", ge=2, le=8)
    vocabulary: int = option(16_384, "pieces of the SentencePiece model", ge=300)
    max_pieces: int = option(10_000_000, "as much reference text is trained on [pieces]", gt=0)
    max_chars: int = option(20_000, "as much of a text is scored [characters]", gt=0)

    def start(self) -> Apply:
        folder = Path(self.model)
        try:
            facts = json.loads((folder / "model.json").read_text())
            pieces = SentencePieceProcessor(model_proto=(folder / "pieces.model").read_bytes())
            table = Table(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("keys", "logp", "backoff")))
        except (OSError, ValueError) as error:
            why = f"perplexity.model: {self.model or 'it is not set'}: {error}"
            raise DataError(f"{why}; make it with --train from perplexity.reference") from None
        head, middle = facts["percentiles"][self.head], facts["percentiles"][self.middle]

        def apply(document: Document) -> str:
            value = perplexity(document.text[: self.max_chars], pieces, table, facts["order"])
            part = "head" if value <= head else "middle" if value <= middle else "tail"
            document.scores |= {"perplexity": round(value, 2), "part": part}
            return "" if part in self.keep else f"perplexity {part}"

        return apply

    def train(self, say: Callable[[str], None]) -> None:
        texts, size = list[str](), 0
        for text in texts_of(self.reference, "perplexity.reference"):
            texts.append(text)
            if (size := size + len(text)) > CHARS_PER_PIECE * self.max_pieces:
                say(f"perplexity: the first {size:,} characters of the reference text are enough")
                break
        held = [t for i, t in enumerate(texts) if i % HELD_OUT == 0]
        model, trained = io.BytesIO(), [t for i, t in enumerate(texts) if i % HELD_OUT] or texts
        lines = (line[:4000] for text in trained for line in text.split("\n") if line.strip())
        try:
            SentencePieceTrainer.train(
                sentence_iterator=lines, model_writer=model, vocab_size=self.vocabulary, hard_vocab_limit=False,
                normalization_rule_name="nmt_nfkc_cf", model_type="unigram", character_coverage=0.9995,
                input_sentence_size=500_000, num_threads=1, minloglevel=2,
            )  # fmt: skip
        except RuntimeError as error:
            raise DataError(f"perplexity.reference: no pieces can be made of it: {error}") from None
        pieces = SentencePieceProcessor(model_proto=model.getvalue())
        ids, place = (np.concatenate(rows) for rows in zip(*(encoded(t, pieces) for t in trained), strict=True))
        table = estimate(ids, place, self.order, len(pieces))
        values = [perplexity(text[: self.max_chars], pieces, table, self.order) for text in held]
        percentiles = np.percentile(values, np.arange(101)).round(3).tolist()
        folder = Path(self.model)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.json").unlink(missing_ok=True)  # the last that is written: no model is half another
        (folder / "pieces.model").write_bytes(model.getvalue())
        for name in ("keys", "logp", "backoff"):
            np.save(folder / f"{name}.npy", getattr(table, name))
        (folder / "model.json").write_text(json.dumps({"order": self.order, "percentiles": percentiles}))
        what = f"{len(table.keys):,} n-grams of {len(ids):,} pieces"
        say(f"perplexity: {what}; median of {len(held)} held-out texts {percentiles[50]}")


def encoded(text: str, pieces: Any) -> tuple[np.ndarray, np.ndarray]:
    """int32: the pieces of a text's lines, digits as 0, between <s> and </s>; and the place of each in its line."""
    digits = str.maketrans("123456789", "0" * 9)
    lines = [line for line in text.translate(digits).split("\n") if line.strip()]
    rows = [pieces.encode(line, add_bos=True, add_eos=True) for line in lines]
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    ids = np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum()))
    return ids, (np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)).astype(np.int32)


def perplexity(text: str, pieces: Any, table: Table, order: int) -> float:
    """exp of the mean negative log-probability of a piece, ends of lines included."""
    ids, place = encoded(text, pieces)
    scores = table.score(hashes(ids, order), place)[place > 0] if len(ids) else np.zeros(1)
    return float(np.exp(-scores.mean(dtype=np.float64)))


class Reference(Stage):
    """Pages like those that Wikipedia cites: logistic regression on hashed words and pairs of words."""

    kind: Literal["reference"]
    model: str = option("", "file of the weights, .npy; --train writes it")
    positive: tuple[str, ...] = option((), "files of pages that Wikipedia cites, which --train reads")
    negative: tuple[str, ...] = option((), "files of random pages, which --train reads")
    min_score: float = option(0.5, "least probability of being such a page", ge=0, le=1)
    bits: int = option(20, "log2 of the number of weights", ge=8, le=28)
    epochs: int = option(5, "passes over the pages of training", gt=0)

    def start(self) -> Apply:
        try:
            weights = np.load(self.model, mmap_mode="r")
            if weights.ndim != 1 or weights[-1:].tolist() != [hashes_mark()]:
                raise ValueError("its words were hashed in another way")
        except (OSError, ValueError) as error:
            why = f"reference.model: {self.model or 'it is not set'}: {error}"
            raise DataError(f"{why}; make it with --train from reference.positive and .negative") from None
        weights = weights[:-1]

        def apply(document: Document) -> str:
            score = probability(weights, features(document.text, len(weights) - 1))
            document.scores["reference"] = round(score, 4)
            return "" if score >= self.min_score else "unlike reference pages"

        return apply

    def train(self, say: Callable[[str], None]) -> None:
        size = 1 << self.bits
        named = (("reference.positive", self.positive, 1), ("reference.negative", self.negative, 0))
        rows = [(features(text, size), label) for name, files, label in named for text in texts_of(files, name)]
        rows.sort(key=lambda row: int(row[0].sum()) * 2654435761 % (1 << 32))  # mixed, the same each time
        held, trained = rows[::HELD_OUT], [row for i, row in enumerate(rows) if i % HELD_OUT] or rows
        weights, squares = np.zeros(size + 1, np.float32), np.full(size + 1, 1e-6, np.float32)
        for _ in range(self.epochs):
            for at, label in trained:  # Adagrad (Duchi et al. 2011)
                slope = (probability(weights, at) - label) / max(len(at), 1) ** 0.5
                squares[at] += slope * slope
                weights[at] -= 0.5 * slope / np.sqrt(squares[at])
        right = sum((probability(weights, at) >= 0.5) == bool(label) for at, label in held)
        Path(self.model).parent.mkdir(parents=True, exist_ok=True)
        with open(self.model, "wb") as file:
            np.save(file, np.append(weights, hashes_mark()))
        say(f"reference: {right} of {len(held)} held-out pages judged rightly, {len(trained)} trained on")


def hashes_mark() -> np.float32:
    """Stands behind the weights: it is another where words are hashed in another way."""
    return np.float32(word_hashes("mark")[0] >> np.uint64(44))


def features(text: str, size: int) -> np.ndarray:
    """int64, sorted: the hashed words and pairs of words of a text, and the last weight, which is of every text."""
    words = word_hashes(text)
    both = np.concatenate([words, ngram_hashes(words, 2)])
    return np.append(np.unique(both % np.uint64(size)).astype(np.int64), size)


def probability(weights: np.ndarray, at: np.ndarray) -> float:
    """Of being a reference page, by the weights of a text's features."""
    total = float(weights[at].sum(dtype=np.float64)) / len(at) ** 0.5
    return float(1 / (1 + np.exp(-np.clip(total, -40, 40))))
