"""Texts as numbers: normalised as in CCNet, hashed by paragraph or by n words.

CCNet (Wenzek et al. 2019, 3.2): lower case, no accents, digits as 0, no punctuation; its SHA-1 is XXH3 here.
"""

from __future__ import annotations

import functools
import hashlib
import string
import sys
import unicodedata

import numpy as np
from xxhash import xxh3_64_intdigest

SPACE, NEWLINE, ZERO = 32, 10, 48
PLANES = 0x20000  # code points above are ideographs and symbols, which stay
_CONTROLS = bytes(c for c in range(128) if c < 32 and c != NEWLINE or c == 127)
_DELETED = string.punctuation.encode() + _CONTROLS.replace(b"\t", b"").replace(b"\r", b"")
_ASCII = bytes.maketrans(
    (string.ascii_uppercase + string.digits + "\t\r").encode(), (string.ascii_lowercase + "0" * 10 + "  ").encode()
)
EMPTY = np.uint64(xxh3_64_intdigest(b""))
BASE = np.uint64(0x9E3779B97F4A7C15)
ORDER = np.uint64(0xBF58476D1CE4E5B9)


@functools.lru_cache(1)
def _table() -> np.ndarray:
    """uint32: what each code point becomes; 0: nothing."""
    table = np.arange(sys.maxunicode + 1, dtype="<u4")
    for code in filter(lambda code: code != NEWLINE and not 0xAC00 <= code <= 0xD7A3, range(PLANES)):  # but Hangul
        kind = unicodedata.category(mark := chr(code))
        if kind == "Nd" or kind[0] == "Z" or mark in "\t\r":
            table[code] = ZERO if kind == "Nd" else SPACE
        else:
            gone = kind[0] in "PSC" or kind == "Mn"
            table[code] = 0 if gone else ord(unicodedata.normalize("NFD", mark.lower())[0])
    return table


def normalise(text: str) -> bytes:
    """UTF-8 of the text as it is compared; its lines stay lines."""
    if text.isascii():
        return text.encode().translate(_ASCII, _DELETED)
    codes = np.frombuffer(text.encode("utf-32-le", "replace"), "<u4")
    codes = _table()[codes]
    return codes[codes != 0].tobytes().decode("utf-32-le").encode()


def paragraph_hashes(text: str) -> np.ndarray:
    """uint64 [lines]: XXH3 of each normalised line; 0 for an empty one."""
    lines = [line.strip() for line in normalise(text).split(b"\n")]
    hashes = np.fromiter(map(xxh3_64_intdigest, lines), np.uint64, len(lines))
    hashes[hashes == EMPTY] = 0
    return hashes


def mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finisher: equal numbers stay equal, close ones are far apart (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * ORDER
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def word_hashes(text: str) -> np.ndarray:
    """uint64 [words]: XXH3 of the words of the normalised text."""
    words = normalise(text).split()
    return np.fromiter(map(xxh3_64_intdigest, words), np.uint64, len(words))


def ngram_hashes(words: np.ndarray, n: int) -> np.ndarray:
    """uint64 [words - n + 1]: of every n words in a row; of all words where there are fewer."""
    n = min(n, len(words))
    if not n:
        return words
    total = np.zeros(len(words) - n + 1, np.uint64)
    for i in range(n):
        total = total * BASE + words[i : len(words) - n + 1 + i]
    return mix(total)


def text_hash(text: str) -> int:
    """64 bits that say a text or a name, the same everywhere."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little")
