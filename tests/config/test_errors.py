"""How counts are said."""

from __future__ import annotations

import pytest

from megallama.config.errors import counted


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "step", "0 steps"), (1, "step", "1 step"), (2, "step", "2 steps"), (2_000, "document", "2000 documents"),
        (3, "micro-batch", "3 micro-batches"), (2, "epoch", "2 epochs"), (4, "process", "4 processes"),
        ("4.1M", "token", "4.1M tokens"), ("1", "token", "1 token"), ("1.0k", "token", "1.0k tokens"),
    ],
)  # fmt: skip
def test_counted(number: int | str, noun: str, text: str) -> None:
    assert counted(number, noun) == text


def test_counted_in_a_form() -> None:
    assert [counted(n, "token", ",") for n in (1, 2_000)] == ["1 token", "2,000 tokens"]
