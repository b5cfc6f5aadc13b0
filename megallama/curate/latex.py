"""The macros that authors of LaTeX define for themselves, written out."""

from __future__ import annotations

import re
from typing import Literal

from megallama.config.schema import option
from megallama.curate.stage import Document, Stage

DEFINITION = re.compile(
    r"\\(?:(?:re)?newcommand|providecommand)\*?\s*\{?\\(?P<new>[A-Za-z]+)\}?\s*(?:\[(?P<count>\d)\])?\s*(?=\{)"
    r"|\\def\s*\\(?P<def>[A-Za-z]+)\s*(?P<slots>(?:#\d)*)(?=\{)"
)
TOKEN = re.compile(r"\\.|[{}]", re.S)
MAX_DEPTH = 32  # macros in macros


class Macros(Stage):
    r"""The macros that a LaTeX author defines with \newcommand or \def, written out."""

    kind: Literal["macros"]
    max_growth: float = option(3.0, "a text that grows to so many times its length goes", gt=1)

    def apply(self, document: Document) -> str:
        text, limit = document.text, self.max_growth * len(document.text) + 10_000
        macros, at = dict[str, tuple[int, str]](), 0
        while found := DEFINITION.search(text, at):
            if (end := braced(text, found.end())) < 0:
                at = found.end()
                continue
            count = int(found["count"] or 0) or len(found["slots"] or "") // 2
            macros[found["new"] or found["def"]] = count, text[found.end() + 1 : end - 1]
            text, at = text[: found.start()] + text[end:], found.start()
        for depth in range(MAX_DEPTH if macros else 0):
            text, before = expanded(text, macros, limit), text
            if text == before:
                break
            if len(text) > limit or depth == MAX_DEPTH - 1:
                return "macros that grow without end"
        document.text = text
        return ""


def braced(text: str, at: int) -> int:
    """Where the group ends that begins at `at` with a brace; -1 if none does."""
    depth = 0
    for found in TOKEN.finditer(text, at) if text[at : at + 1] == "{" else ():
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if not depth:
            return found.end()
    return -1


def expanded(text: str, macros: dict[str, tuple[int, str]], limit: float) -> str:
    """Every use of a macro in a text, written out once; no further than `limit` characters."""
    use, out, at = re.compile(rf"\\({'|'.join(macros)})(?![A-Za-z])[ \t]*"), list[str](), 0
    while limit > 0 and (found := use.search(text, at)):
        (count, body), end, values = macros[found[1]], found.end(), list[str]()
        for _ in range(count):
            stop = braced(text, end)
            values.append(text[end + 1 : stop - 1] if stop > 0 else text[end : end + 1])
            end = stop if stop > 0 else end + 1
        gap = " " if not count and text[end : end + 1].isalpha() and found[0][-1] in " \t" else ""
        for number in range(count, 0, -1):
            body = body.replace(f"#{number}", values[number - 1])
        out += [text[at : found.start()], body, gap]
        limit -= sum(map(len, out[-3:]))
        at = end
    return "".join([*out, text[at:]])
