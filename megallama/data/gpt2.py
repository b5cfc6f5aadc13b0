"""GPT-2's byte-level BPE from its two files, vocab.json and merges.txt.

Text is split into words by GPT-2's expression (letters, digits, punctuation, each with one space before them; runs of
white space; English contractions); the UTF-8 bytes of a word are its first tokens; the pair of neighbours that comes
first in merges.txt is merged, the leftmost first, until no pair is in it.  In both files a byte is written as one
visible character: itself where it is printable in Latin-1, else the next free one from U+0100 on.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from pathlib import Path

from megallama.config.special_tokens import special_id
from megallama.data.errors import DataError
from megallama.data.tokenizer import OneByOne

SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
CACHE_WORDS, CACHE_LENGTH = 1 << 16, 32  # how many words are remembered, and of at most what length


def byte_characters() -> list[str]:
    """The character that stands for each of the 256 bytes."""
    hidden = iter(range(256, 512))
    return [chr(b if b in PRINTABLE else next(hidden)) for b in range(256)]


class Gpt2Tokenizer(OneByOne):
    """vocab.json with the merges.txt beside it, or PREFIXvocab.json with PREFIXmerges.txt."""

    encoder = "GPT-2 byte pairs in Python"

    def __init__(self, path: Path) -> None:
        import regex

        merges_path = path.with_name(path.name.removesuffix("vocab.json") + "merges.txt")
        self.path, self._split = path, regex.compile(SPLIT).findall
        self._vocabulary, self._pairs = _read_vocabulary(path), _read_merges(merges_path)
        characters, known = byte_characters(), self._vocabulary
        if lacking := [i for i, c in enumerate(characters) if c not in known]:
            raise DataError(f"{path} lacks {len(lacking)} of the 256 bytes, the first 0x{lacking[0]:02x}")
        self._bytes = [known[c] for c in characters]
        self._ranks: dict[tuple[int, int], tuple[int, int]] = {}
        for rank, (a, b) in enumerate(self._pairs):
            if missing := [piece for piece in (a, b, a + b) if piece not in known]:
                raise DataError(f"{merges_path} merges {a!r} and {b!r}, but {missing[0]!r} is not in {path.name}")
            self._ranks[known[a], known[b]] = rank, known[a + b]
        self.vocab_size = max(known.values()) + 1
        self.bos_id, self.eos_id = (special_id(kind, path, self.id_of) for kind in ("bos", "eos"))
        value, reached = {c: b for b, c in enumerate(characters)}, {*self._bytes, *(i for _, i in self._ranks.values())}
        self.control_ids: Sequence[int] = tuple(i for i in known.values() if i not in reached)
        self._content = {i: bytes(value[c] for c in piece) for piece, i in known.items() if i in reached}
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without bos or eos."""
        out: list[int] = []
        for word in self._split(text):
            ids = self._cache.get(word)
            if ids is None:
                ids = self._merge([self._bytes[b] for b in word.encode()])
                if len(word) <= CACHE_LENGTH:
                    if len(self._cache) >= CACHE_WORDS:
                        self._cache.clear()
                    self._cache[word] = ids
            out += ids
        return out

    def _merge(self, ids: list[int]) -> list[int]:
        """The ids of a word from those of its bytes, in O(n log n)."""
        n, ranks = len(ids), self._ranks
        after, before = [*range(1, n + 1)], [*range(-1, n - 1)]
        heap = [(ranks[pair][0], i) for i, pair in enumerate(zip(ids, ids[1:], strict=False)) if pair in ranks]
        heapq.heapify(heap)
        while heap:
            rank, i = heapq.heappop(heap)
            j = after[i]
            found = ranks.get((ids[i], ids[j])) if j < n else None
            if found is None or found[0] != rank:  # one of the two was merged since
                continue
            ids[i], ids[j], after[i] = found[1], -1, after[j]
            if after[j] < n:
                before[after[j]] = i
            for k in (before[i], i):
                if k >= 0 and after[k] < n and (pair := (ids[k], ids[after[k]])) in ranks:
                    heapq.heappush(heap, (ranks[pair][0], k))
        return [i for i in ids if i >= 0]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; control tokens have none."""
        return b"".join(self._content.get(int(i), b"") for i in ids).decode("utf-8", "replace")

    def as_json(self) -> str:
        """The same tokenizer in the form of a tokenizer.json, in which nothing is a control token."""
        model = {"type": "BPE", "vocab": self._vocabulary, "merges": self._pairs}
        split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        return json.dumps({"version": "1.0", "added_tokens": [], "pre_tokenizer": split, "model": model})


def _read_vocabulary(path: Path) -> dict[str, int]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict) or not found or not all(type(i) is int and i >= 0 for i in found.values()):
        raise DataError(f'{path} is not a vocabulary of GPT-2\'s form {{"token": id, ...}}')
    return found


def _read_merges(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        raise DataError(f"{path} does not exist; a GPT-2 vocabulary needs its merges beside it")
    pairs = []
    for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        a, space, b = line.rstrip("\r").partition(" ")
        if line.startswith("#version") or not line.strip():
            continue
        if not (a and space and b) or " " in b:
            raise DataError(f"{path}:{number}: {line[:40]!r} is not a merge; every line names two tokens")
        pairs.append((a, b))
    return pairs
