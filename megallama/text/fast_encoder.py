"""Encoding by gigatoken, ten to fifty times faster, where it is proven to give the reference's ids.

It must first encode difficult texts and pieces of the vocabulary alike.  Two kinds of documents go to
the reference: with a control token in the result, or, where an expression splits words, with characters
unassigned in this Python's Unicode: letters to one library, unknown to the other.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megallama.data.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer, join, load_tokenizer

CACHE_BYTES = 24 << 20  # of all the words gigatoken has met; then it starts afresh
CHECK_EVERY = 1 << 18  # characters between two looks at the memory
NEWEST_UNICODE = 16  # that `tokenizers` and gigatoken both know
PIECES = 2000  # of the vocabulary in the proof
PROBES = (
    "The quick brown fox isn't jumping; WE'LL see 3.14159, 1000000 and 2024-01-01T00:00:00Z.",
    "  two   three    four\t\ttabs\n\n\n  lines \r\n\r\n end   ",
    "<s>a</s> <unk><pad> <|begin_of_text|>b<|end_of_text|><|endoftext|> <0x0A><0xFF> [INST] ▁a▁ ▁▁",
    "naïve café e\u0301 \u212b \xc5 \ufb01 ½ ² Ⅷ ٣٤٥ ß İi ǅ DON'T don’t 'ſ 'lL 'RE",
    "東京は日本の首都です。中文 한국어 ไทย हिन्दी العربية עברית Ελληνικά Русский 🦙👩\u200d👧🏽",
    "\0 \x01\x1b\x7f\x80\x85\xa0\xad\u1680\u2003\u2028\u202f\u3000\ufeff\ufffd\t\v\f\r",
    "def f(x):\n    return {'a': [x**2 // 7, -1e-9]}  # ==> !!! ... ---- ____\n\n\tif (a&&b||!c) { i++; }</div>\n",
    "a" * 300 + " " * 70 + "\n" * 40 + "0" * 25 + "-" * 80 + "ab" * 90,
    "𝔘𝔫𝔦 \U0010fffd\ue000",
    " ",
    "",
)


def load_fast_tokenizer(path: str | Path, *, fast: bool = True, eos_token: str | None = None) -> Tokenizer:
    """As `load_tokenizer`; with `fast` a `FastTokenizer`."""
    tokenizer = load_tokenizer(path, eos_token=eos_token)
    return FastTokenizer(tokenizer) if fast else tokenizer


class FastTokenizer:
    """A tokenizer with gigatoken's `encode_arrays`, loaded and tested at its first use."""

    def __init__(self, reference: Tokenizer) -> None:
        self.reference, self.path, self.vocab_size = reference, reference.path, reference.vocab_size
        self.bos_id, self.eos_id, self.control_ids = reference.bos_id, reference.eos_id, reference.control_ids
        self.encode, self.decode, self.id_of = reference.encode, reference.decode, reference.id_of
        self._encode: Callable[[str], np.ndarray] | None = None
        self._splits_words = not isinstance(reference, SentencePieceTokenizer)  # by an expression, that is
        self._resident = self._since_check = 0

    @functools.cached_property
    def encoder(self) -> str:
        """What encodes, and if it is not gigatoken the reason."""
        try:
            import gigatoken

            content, doubtful = _as_json(self.reference)
            self._make = functools.partial(gigatoken.Tokenizer.from_json, content)
            self._doubtful = np.isin(np.arange(self.vocab_size), doubtful)
            version = unicodedata.unidata_version
            if self._splits_words and int(version.split(".")[0]) > NEWEST_UNICODE:
                raise ValueError(f"this Python has Unicode {version}, which `tokenizers` does not know yet")
            self._afresh()
            pieces = [self.reference.decode([i]) for i in range(0, self.vocab_size, -(-self.vocab_size // PIECES))]
            for text in (*PROBES, " ".join(pieces), "".join(pieces)):
                if self._arrays([text])[0].tolist() != self.reference.encode(text):
                    raise ValueError(f"it encodes {text[:40]!r} differently")
            return f"gigatoken, proven equal to {self.reference.encoder}"
        except ImportError:
            reason = "gigatoken is not installed; pip install gigatoken to encode faster"
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in Rust is not an Exception
            reason = f"gigatoken is not used: {error}"
        self._encode = None
        return f"{self.reference.encoder} ({reason})"

    def encode_arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of several texts back to back, uint32 [T], and their numbers, int64 [n]."""
        return self._arrays(texts) if self.encoder and self._encode else self.reference.encode_arrays(texts)

    def _arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        rows = []
        for text in texts:
            rows.append(self._encode(text))  # type: ignore[misc]
            self._since_check += len(text)
            if self._since_check >= CHECK_EVERY:
                self._since_check = 0
                if _resident_bytes() - self._resident > CACHE_BYTES:
                    self._afresh()
        tokens, lengths = join(rows)
        again = np.searchsorted(np.cumsum(lengths), np.flatnonzero(self._doubtful[tokens]), "right")
        if self._splits_words and (wide := [i for i, text in enumerate(texts) if not text.isascii()]):
            characters = np.frombuffer("".join(texts[i] for i in wide).encode("utf-32-le"), "<u4")
            ends, found = np.cumsum([len(texts[i]) for i in wide]), np.flatnonzero(_unassigned()[characters])
            again = np.append(again, np.array(wide, np.int64)[np.searchsorted(ends, found, "right")])
        if not again.size:
            return tokens, lengths
        for i in set(again.tolist()):
            rows[i] = np.array(self.reference.encode(texts[i]), np.uint32)
        return join(rows)

    def _afresh(self) -> None:
        self._encode = None  # frees the old one first
        self._encode = self._make().encode
        self._resident = _resident_bytes()


@functools.cache
def _unassigned() -> np.ndarray:
    """Code points that Python's Unicode lacks, or has as private; bool [0x110000]."""
    table = np.ones(0x110000, bool)
    table[:0xF0000] = np.fromiter((unicodedata.category(chr(c)) == "Cn" for c in range(0xF0000)), bool, 0xF0000)
    return table


def _resident_bytes() -> int:
    """The memory this process occupies; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


def _as_json(tokenizer: Tokenizer) -> tuple[str | bytes, Sequence[int]]:
    """The tokenizer.json for gigatoken, and the ids that leave a text to the reference."""
    if isinstance(tokenizer, JsonTokenizer):
        if {*re.findall(r"(\w+)\(", tokenizer.normalizer)} - {"Sequence", "Prepend", "Replace", "String"}:
            raise ValueError(f"its normalizer is {tokenizer.normalizer[:80]}")
        return tokenizer.content, tokenizer.control_ids
    assert isinstance(tokenizer, SentencePieceTokenizer)
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

    content = json.loads(sentencepiece_to_tokenizer_json(tokenizer.path.read_bytes()))
    if any(step["type"] not in ("Prepend", "Replace") for step in content["normalizer"]["normalizers"]):
        raise ValueError("its normalization is not the identity")
    # the conversion makes control pieces reachable; in SentencePiece they are not
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
    reserved, model = tokenizer.pieces([*tokenizer.control_ids, *tokenizer.byte_ids]), content["model"]
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in reserved]
    return json.dumps(content), [*tokenizer.control_ids, *(token["id"] for token in content["added_tokens"])]
