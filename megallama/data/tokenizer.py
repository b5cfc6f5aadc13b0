"""Tokenizers: SentencePiece models (LLaMA 1 and 2) and tokenizer.json (LLaMA 3), behind one small protocol.

Text never becomes a control token: a document that holds the characters "</s>" keeps them as ordinary pieces, so no
document can fake the end of another.  Only code that means it appends `bos_id` or `eos_id`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megallama.data.errors import DataError

BOS_NAMES = ("<s>", "<|begin_of_text|>", "<|startoftext|>")
EOS_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>")


class Tokenizer(Protocol):
    """Text to token ids and back."""

    path: Path
    vocab_size: int
    bos_id: int | None
    eos_id: int | None

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without bos or eos."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, on one thread."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; control tokens have none."""


class SentencePieceTokenizer:
    """A SentencePiece .model file."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        if path.open("rb").read(64).split(b"\n")[0].split(b" ")[-1].isdigit():
            raise DataError(
                f"{path} is a tiktoken vocabulary, not a SentencePiece model; use the tokenizer.json that comes with it"
            )
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{path} is not a SentencePiece model; make one with tools/train_tokenizer.py") from error
        self.path, self.vocab_size = path, int(self._model.vocab_size())
        ids = (int(self._model.bos_id()), int(self._model.eos_id()))
        self.bos_id, self.eos_id = (None if i < 0 else i for i in ids)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without bos or eos."""
        return self._model.encode(text, out_type=int)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, on one thread."""
        return self._model.encode(list(texts), out_type=int, num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; control tokens have none."""
        return self._model.decode([int(i) for i in ids])


class JsonTokenizer:
    """A tokenizer.json of the `tokenizers` library; bos and eos are known by their names."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path} is not a tokenizer.json that `tokenizers` can read: {error}") from error
        self._model.encode_special_tokens = True  # control strings in a text stay text
        self._model.no_truncation()
        self._model.no_padding()
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.path, self.vocab_size = path, max(vocabulary.values()) + 1
        self.bos_id = next((vocabulary[name] for name in BOS_NAMES if name in vocabulary), None)
        self.eos_id = next((vocabulary[name] for name in EOS_NAMES if name in vocabulary), None)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without bos or eos."""
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, on one thread."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; control tokens have none."""
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a tokenizer: a SentencePiece .model, a tokenizer.json, or a folder that holds one of them.

    Raises: DataError if there is none or it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).is_file()]
        if not found:
            raise DataError(
                f"{path} holds neither tokenizer.model nor tokenizer.json; name the file, or train one with "
                "tools/train_tokenizer.py"
            )
        path = found[0]
    if not path.is_file():
        raise DataError(
            f"tokenizer {path} does not exist; name a SentencePiece .model or a tokenizer.json, or train one with "
            "tools/train_tokenizer.py"
        )
    if path.suffix not in (".model", ".json"):
        raise DataError(
            f"tokenizer {path} has the suffix {path.suffix!r}, expected .model (SentencePiece) or .json (tokenizers)"
        )
    return SentencePieceTokenizer(path) if path.suffix == ".model" else JsonTokenizer(path)


def sha256_of(path: str | Path) -> str:
    """The hex digest of a small file's content."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
