"""Which passages of some texts occur in others: n-grams of words, as 64-bit hashes in sorted arrays.

Words are runs of letters, marks and digits, after NFKC and in lower case; of Han and kana each character is one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import chain

import numpy as np

WORDS = 13  # of an n-gram, as in GPT-3 (Brown et al. 2020, appendix C)
SHORTEST = 8  # there too: a text of fewer words than an n-gram is one as a whole, down to so many
ASCII = bytes(i if i > 127 else ord(chr(i).lower()) if chr(i).isalnum() else 32 for i in range(256))
FOREIGN = re.compile("[^\0-\x7f]+(?: [^\0-\x7f]+)*")
SHIFT = np.uint64(64 - 22)
ODD = np.uint64(0xD6E8FEB86659FD93)  # of polynomials modulo 2^64; two n-grams share a hash by a chance of 2^-64
Run = tuple[int, np.ndarray, np.ndarray, np.ndarray]
_hash = lru_cache(1 << 18)(lambda word: blake2b(word, digest_size=8).digest())


class _Letters(dict[int, str]):
    def __missing__(self, code: int) -> str:
        letter = chr(code)
        kept = letter.lower() if unicodedata.category(letter)[0] in "LMN" else " "
        alone = "\u3040" <= letter <= "\u30ff" or "\u3400" <= letter <= "\u9fff" or code >= 0x20000
        self[code] = f" {kept} " if alone else kept
        return self[code]


_LETTERS = _Letters()  # what becomes of a character, looked up once


def words_of(text: str) -> list[bytes]:
    """The words of a text, in UTF-8."""
    if not text.isascii():
        text = FOREIGN.sub(lambda run: run[0].translate(_LETTERS), unicodedata.normalize("NFKC", text))
    return text.encode("utf-8", "replace").translate(ASCII).split()


class Ngrams:
    """The n-grams of `texts`, numbered from 0 to `size`, equal ones once."""

    def __init__(self, texts: Sequence[str], words: int = WORDS) -> None:
        self.size, self._words, parts = 0, [words_of(text) for text in texts], [np.empty((4, 0), int)]
        self._known: dict[int, tuple[int, np.ndarray, np.ndarray]] = {}  # by length: first number, hashes, their map
        counts = np.array([len(own) for own in self._words], int)
        for length, grams, text, at in _runs(self._words, range(min(SHORTEST, words), words + 1)):
            chosen = (counts[text] == length) | (length == words)
            unique, number = np.unique(grams[chosen], return_inverse=True)
            parts.append(np.stack([text[chosen], at[chosen], number + self.size, np.full(len(number), length)]))
            there = np.zeros(1 << 22, bool)  # by the highest bits, which answers most questions
            there[unique >> SHIFT] = True
            self._known[length] = self.size, unique, there
            self.size += len(unique)
        self._text, self._at, self._number, self._length = np.concatenate(parts, 1)

    def find(self, texts: Sequence[str]) -> np.ndarray:
        """Where other texts have them, int64 [2, n]: texts, ascending, and n-grams."""
        found = [np.empty((2, 0), int)]
        for length, grams, text, _ in _runs([words_of(text) for text in texts], self._known):
            first, hashes, there = self._known[length]
            maybe = np.flatnonzero(there[grams >> SHIFT])
            at = np.searchsorted(hashes[:-1], grams[maybe])
            same = hashes[at] == grams[maybe]
            found.append(np.stack([text[maybe[same]], at[same] + first]))
        all_found = np.concatenate(found, 1)
        return all_found[:, np.argsort(all_found[0], kind="stable")]

    def shares(self, seen: np.ndarray) -> np.ndarray:
        """Per text the share of its n-grams that was `seen`, bool [size]; nan for one that is too short."""
        sums, counts = (np.bincount(self._text, w, len(self._words)) for w in (seen[self._number], None))
        return np.divide(sums, counts, where=counts > 0, out=np.full(len(self._words), np.nan))

    def examples(self, seen: np.ndarray) -> Iterator[tuple[int, int, str]]:
        """Of each text that has one, the first n-gram seen: numbers of text and n-gram, its words."""
        rows = np.flatnonzero(seen[self._number])
        rows = rows[np.lexsort((self._at[rows], self._text[rows]))]
        for i in rows[np.unique(self._text[rows], return_index=True)[1]].tolist():
            passage = self._words[self._text[i]][self._at[i] :][: self._length[i]]
            yield int(self._text[i]), int(self._number[i]), b" ".join(passage).decode()


def _runs(texts: Sequence[list[bytes]], lengths: Collection[int]) -> Iterator[Run]:
    """For each length the hashes of all n-grams within a text, their texts, and first words."""
    counts = np.fromiter(map(len, texts), int, len(texts))
    text = np.repeat(np.arange(len(texts)), counts)
    at = np.arange(len(text)) - np.repeat(np.cumsum(counts) - counts, counts)
    words = np.frombuffer(b"".join(map(_hash, chain.from_iterable(texts))), "<u8")
    grams = np.zeros(len(words) + 1, np.uint64)
    for length in range(1, min(max(lengths, default=0), len(words)) + 1):
        grams = grams[:-1] * ODD + words[length - 1 :]
        if length in lengths:
            inside = np.flatnonzero(text[: len(grams)] == text[length - 1 :])
            yield length, grams[inside], text[inside], at[inside]
