"""Documents for tests, each a function of its number."""

from __future__ import annotations

import random

WORDS = "the quick brown fox jumps over a lazy dog while 12 birds sing def return self import 3.14 naïve 東京".split()


def text_of(number: int) -> str:
    """A document as a function of its number: 5 to 60 words on lines with some indentation."""
    draw = random.Random(number)
    words = [draw.choice(WORDS) for _ in range(draw.randint(5, 60))]
    return "".join(w + draw.choice([" ", " ", " ", "\n", "\n    "]) for w in words)
