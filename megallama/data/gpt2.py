"""GPT-2's byte-level BPE from its two files, vocab.json and merges.txt, by the `tokenizers` library.

In both files a byte is written as one visible character: itself where it is printable in Latin-1, else the next free
one from U+0100 on.  A token that no merge reaches, such as <|endoftext|>, is a control token: text never becomes one.
That the library splits text into words as GPT-2 does is checked against GPT-2's own expression when it is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megallama.data.errors import DataError
from megallama.data.tokenizer import JsonTokenizer

SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # Radford et al. 2019, encoder.py
PROBE = "It's 'LL don't  3.14,\n\tna\u00efve \u2167\u00b2 \u6771\u4eac e\u0301 \u00a0x \U0001f469\u200d\u2028 a "
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]


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
    for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        a, space, b = line.rstrip("\r").partition(" ")
        if line.startswith("#version") or not line.strip():
            continue
        if not (a and space and b) or " " in b:
            raise DataError(f"{path}:{number}: {line[:40]!r} is not a merge; every line names two tokens")
        pairs.append((a, b))
    return pairs
