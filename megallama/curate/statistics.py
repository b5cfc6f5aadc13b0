"""What became of documents: counts, samples and distributions, which add up over units in any order."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from megallama.curate.hashing import text_hash
from megallama.curate.stage import Apply, Document

SHOWN, SHOWN_CHARS = 5, 1200  # documents of each kind that the report shows, characters of each


def add(tree: dict[str, Any], other: dict[str, Any]) -> None:
    """Add another tree: numbers are sums, of lists the smallest of both stay."""
    for key, value in other.items():
        if isinstance(value, dict):
            add(tree.setdefault(key, {}), value)
        else:
            many = isinstance(value, list)
            tree[key] = sorted([*tree.get(key, []), *value])[:SHOWN] if many else tree.get(key, 0) + value


def size_of(text: str) -> int:
    """Bytes of UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


class Statistics:
    """The counts of a unit."""

    def __init__(self, seed: int) -> None:
        names = ("stages", "bad", "histograms", "samples", "tokens")
        self.tree: dict[str, Any] = {name: {} for name in names}
        self._seed = seed

    def bad(self, file: str, why: str) -> None:
        """A record or file that cannot be read."""
        add(self.tree["bad"], {file: {why: 1}})

    def passes(self, stage: str, side: str, document: Document) -> None:
        """A document goes "in" to a stage, or comes "out" of it."""
        add(self.tree["stages"], {stage: {side: {"documents": 1, "bytes": size_of(document.text)}}})

    def keeps(self, document: Document, count: Callable[[str], int]) -> None:
        """A document stays to the end; `count` says its tokens."""
        self.distributions("kept", document)
        self.sample(f"{document.source}: kept", document, document.text)
        add(self.tree["tokens"], {document.source: count(document.text)})

    def stage(self, name: str, apply: Apply, document: Document) -> bool:
        """Take a document through a stage, and count what that did; whether it is still there."""
        before = document.text
        self.passes(name, "in", document)
        reason = apply(document)
        if not reason:
            self.passes(name, "out", document)
        if reason or document.text != before:
            lost = size_of(before) - (0 if reason else size_of(document.text))
            count = {"documents": 1, "bytes": lost}
            add(self.tree["stages"][name], {"reasons": {reason: count}} if reason else {"changed": count})
            self.sample(f"{name}: {reason or 'changed'}", document, before, "" if reason else document.text)
        return not reason

    def sample(self, kind: str, document: Document, text: str, after: str = "") -> None:
        """Perhaps show a document: those whose hashes are least, which are the same in any order."""
        drawn = text_hash(f"{self._seed} {kind} {document.id}")
        rows = self.tree["samples"].setdefault(kind, [])
        if len(rows) < SHOWN or drawn < rows[-1][0]:
            scores = ", ".join(f"{name} {value}" for name, value in document.scores.items())
            row = [drawn, document.id, text[:SHOWN_CHARS], after[:SHOWN_CHARS], scores]
            self.tree["samples"][kind] = sorted([*rows, row])[:SHOWN]

    def distributions(self, when: str, document: Document) -> None:
        """Count a document by its length and its scores; numbers in steps of a factor of 2**0.5."""
        for name, value in ({"characters": len(document.text)} | document.scores).items():
            if not isinstance(value, str):
                value = f"{2 ** (math.floor(2 * math.log2(max(value, 1e-3))) / 2):.3g}"
            add(self.tree["histograms"], {f"{document.source}: {name}": {value: {when: 1}}})
