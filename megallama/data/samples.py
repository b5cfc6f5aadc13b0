"""Sample i of a corpus as a pure function of (seed, i, files): no index, no shuffle array, no start-up cost.

The token stream of a corpus is cut into windows of seq_length + 1 tokens, seq_length apart (the last token of one is
the first of the next, so every token is predicted once).  Epoch e visits them in the order of a keyed permutation
computed on the fly: a Feistel network over pairs (left, right) with left < a, right < b and a * b just above the
number of windows (Black and Rogaway 2002, "Ciphers with arbitrary finite domains": their generalised network, and
walking the cycle until the result is in range). Nothing here knows the length of the run, the number of ranks or
where the run was resumed.
"""

from __future__ import annotations

import hashlib
import struct
from math import isqrt

import numpy as np

from megallama.data.errors import DataError
from megallama.data.indexed import IndexedDataset

MASK = (1 << 64) - 1
ROUNDS = 6


class Permutation:
    """A bijection of range(size) chosen by integer keys; another key, another order."""

    def __init__(self, size: int, *key: int) -> None:
        self.size = size
        self._left = isqrt(max(size - 1, 0)) + 1
        self._right = -(-size // self._left)
        digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=8 * ROUNDS).digest()
        self._keys = struct.unpack(f"<{ROUNDS}Q", digest)

    def __call__(self, i: int) -> int:
        """Where position i goes."""
        a, b, keys = self._left, self._right, self._keys
        while True:
            left, right = divmod(i, b)
            for k in range(0, ROUNDS, 2):
                left = (left + _mix(right + keys[k])) % a
                right = (right + _mix(left + keys[k + 1])) % b
            i = left * b + right
            if i < self.size:  # a * b exceeds size by less than a: hardly ever a second turn
                return i


def _mix(x: int) -> int:
    """64 well-mixed bits of x (the finalizer of MurmurHash3, Appleby)."""
    x &= MASK
    x = (x ^ (x >> 33)) * 0xFF51AFD7ED558CCD & MASK
    x = (x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53 & MASK
    return x ^ (x >> 33)


class Source:
    """The windows of one corpus in the order a run visits them; with shuffle=False in file order (validation).

    Raises: DataError if the corpus is smaller than one window.
    """

    def __init__(self, dataset: IndexedDataset, seq_length: int, seed: int, *, shuffle: bool = True) -> None:
        self.dataset, self.seq_length, self.seed, self.shuffle = dataset, seq_length, seed, shuffle
        self.num_windows = (dataset.num_tokens - 1) // seq_length
        if self.num_windows < 1:
            raise DataError(
                f"{dataset.prefix} holds {dataset.num_tokens} tokens, fewer than one sample of batch.seq_length + 1 = "
                f"{seq_length + 1}; use a batch.seq_length of {max(dataset.num_tokens - 1, 1)} or less, or more text"
            )
        self._order = (-1, Permutation(1))

    def epoch_of(self, i: int) -> int:
        """How many times the corpus has been visited in full before sample i."""
        return i // self.num_windows

    def window_of(self, i: int) -> int:
        """Which window (its first token is window * seq_length) sample i is."""
        epoch, position = divmod(i, self.num_windows)
        if not self.shuffle:
            return position
        number, order = self._order
        if number != epoch:
            order = Permutation(self.num_windows, self.seed, epoch)
            self._order = (epoch, order)
        return order(position)

    def sample(self, i: int) -> np.ndarray:
        """The tokens of sample i, int64 [seq_length + 1]."""
        return self.dataset.read(self.window_of(i) * self.seq_length, self.seq_length + 1).astype(np.int64)


class Synthetic:
    """Uniformly random tokens as a function of (seed, sample number): for measurements without a corpus."""

    def __init__(self, vocab_size: int, seq_length: int, seed: int) -> None:
        self.vocab_size, self.seq_length, self.seed = vocab_size, seq_length, seed

    def sample(self, i: int) -> np.ndarray:
        """The tokens of sample i, int64 [seq_length + 1]."""
        generator = np.random.Generator(np.random.Philox(key=np.array([self.seed & MASK, i], np.uint64)))
        return generator.integers(0, self.vocab_size, self.seq_length + 1)
