"""What was said before: paragraphs, whole texts, and texts that are nearly the same."""

from __future__ import annotations

from itertools import compress
from typing import Any, ClassVar, Literal

import numpy as np

from megallama.config.schema import option
from megallama.curate.hashing import BASE, mix, ngram_hashes, normalise, paragraph_hashes, text_hash, word_hashes
from megallama.curate.stage import Apply, Barrier, Document, Found, UnitKeys

LEADERS = 8  # with how many texts that met the others are compared
EMPTY = np.uint32(0xFFFFFFFF)
BLOCK = 2048  # n-grams that are hashed at a time: they stay in a core's cache
MAX_NGRAMS = 1 << 23  # kept while texts are compared: 64 MB
Place = tuple[int, int]  # the number of a unit, and of a document in it


def gathered(units: list[UnitKeys], lowest: int, beyond: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys in [lowest, beyond), sorted; of each the number of its unit, and its document there."""
    bounds = np.array([lowest, beyond - 1], np.uint64)
    cuts = [(np.searchsorted(u.keys, bounds[0]), np.searchsorted(u.keys, bounds[1], side="right")) for u in units]
    keys = np.concatenate([u.keys[first:last] for u, (first, last) in zip(units, cuts, strict=True)])
    docs = np.concatenate([u.docs[first:last] for u, (first, last) in zip(units, cuts, strict=True)])
    owners = np.repeat(np.arange(len(units)), [last - first for first, last in cuts])
    order = np.argsort(keys, kind="stable")
    return keys[order], owners[order], docs[order]


class _First(Barrier):
    """Whatever has the key of something earlier goes: exact, as far as 64 bits tell texts apart."""

    many: ClassVar[bool] = False

    def combine(self, units: list[UnitKeys], lowest: int, beyond: int) -> Found:
        keys, owners, _ = gathered(units, lowest, beyond)
        again = keys[1:] == keys[:-1]
        return Found(owners[1:][again], keys[1:][again], [])

    def seen(self, order: np.ndarray, found: np.ndarray) -> np.ndarray:
        """bool [keys]: which keys of a unit came before, in it or in an earlier one."""
        first = np.zeros(len(order), bool)
        first[np.unique(order, return_index=True)[1]] = True
        return (~first | np.isin(order, found)) & (order != 0)


class Paragraphs(_First):
    """Paragraphs (lines) that came before anywhere are taken out, as in CCNet (Wenzek et al. 2019, 3.2)."""

    kind: Literal["paragraphs"]
    min_chars: int = option(300, "shorter texts are dropped afterwards [characters]", ge=0)

    def keys(self, document: Document) -> np.ndarray:
        return paragraph_hashes(document.text)

    def finish(self, order: np.ndarray, counts: np.ndarray, found: np.ndarray) -> Apply:
        drop, ends, numbers = self.seen(order, found), np.cumsum(counts), iter(range(len(counts)))

        def apply(document: Document) -> str:
            number = next(numbers)
            gone = drop[ends[number] - counts[number] : ends[number]]
            if gone.any():
                lines = compress(document.text.split("\n"), (~gone).tolist())
                document.text = "\n".join(lines).strip("\n")
            if len(document.text) >= self.min_chars and not document.text.isspace():
                return ""
            return "little left" if gone.any() else "too short"

        return apply


class Files(_First):
    """Texts that are equal, but for case, digits and punctuation if `normalised`."""

    kind: Literal["files"]
    normalised: bool = option(False, "compare without case, accents, digits and punctuation")

    def keys(self, document: Document) -> np.ndarray:
        text = normalise(document.text).decode() if self.normalised else document.text
        return np.array([text_hash(text)], np.uint64)

    def finish(self, order: np.ndarray, counts: np.ndarray, found: np.ndarray) -> Apply:
        drop = iter(self.seen(order, found).tolist())
        return lambda document: "same text as an earlier one" if next(drop) else ""


class NearDuplicates(Barrier):
    """Texts that share most of their n-grams with an earlier one: MinHash (Broder 1997), verified exactly."""

    kind: Literal["near_duplicates"]
    ngram: int = option(5, "words of an n-gram", gt=0)
    threshold: float = option(0.8, "least similarity to an earlier text at which one goes", gt=0, le=1)
    measure: Literal["jaccard", "overlap"] = option("jaccard", "shared n-grams by those of both, or of the smaller")
    bands: int = option(16, "chances to meet", gt=0, le=256)
    rows: int = option(8, "hashes that must be equal to meet once", gt=0, le=64)

    def keys(self, document: Document) -> np.ndarray:
        least = self.signature(document.text)
        key = np.arange(1, self.bands + 1, dtype=np.uint64)
        for row in least.reshape(self.bands, self.rows).T:
            key = mix(key * BASE + row)
        return key if (least < EMPTY).any() else np.zeros(self.bands, np.uint64)

    def signature(self, text: str) -> np.ndarray:
        """uint32 [bands * rows]: the least of each of so many hashes of the n-grams."""
        size = self.bands * self.rows
        factors = mix(np.arange(1, 2 * size + 1, dtype=np.uint64) * BASE).astype(np.uint32).reshape(2, size, 1)
        values = (ngram_hashes(word_hashes(text), self.ngram) >> np.uint64(32)).astype(np.uint32)
        least = np.full(size, EMPTY)
        for at in range(0, len(values), BLOCK):
            hashes = values[at : at + BLOCK] * (factors[0] | np.uint32(1)) + factors[1]
            np.minimum(least, hashes.min(axis=1), out=least)
        return least

    def combine(self, units: list[UnitKeys], lowest: int, beyond: int) -> Found:
        keys, owners, docs = gathered(units, lowest, beyond)
        starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[: len(keys)])
        gone, texts = dict[Place, tuple[Place, float]](), _Texts(units, self.ngram)
        for start, stop in zip(starts, np.append(starts[1:], len(keys)), strict=True):
            if stop - start > 1:
                self._compare([*zip(owners[start:stop].tolist(), docs[start:stop].tolist(), strict=True)], texts, gone)
        pairs = list[dict[str, Any]]()
        for place, (leader, likeness) in sorted(gone.items()):
            one, other = texts.document(place), texts.document(leader)
            names = {"dropped": one.id, "source": one.source, "kept": other.id, "source_kept": other.source}
            pairs.append(names | {"similarity": round(likeness, 4)})
        rows = np.array([*gone], np.int64).reshape(-1, 2)
        return Found(rows[:, 0], rows[:, 1], pairs)

    def _compare(self, members: list[Place], texts: _Texts, gone: dict[Place, tuple[Place, float]]) -> None:
        """Compare a bucket's texts with its first; those unlike it with the first of them, and so on."""
        for _ in range(LEADERS):
            leader, rest = members[0], list[Place]()
            for member in members[1:]:
                if member in gone or member == leader:
                    continue
                if (likeness := self.similarity(texts[leader], texts[member])) >= self.threshold:
                    gone[member] = leader, likeness
                else:
                    rest.append(member)
            members = rest
            if len(members) < 2:
                break

    def similarity(self, one: np.ndarray, other: np.ndarray) -> float:
        """Of two sets of n-grams, exact."""
        shared = len(np.intersect1d(one, other, assume_unique=True))
        smaller = min(len(one), len(other))
        return shared / max(smaller if self.measure == "overlap" else len(one) + len(other) - shared, 1)

    def finish(self, order: np.ndarray, counts: np.ndarray, found: np.ndarray) -> Apply:
        gone, numbers = {*found.tolist()}, iter(range(len(counts)))
        return lambda document: "near-duplicate" if next(numbers) in gone else ""


class _Texts:
    """Documents of units, and their n-grams, of which some are kept."""

    def __init__(self, units: list[UnitKeys], n: int) -> None:
        self._units, self._n, self._kept, self._size = units, n, dict[Place, np.ndarray](), 0

    def document(self, place: Place) -> Document:
        unit = self._units[place[0]]
        with unit.file.open("rb") as file:
            file.seek(int(unit.offsets[place[1]]))
            return Document.of(file.readline())

    def __getitem__(self, place: Place) -> np.ndarray:
        if place not in self._kept:
            ngrams = np.unique(ngram_hashes(word_hashes(self.document(place).text), self._n))
            if (size := self._size + len(ngrams)) > MAX_NGRAMS:
                self._kept, size = {}, len(ngrams)
            self._kept[place], self._size = ngrams, size
        return self._kept[place]
