"""Sample i of a corpus, a pure function of (seed, i, files): no index, no shuffle, no start-up cost.

The token stream of a corpus is cut into sequences of seq_length + 1 tokens, seq_length apart: each is predicted once.
Epoch e visits them by a keyed permutation: a Feistel network over pairs left < a, right < b, a * b just above their
number, its cycle walked into range (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
"""

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from math import isqrt
from typing import Any, NamedTuple

import numpy as np

from megallama.config.errors import DataError, counted
from megallama.data.indexed import IndexedDataset

MASK = (1 << 64) - 1
ROUNDS = 6
WHOLE = (0.0, 1.0)


class Samples(NamedTuple):
    """n samples of s + 1 tokens; starts: where each token's document begins, 0 if before."""

    tokens: np.ndarray  # integers [n, s + 1], of the files' type
    starts: np.ndarray | None = None  # int64 [n, s + 1]; None unless asked for


Reader = Callable[[Sequence[int]], Samples]  # sample numbers -> the samples; a pure function


class Permutation:
    """A bijection of range(size) chosen by integer keys."""

    def __init__(self, size: int, *key: int) -> None:
        self.size = size
        self._left = isqrt(max(size - 1, 0)) + 1
        self._right = -(-size // self._left)
        digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=8 * ROUNDS).digest()
        self._keys = struct.unpack(f"<{ROUNDS}Q", digest)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Where each position goes, int64 [n]."""
        b, i = np.uint64(self._right), positions.astype(np.uint64)
        left = i // b
        right = i - left * b
        for k in range(0, ROUNDS, 2):
            left = _add_mixed(left, right, self._keys[k], self._left)
            right = _add_mixed(right, left, self._keys[k + 1], self._right)
        out = (left * b + right).astype(np.int64)
        outside = out >= self.size  # a * b exceeds size by less than a: hardly ever any
        if outside.any():
            out[outside] = self(out[outside])
        return out


def _add_mixed(half: np.ndarray, other: np.ndarray, key: int, modulus: int) -> np.ndarray:
    """(half + mix(other + key)) % modulus, where mix is the 64-bit finalizer of MurmurHash3 (Appleby)."""
    x, m, shift = other + np.uint64(key), np.uint64(modulus), np.uint64(33)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x ^= x >> shift
        x *= np.uint64(factor)
    x ^= x >> shift
    x -= x // m * m  # numpy divides by one number much faster than it takes remainders
    x += half
    x[x >= m] -= m
    return x


class Source:
    """The sequences of one corpus as a run visits them; with shuffle=False in file order (validation).

    documents: only those from this share of the corpus to that one; the ranges (0, x) and (x, 1) share none.
    num_ids: a token id from here on is damage; None where nothing is known about them.
    Raises: DataError if what is used of the corpus is smaller than one sequence.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        seq_length: int,
        seed: int,
        *,
        shuffle: bool = True,
        documents: tuple[float, float] = WHOLE,
        mark_documents: bool = False,
        num_ids: int | None = None,
        name: str = "",
    ) -> None:
        self.dataset, self.seq_length, self.seed, self.shuffle, self.name = dataset, seq_length, seed, shuffle, name
        self._mark, self._num_ids = mark_documents, num_ids
        self.first, last = (int(Fraction(str(share)) * dataset.num_documents) for share in documents)
        self.offset, end = (int(dataset.starts(n, n)[0]) for n in (self.first, last))
        self.num_tokens, self.num_documents = end - self.offset, last - self.first
        self.num_sequences = max(self.num_tokens - 1, 0) // seq_length
        if self.num_sequences < 1:
            part = "" if documents == WHOLE else f" between the shares {documents[0]:g} and {documents[1]:g}"
            have = counted(self.num_tokens, "token")
            raise DataError(
                f"{dataset.prefix} holds {have}{part}, fewer than one sample of batch.seq_length + 1 "
                f"= {seq_length + 1}; use a batch.seq_length of {max(self.num_tokens - 1, 1)} or less, or more text"
            )

    @property
    def bytes_per_token(self) -> float | None:
        """Of the corpus's text, eos included; None where it is not recorded."""
        size, tokens = self.dataset.metadata.get("bytes"), self.dataset.metadata.get("tokens")
        return size / tokens if size and tokens else None

    def identity(self) -> dict[str, int | str]:
        """What the order of samples rests on: the files, and which documents are used."""
        return {**self.dataset.fingerprint(), "first document": self.first, "used documents": self.num_documents}

    def sequences(self, indices: np.ndarray) -> np.ndarray:
        """The samples' sequences, int64 [n]; one begins at offset + its number * seq_length."""
        epochs, out = np.divmod(indices, self.num_sequences)
        for epoch in set(epochs.tolist()) if self.shuffle else ():
            here = epochs == epoch
            out[here] = Permutation(self.num_sequences, self.seed, epoch)(out[here])
        return out

    def read(self, indices: Sequence[int] | np.ndarray) -> Samples:
        """The samples with these indices. Raises: DataError for an unknown id."""
        offsets = self.offset + self.sequences(np.asarray(indices, np.int64)) * self.seq_length
        tokens = np.empty((len(offsets), self.seq_length + 1), self.dataset.dtype)
        self.dataset.read_rows(offsets.tolist(), tokens)
        self._check_ids(tokens, offsets)
        if not self._mark:
            return Samples(tokens)
        starts = np.zeros(tokens.shape, np.int64)
        for row, offset in enumerate(offsets.tolist()):
            begins = self.dataset.documents_in(offset, self.seq_length + 1) - offset
            starts[row, begins] = begins
        return Samples(tokens, np.maximum.accumulate(starts, axis=1))

    def _check_ids(self, tokens: np.ndarray, offsets: np.ndarray) -> None:
        """In every batch, for files may be overwritten while a run reads them."""
        size, limit = tokens.itemsize, self._num_ids
        ids = tokens.view(f"<u{size}")  # a negative id is a huge one
        if limit is None or not tokens.size or int(ids.max()) < limit:
            return
        row, column = np.argwhere(ids >= limit)[0].tolist()
        at, name = int(offsets[row]) + column, f"{self.dataset.prefix}.bin"
        raise DataError(
            f"{name}: token {at} of the stream, at byte {at * size}, is id {tokens[row, column]}, but the vocabulary "
            f"has {limit} ids: the file was damaged or overwritten; look with megallama inspect --verify, and put "
            "it back or write it again with megallama prepare"
        )


class Synthetic:
    """Random tokens, a function of (seed, sample number), to measure without a corpus."""

    def __init__(self, vocab_size: int, seq_length: int, seed: int) -> None:
        self.vocab_size, self.seq_length, self.seed = vocab_size, seq_length, seed

    def documents(self, ids: Sequence[int]) -> list[str]:
        return ["random tokens" for _ in ids]

    def read(self, ids: Sequence[int]) -> Samples:
        keys = [np.array([self.seed & MASK, int(i)], np.uint64) for i in ids]
        draws = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
        return Samples(np.stack([draw.integers(0, self.vocab_size, self.seq_length + 1) for draw in draws]))

    def resume(self, saved: Mapping[str, Any], *_: int | None) -> None:
        if saved.get("mixture"):
            raise DataError("data.synthetic=true, but this run was trained on text; give it a run.folder of its own")
