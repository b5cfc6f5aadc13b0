"""Two corpora for examples/long_context.toml: documents that repeat a passage of random tokens until they end.

    python examples/long_context_data.py FOLDER

`short`: 256 tokens, passages of 16 to 120; `long`: 1024 tokens, passages of 260 to 500.  Nothing can be known of a
passage when it comes first (the loss is ln 64 = 4.16), and all of it when it comes again, by who looks so far back.
`held` has more of the long ones, for validation.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from megallama.data.writer import IndexedWriter

VOCABULARY = 64


def write(path: Path, documents: int, length: int, passages: tuple[int, int], seed: int) -> None:
    """Documents of `length` tokens, each of one passage of a length between those."""
    draw = np.random.default_rng(seed)
    with IndexedWriter(path, np.dtype(np.uint16)) as writer:
        for _ in range(documents):
            passage = draw.integers(0, VOCABULARY, draw.integers(*passages))
            writer.add(np.resize(passage, length), np.array([length]))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "short", 40_000, 256, (16, 121), seed=1)
    write(folder / "long", 4_000, 1024, (260, 501), seed=2)
    write(folder / "held", 65, 1024, (260, 501), seed=3)
