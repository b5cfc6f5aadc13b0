"""Multiple choice by log-likelihood: which continuation does the model find likeliest?"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megallama.config.errors import DataError
from megallama.data.tokenizer import Tokenizer
from megallama.evaluation.scorer import Row, Scorer

FORM = '{"context": "The sky is", "choices": [" blue", " green"], "gold": 0}'
METRICS = {
    "acc": "share of items whose likeliest choice is the right one",
    "acc_norm": "the same, log-probabilities divided by the characters of the choice",
    "acc_answer": 'the same, less the log-probability of the choice after "Answer:"',
    "bits_per_byte": "bits that the right choice costs, per byte of it",
}


@dataclass(frozen=True)
class Item:
    """A context, its possible continuations, and which one is right."""

    context: str
    choices: tuple[str, ...]
    gold: int


def read_items(file: Path) -> list[Item]:
    """Of a JSON-lines file, an item a line. Raises: DataError naming the line."""
    out = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            item = Item(found["context"], tuple(found["choices"]), found["gold"])
            texts = [item.context, *item.choices]
            good = all(isinstance(t, str) for t in texts) and all(item.choices) and type(item.gold) is int
            if not good or len(item.choices) < 2 or not 0 <= item.gold < len(item.choices):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{file}:{number} is not an item; write lines like {FORM}") from None
        out.append(item)
    if not out:
        raise DataError(f"{file} has no items; write lines like {FORM}")
    return out


class Encoder:
    """Contexts and continuations as rows, as lm-evaluation-harness cuts them."""

    def __init__(self, tokenizer: Tokenizer, context: int, bos: bool) -> None:
        self._tokenizer, self._context, self._bos = tokenizer, context, bos
        ends = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
        self.prefix = ends[0] if ends else None  # what stands before a text that has nothing before it

    def plain(self, text: str) -> list[int]:
        """The ids of the text alone."""
        return self._tokenizer.encode(text)

    def encode(self, text: str) -> list[int]:
        """With the begin-of-sequence id where the model's tokenizer puts one."""
        ids = self._tokenizer.encode(text)
        return [self._tokenizer.bos_id, *ids] if self._bos and self._tokenizer.bos_id is not None else ids

    def row(self, context: str, continuation: str) -> Row:
        """Spaces that end the context belong to the continuation; of a context that is too long the end is kept."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        if context:
            whole, before = self.encode(context + continuation), len(self.encode(context))
        elif self.prefix is None:
            raise DataError("a text without a context needs a begin- or end-of-document token, and there is none")
        else:
            ids = self._tokenizer.encode(continuation)
            whole, before = [self.prefix, *ids], 1
        before = min(before, len(whole) - 1)  # a continuation that joins the context's last token
        cut = max(0, len(whole) - self._context - 1)
        if before - cut < 1:
            raise DataError(
                f"a continuation has {len(whole) - before} tokens, and the context {self._context}: it does not fit; "
                "give a larger --context, if the model has one, or leave the task out"
            )
        return Row(whole[cut:], before - cut)


def score_items(scorer: Scorer, encoder: Encoder, items: Sequence[Item], answer: bool = False) -> dict[str, np.ndarray]:
    """Values of `METRICS` per item; `acc_answer` only if asked for, since it costs as many rows again."""
    rows = [encoder.row(item.context, choice) for item in items for choice in item.choices]
    alone = [encoder.row("Answer:", _spaced(choice)) for item in items for choice in item.choices] if answer else []
    found = iter(score.log_prob for score in scorer([*rows, *alone]))
    sums = [np.array([next(found) for _ in item.choices]) for item in items]
    out: dict[str, list[float]] = {"acc": [], "acc_norm": [], "bits_per_byte": []}
    for item, own in zip(items, sums, strict=True):
        out["acc"].append(float(own.argmax() == item.gold))
        out["acc_norm"].append(float((own / [len(c) for c in item.choices]).argmax() == item.gold))
        out["bits_per_byte"].append(-own[item.gold] / math.log(2) / len(item.choices[item.gold].encode()))
    if answer:
        out["acc_answer"] = []
        for item, own in zip(items, sums, strict=True):
            less = own - [next(found) for _ in item.choices]
            out["acc_answer"].append(float(less.argmax() == item.gold))
    return {name: np.array(values) for name, values in out.items()}


def _spaced(choice: str) -> str:
    return choice if choice[:1].isspace() else f" {choice}"
