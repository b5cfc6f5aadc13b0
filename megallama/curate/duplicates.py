"""What was said before, exactly: paragraphs, and whole texts."""

from __future__ import annotations

from typing import Literal

import numpy as np

from megallama.config.schema import option
from megallama.curate.hashing import normalise, paragraph_hashes, text_hash
from megallama.curate.stage import Apply, Barrier, Document


class _First(Barrier):
    """Whatever has the key of something earlier goes: exact, as far as 64 bits tell texts apart."""

    def combine(self, units: list[np.ndarray], lowest: int, beyond: int) -> tuple[np.ndarray, np.ndarray]:
        bounds = np.array([lowest, beyond - 1], np.uint64)
        cuts = [(np.searchsorted(u, bounds[0]), np.searchsorted(u, bounds[1], side="right")) for u in units]
        keys = np.concatenate([u[first:last] for u, (first, last) in zip(units, cuts, strict=True)])
        owners = np.repeat(np.arange(len(units)), [last - first for first, last in cuts])
        order = np.argsort(keys, kind="stable")
        again = order[1:][keys[order][1:] == keys[order][:-1]]
        return owners[again], keys[again]

    def seen(self, order: np.ndarray, found: np.ndarray) -> np.ndarray:
        """bool [keys]: which keys of a unit came before, in it or in an earlier one."""
        first = np.zeros(len(order), bool)
        first[np.unique(order, return_index=True)[1]] = True
        return (~first | np.isin(order, found)) & (order != 0)


class Paragraphs(_First):
    """Paragraphs (lines) that came before anywhere are taken out, as in CCNet (Wenzek et al. 2019, 3.2)."""

    kind: Literal["paragraphs"]
    min_chars: int = option(300, "shorter texts are dropped afterwards [characters]", ge=0)

    def keys(self, document: Document) -> np.ndarray:
        return paragraph_hashes(document.text)

    def finish(self, order: np.ndarray, counts: np.ndarray, found: np.ndarray) -> Apply:
        drop, ends, numbers = self.seen(order, found), np.cumsum(counts), iter(range(len(counts)))

        def apply(document: Document) -> str:
            number = next(numbers)
            gone = drop[ends[number] - counts[number] : ends[number]]
            if gone.any():
                lines = zip(document.text.split("\n"), gone.tolist(), strict=True)
                document.text = "\n".join(line for line, out in lines if not out).strip("\n")
            if len(document.text) >= self.min_chars and not document.text.isspace():
                return ""
            return "little left" if gone.any() else "too short"

        return apply


class Files(_First):
    """Texts that are equal, but for case, digits and punctuation if `normalised`."""

    kind: Literal["files"]
    normalised: bool = option(False, "compare without case, accents, digits and punctuation")

    def keys(self, document: Document) -> np.ndarray:
        text = normalise(document.text).decode() if self.normalised else document.text
        return np.array([text_hash(text)], np.uint64)

    def finish(self, order: np.ndarray, counts: np.ndarray, found: np.ndarray) -> Apply:
        drop = iter(self.seen(order, found).tolist())
        return lambda document: "same text as an earlier one" if next(drop) else ""
