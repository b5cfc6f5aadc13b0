"""Tokenizers: SentencePiece models (LLaMA 1 and 2), tokenizer.json (LLaMA 3) and GPT-2's files.

Text never becomes a control token: the characters "</s>" stay ordinary pieces, so no document fakes an end.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from megallama.config.errors import DataError
from megallama.config.special_tokens import merges_of, special_id

SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # Radford et al. 2019, encoder.py
PROBE = "It's 'LL don't  3.14,\n\tna\u00efve \u2167\u00b2 \u6771\u4eac e\u0301 \u00a0x \U0001f469\u200d\u2028 a "
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]


class Tokenizer(Protocol):
    """Text to token ids and back."""

    path: Path
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    control_ids: Sequence[int]  # control tokens and others added beside the vocabulary of text

    @property
    def encoder(self) -> str:
        """What does the work of `encode_arrays`; if it is not the fastest, the reason."""

    def id_of(self, token: str) -> int | None:
        """The id of a token, by its name; None if there is no such token."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without bos or eos."""

    def encode_arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of several texts back to back, uint32 [T], and their numbers, int64 [n]."""
        return join([np.array(self.encode(text), np.uint32) for text in texts])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; control tokens have none. Raises: DataError for ids that it does not have."""


def _known(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    numbers = [int(i) for i in ids]
    if (most := max(numbers, default=0)) >= tokenizer.vocab_size:
        which = f"{tokenizer.path} has the ids 0 to {tokenizer.vocab_size - 1} and not {most}"
        raise DataError(f"{which}; name the tokenizer that these tokens were made with")
    return numbers


def join(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Arrays of ids back to back, uint32 [T], and their lengths, int64 [n]."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.concatenate(rows) if rows else np.empty(0, np.uint32), lengths


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece .model file."""

    encoder = "sentencepiece"

    def __init__(self, path: Path) -> None:
        import sentencepiece

        if path.open("rb").read(64).split(b"\n")[0].split(b" ")[-1].isdigit():
            instead = "not a SentencePiece model; use the tokenizer.json that comes with it"
            raise DataError(f"{path} is a tiktoken vocabulary, {instead}")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{path} is not a SentencePiece model; make one with megallama tokenizer") from error
        self.path, self.vocab_size = path, int(self._model.vocab_size())
        own = {"bos": int(self._model.bos_id()), "eos": int(self._model.eos_id())}
        self.bos_id, self.eos_id = (special_id(k, path, self.id_of, None if i < 0 else i) for k, i in own.items())
        every = range(self.vocab_size)
        self.control_ids = [i for i in every if self._model.is_control(i) or self._model.is_unknown(i)]
        self.byte_ids = [i for i in every if self._model.is_byte(i)]

    def pieces(self, ids: Sequence[int]) -> set[str]:
        """The pieces of some ids, as the model writes them."""
        return {self._model.id_to_piece(i) for i in ids}

    def id_of(self, token: str) -> int | None:
        found = int(self._model.piece_to_id(token))  # that of <unk> for what is unknown
        return found if self._model.id_to_piece(found) == token else None

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, out_type=int)

    def encode_arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if not hasattr(self._model, "encode_as_numpy"):  # before 0.2.2
            return super().encode_arrays(texts)
        rows = self._model.encode(list(texts), return_type="numpy", num_threads=1)
        return join([row.view(np.uint32) for row in rows])

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(_known(ids, self))


class JsonTokenizer(Tokenizer):
    """A tokenizer.json of `tokenizers`; `content`: what is read instead of the file."""

    encoder = "tokenizers"

    def __init__(self, path: Path, content: bytes = b"") -> None:
        import tokenizers

        self.content = content or path.read_bytes()
        try:
            self._model = tokenizers.Tokenizer.from_buffer(self.content)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path} is not a tokenizer.json that `tokenizers` can read: {error}") from error
        self._model.encode_special_tokens = True  # control strings in a text stay text
        self._model.no_truncation()
        self._model.no_padding()
        self._vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.path, self.vocab_size = path, max(self._vocabulary.values()) + 1
        self.bos_id, self.eos_id = (special_id(kind, path, self.id_of) for kind in ("bos", "eos"))
        self.control_ids: Sequence[int] = [*self._model.get_added_tokens_decoder()]
        self.normalizer = repr(self._model.normalizer)

    def id_of(self, token: str) -> int | None:
        return self._vocabulary.get(token)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(_known(ids, self), skip_special_tokens=True)


def byte_characters() -> list[str]:
    """The character that stands for each of the 256 bytes."""
    hidden = iter(range(256, 512))
    return [chr(b if b in PRINTABLE else next(hidden)) for b in range(256)]


class Gpt2Tokenizer(JsonTokenizer):
    """vocab.json with the merges.txt beside it, or PREFIXvocab.json with PREFIXmerges.txt."""

    def __init__(self, path: Path) -> None:
        import regex

        merges_path = path.with_name(path.name.removesuffix("vocab.json") + "merges.txt")
        known, pairs, characters = _read_vocabulary(path), _read_merges(merges_path), byte_characters()
        if lacking := [i for i, c in enumerate(characters) if c not in known]:
            raise DataError(f"{path} lacks {len(lacking)} of the 256 bytes, the first 0x{lacking[0]:02x}")
        for a, b in pairs:
            if missing := [piece for piece in (a, b, a + b) if piece not in known]:
                raise DataError(f"{merges_path} merges {a!r} and {b!r}, but {missing[0]!r} is not in {path.name}")
        model = {"type": "BPE", "vocab": known, "merges": pairs}
        form = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        content = {"version": "1.0", "added_tokens": [], "pre_tokenizer": form, "decoder": form, "model": model}
        super().__init__(path, json.dumps(content).encode())
        spans = self._model.pre_tokenizer.pre_tokenize_str(PROBE)
        if [PROBE[a:b] for _, (a, b) in spans] != regex.findall(SPLIT, PROBE):
            raise DataError(f"this version of `tokenizers` splits text unlike GPT-2; {path} needs another one")
        reached = {*characters, *(a + b for a, b in pairs)}
        self.control_ids = tuple(i for piece, i in known.items() if piece not in reached)

    def decode(self, ids: Sequence[int]) -> str:
        control = {*self.control_ids}
        return super().decode([i for i in ids if int(i) not in control])


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
    for number, line in enumerate(path.read_text("utf-8", "replace").split("\n"), 1):
        a, space, b = line.rstrip("\r").partition(" ")
        if line.startswith("#version") or not line.strip():
            continue
        if not (a and space and b) or " " in b:
            raise DataError(f"{path}:{number}: {line[:40]!r} is not a merge; every line names two tokens")
        pairs.append((a, b))
    return pairs


def find_tokenizer(path: str | Path) -> Path:
    """The file of a path: itself, or what a folder holds. Raises: DataError if there is none."""
    path, train = Path(path), "or train one with megallama tokenizer"
    if path.is_dir():
        names = ("tokenizer.model", "tokenizer.json", "vocab.json")
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            neither = "neither tokenizer.model nor tokenizer.json nor vocab.json with merges.txt"
            raise DataError(f"{path} holds {neither}; name the file, {train}")
        path = found[0]
    if not path.is_file():
        kinds = "a SentencePiece .model, a tokenizer.json or a GPT-2 vocab.json"
        raise DataError(f"tokenizer {path} does not exist; name {kinds}, {train}")
    if path.suffix not in (".model", ".json"):
        expected = ".model (SentencePiece) or .json (tokenizers, or GPT-2's vocab.json)"
        raise DataError(f"tokenizer {path} has the suffix {path.suffix!r}, expected {expected}")
    return path


def load_tokenizer(path: str | Path, *, eos_token: str | None = None) -> Tokenizer:
    """Open a tokenizer's file, or that in a folder; `eos_token`, if given, ends a document.

    Raises: DataError if there is none, it cannot be read, or it has no such token.
    """
    path = find_tokenizer(path)
    kind = Gpt2Tokenizer if path.name.endswith("vocab.json") else JsonTokenizer
    tokenizer: Tokenizer = SentencePieceTokenizer(path) if path.suffix == ".model" else kind(path)
    if eos_token is not None:
        whole = eos_token.encode("utf-8", "replace").decode() == eos_token  # half a character is no token
        tokenizer.eos_id = tokenizer.id_of(eos_token) if whole else None
        if tokenizer.eos_id is None:
            raise DataError(f"tokenizer {path} has no token {eos_token!r}; name one that it has, or leave it out")
    return tokenizer


def sha256_of(path: str | Path) -> str:
    """The hex digest of its file, and for PREFIXvocab.json of PREFIXmerges.txt after it."""
    merges = merges_of(path := Path(path))
    more = merges.read_bytes() if merges and merges.is_file() else b""
    return hashlib.sha256(path.read_bytes() + more).hexdigest()
