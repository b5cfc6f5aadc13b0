"""How counts, and places in a file, are said."""

from __future__ import annotations

import re


def counted(number: int | str, noun: str, form: str = "") -> str:
    """``1 document``, ``2 documents``, ``0 micro-batches``; ``2,000 documents`` in the `form` ","."""
    text = format(number, form)
    ending = "" if text == "1" else "es" if noun.endswith(("s", "x", "tch", "sh")) else "s"
    return f"{text} {noun}{ending}"


def line_of(text: str, error: Exception) -> str:
    """On a line of its own, the line of `text` that a parser's error names; empty if it names none."""
    if isinstance(error, UnicodeDecodeError):
        text, number = error.object.decode(errors="replace"), error.object.count(b"\n", 0, error.start) + 1
    elif found := re.search(r"at line (\d+)|at end of document", str(error)):
        number = int(found[1] or len(text.rstrip().splitlines()))
    else:
        return ""
    line = [*text.split("\n"), ""][number - 1].strip()
    return f"\n  line {number}: {line if len(line) <= 100 else line[:100] + '...'}"
