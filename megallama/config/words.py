"""How counts are said."""

from __future__ import annotations


def counted(number: int | str, noun: str, form: str = "") -> str:
    """``1 document``, ``2 documents``, ``0 micro-batches``; ``2,000 documents`` in the `form` ","."""
    text = format(number, form)
    ending = "" if text == "1" else "es" if noun.endswith(("s", "x", "tch", "sh")) else "s"
    return f"{text} {noun}{ending}"
