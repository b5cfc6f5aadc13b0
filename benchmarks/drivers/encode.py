"""Only the encoder, all text in memory: `encode.py KIND TOKENIZER CORPUS THREADS`; prints bytes, tokens, seconds.

KIND: sentencepiece (lists of ids), sentencepiece-numpy, tokenizers, gigatoken.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

BATCH = 256


def encoder(kind: str, path: str, threads: int) -> Callable[[Sequence[str]], Sequence[Any]]:
    """The library's call for a batch of texts."""
    if kind.startswith("sentencepiece"):
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=path)
        form: Any = "numpy" if kind.endswith("numpy") else int
        return lambda texts: model.encode(list(texts), return_type=form, num_threads=threads)
    if kind == "tokenizers":
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(path)
        return lambda texts: [x.ids for x in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
    import gigatoken

    giga = gigatoken.Tokenizer(path)
    return lambda texts: [giga.encode(text) for text in texts]


def main() -> None:
    """Measure."""
    kind, path, corpus, threads = sys.argv[1:]
    with open(corpus, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    encode, tokens = encoder(kind, path, int(threads)), 0
    encode(texts[:BATCH])
    start = time.perf_counter()
    for first in range(0, len(texts), BATCH):
        tokens += sum(map(len, encode(texts[first : first + BATCH])))
    seconds = time.perf_counter() - start
    print(json.dumps({"bytes": sum(len(text.encode()) for text in texts), "tokens": tokens, "seconds": seconds}))


if __name__ == "__main__":
    main()
