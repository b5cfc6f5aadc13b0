"""A SentencePiece model in the form of a tokenizer.json that gives the same ids, to the last text.

Byte pairs are merged by the scores of what they become, the leftmost of equals first; a
tokenizer.json ranks the pairs themselves.  Both agree where every score is one piece's own and the
pairs that make the same piece are ranked so that the left one of two that overlap comes first.
Where that, or anything else that decides about ids, cannot be had, the model is refused: other
programs must then use the .model file with the sentencepiece library.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any

from google.protobuf.empty_pb2 import Empty
from google.protobuf.unknown_fields import UnknownFieldSet
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = range(1, 6)  # types of pieces in a .model file
BPE = 2  # type of a model
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece writes for a space
Piece = tuple[str, float, int]  # text, score, type
PROBES = (
    # between the bars: white space, digits, characters of several codes, control tokens as text; then what is long
    *"| |  two   three |\n|\r\n\tx\t|1234567890|🦙👩\u200d👧🏽|naïve cafe\u0301 東京|\0 \ufeff\xa0|<s>|</s>".split("|"),
    *(" <s> a</s>b<unk><0x0A>", SPACE, f"{SPACE * 2}a {SPACE}", "a" * 99, " " * 70, "=-" * 50, "#" * 33),
    "def f(x):\n    return {'a': [x**2, -1e-9]}  # ==> !!! ... ---- ____",
)


class NotEqualError(Exception):
    """No tokenizer.json gives the ids of this model; the message says why."""


def to_tokenizer(model: bytes) -> Tokenizer:
    """The fast tokenizer of a SentencePiece .model file. Raises: NotEqualError."""
    file = _fields(model)
    parts = [_fields(part) for part in file[1]]
    scores = [struct.unpack("<f", struct.pack("<I", part.get(2, [0])[-1]))[0] for part in parts]
    pieces = [(p[1][-1].decode(), score, p.get(3, [NORMAL])[-1]) for p, score in zip(parts, scores, strict=True)]
    trainer, normalizer = (_fields(file.get(number, [b""])[-1]) for number in (2, 3))
    prefix = bool(normalizer.get(3, [1])[-1])
    user = [text for text, _, kind in pieces if kind == USER_DEFINED]
    if trainer.get(3, [1])[-1] != BPE or any(kind == UNUSED for _, _, kind in pieces):
        raise NotEqualError("it is no model of byte pairs, or has unused pieces")
    if user and (prefix or any({SPACE, " "} & {*text} for text in user)):
        raise NotEqualError("it has user-defined symbols, and begins a text with a space or has them with spaces")
    found = Tokenizer(
        models.BPE(
            {text: i for i, (text, _, _) in enumerate(pieces)},
            [*_merges(pieces)],
            unk_token=next(text for text, _, kind in pieces if kind == UNKNOWN),
            fuse_unk=True,
            byte_fallback=bool(trainer.get(35, [0])[-1]),
        )
    )
    before, after = [normalizers.Prepend(SPACE)], [decoders.Strip(" ", 1, 0)]
    found.normalizer = normalizers.Sequence([*before * prefix, normalizers.Replace(" ", SPACE)])
    plain = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    found.decoder = decoders.Sequence([*plain, *after * prefix])
    found.add_special_tokens([text for text, _, kind in pieces if kind in (UNKNOWN, CONTROL)])
    found.add_tokens([AddedToken(text, normalized=False) for text in user])
    _prove(model, found, pieces)
    return found


def begin_with(token: tuple[str, int] | None) -> processors.TemplateProcessing:
    """The post-processor that puts a token before a text, or nothing."""
    first = [token[0]] if token else []
    return processors.TemplateProcessing([*first, "$A"], [*first, "$A", *first, "$B:1"], [token] if token else [])


def _merges(pieces: Sequence[Piece]) -> Iterator[tuple[str, str]]:
    """All pairs of pieces that become a piece, the first to be merged first. Raises: NotEqualError."""
    scores = {text: score for text, score, kind in pieces if kind == NORMAL}
    if odd := next((text for text in scores if any(c not in scores for c in text)), None):
        raise NotEqualError(f"its piece {odd!r} has characters that are no pieces")
    last = None
    for text in sorted(scores, key=lambda text: -scores[text]):
        pairs = [(text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in scores and text[i:] in scores]
        if pairs and scores[text] == last:
            raise NotEqualError(f"another piece has the score of its piece {text!r}")
        last = scores[text] if pairs else last
        while pairs:
            first = next((a for a in pairs if not any(b[1] == a[0] and a != b for b in pairs)), pairs[0])
            pairs.remove(first)
            yield first


def _prove(model: bytes, ours: Tokenizer, pieces: Sequence[Piece]) -> None:
    """Raises: NotEqualError if a difficult text, or a piece, becomes other ids than SentencePiece gives it."""
    from sentencepiece import SentencePieceProcessor

    theirs = SentencePieceProcessor(model_proto=model)
    ours.encode_special_tokens = True
    listed = (" ".join(text for text, *_ in pieces[i : i + 64]) for i in range(0, len(pieces), 64))
    for text in [*PROBES, *listed]:
        if ours.encode(text, add_special_tokens=False).ids != theirs.encode(text):
            raise NotEqualError(f"the text {text[:40]!r} becomes other ids")


def _fields(raw: bytes) -> dict[int, list[Any]]:
    """The values of a protocol buffer's message by field number: whole numbers, or bytes."""
    out: dict[int, list[Any]] = {}
    for field in UnknownFieldSet(Empty.FromString(raw)):
        out.setdefault(field.field_number, []).append(field.data)
    return out
