"""Texts that hold passages of evaluations, which a model is not to have seen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from megallama.config.errors import DataError
from megallama.config.schema import option
from megallama.curate.readers import find
from megallama.curate.stage import Apply, Stage
from megallama.text import documents as texts
from megallama.text.ngrams import WORDS, Ngrams


class Contamination(Stage):
    """Texts that share n-grams with evaluations (Brown et al. 2020, appendix C)."""

    kind: Literal["contamination"]
    against: tuple[str, ...] = option((), "files of evaluations: every text in a row of JSON lines, or a file of text")
    ngram: int = option(WORDS, "words of an n-gram", gt=0)
    min_hits: int = option(1, "n-grams in common from which on a text goes", gt=0)

    def start(self) -> Apply:
        known = Ngrams([*self._passages()], self.ngram)
        if not known.size:
            raise DataError(f"contamination.against holds no text of {self.ngram} words; name evaluations")

        said, most = ("", "passage of an evaluation"), self.min_hits
        return lambda document: said[known.find([document.text]).shape[1] >= most]

    def _passages(self) -> Iterator[str]:
        def unread(name: str, why: str) -> None:
            if not why.endswith("hidden"):
                raise DataError(f"contamination.against: {name}: {why}; an evaluation must be read whole")

        for file in find(self.against, unread) if self.against else ():
            for record in texts.RecordReader([Path(file)]):
                try:
                    rows = texts.suffix_of(file) in texts.JSON_SUFFIXES and not record.fault
                    yield from _strings(json.loads(record.raw) if rows else texts.parse(record)[0])
                except (texts.BadRecord, ValueError, RecursionError) as error:
                    wrong = f"contamination.against: {texts.place(record)}: {error}"
                    raise DataError(f"{wrong}; an evaluation must be read whole") from None


def _strings(value: Any) -> Iterator[str]:
    """Every text in a value of JSON."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(inner)
