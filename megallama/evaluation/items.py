"""Multiple choice by log-likelihood: which continuation does the model find likeliest?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from megallama.config.errors import DataError
from megallama.data.tokenizer import Tokenizer
from megallama.evaluation.scorer import Row, Score

Scores = Callable[[Sequence[Row]], list[Score]]
FORM = '{"context": "The sky is", "choices": [" blue", " green"], "gold": 0}'


class Item(BaseModel, frozen=True, strict=True):
    """A context, its possible continuations, and the number of the right one."""

    context: str
    choices: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=2)]
    gold: Annotated[int, Field(ge=0)]


def read_items(file: Path) -> list[Item]:
    """Of a JSON-lines file, an item a line. Raises: DataError naming the line."""
    out = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        try:
            found = [Item.model_validate_json(line)] if line.strip() else []
            out += [item for item in found if item.choices[item.gold]]
        except (ValidationError, IndexError):
            raise DataError(f"{file}:{number} is not an item; write lines like {FORM}") from None
    if not out:
        raise DataError(f"{file} has no items; write lines like {FORM}")
    return out


def start_of(tokenizer: Tokenizer | None) -> int | None:
    """What stands before a text that has nothing before it."""
    return None if tokenizer is None else tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


class Encoder:
    """Contexts and continuations as rows, as lm-evaluation-harness cuts them."""

    def __init__(self, tokenizer: Tokenizer, context: int, bos: bool, prefix: int | None) -> None:
        self.tokenizer, self.context, self.prefix = tokenizer, context, prefix
        self._begin = [prefix] if bos and prefix is not None else []

    def encode(self, text: str) -> list[int]:
        """With the begin-of-sequence id where the model's tokenizer puts one."""
        return [*self._begin, *self.tokenizer.encode(text)]

    def row(self, context: str, continuation: str) -> Row:
        """Spaces that end the context belong to the continuation; of a context that is too long the end is kept."""
        end = len(context.rstrip())
        context, continuation = context[:end], context[end:] + continuation
        if context:
            whole, before = self.encode(context + continuation), len(self.encode(context))
        elif self.prefix is None:
            raise DataError("a text without a context needs a begin- or end-of-document token, and there is none")
        else:
            whole, before = [self.prefix, *self.tokenizer.encode(continuation)], 1
        before = min(before, len(whole) - 1)  # a continuation that joins the context's last token
        cut = max(0, len(whole) - self.context - 1)
        if before - cut < 1:
            sizes = f"a continuation has {len(whole) - before} tokens, and the context {self.context}: it does not fit"
            raise DataError(f"{sizes}; give a larger --context, if the model has one, or leave the task out")
        return Row(whole[cut:], before - cut)


def score_items(
    scorer: Scores, encoder: Encoder, items: Sequence[Item], answer: bool = False, known: Sequence[Any] = ()
) -> dict[str, np.ndarray]:
    """Per item, whether the choice found likeliest is right; and the bits that the right one costs.

    acc: by log-probability; acc_norm: divided by the characters; acc_answer, if asked for: less that after "Answer:".
    known: log-probabilities of all choices, where they have been scored.
    """
    rows = [] if known else [encoder.row(item.context, choice) for item in items for choice in item.choices]
    spaced = (c if c[:1].isspace() else f" {c}" for item in items for c in item.choices)
    alone = [encoder.row("Answer:", choice) for choice in spaced] if answer else []
    found = iter(score.log_prob for score in scorer([*rows, *alone]))
    sums = [np.array(own) for own in known or [[next(found) for _ in item.choices] for item in items]]
    sizes = [np.array([len(c) for c in item.choices]) for item in items]
    gold = [i.choices[i.gold].encode() for i in items]
    by = {"acc": sums, "acc_norm": [s / n for s, n in zip(sums, sizes, strict=True)]}
    if answer:
        by["acc_answer"] = [own - [next(found) for _ in own] for own in sums]
    right = {k: [float(x.argmax() == i.gold) for x, i in zip(v, items, strict=True)] for k, v in by.items()}
    bits = [-s[i.gold] / math.log(2) / len(g) for s, i, g in zip(sums, items, gold, strict=True)]
    return {name: np.array(values) for name, values in (right | {"bits_per_byte": bits}).items()}
