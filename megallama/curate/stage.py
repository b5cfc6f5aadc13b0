"""A document, and the two kinds of stages that it goes through.

A `Stage` judges a document alone.  A `Barrier` needs all: each unit of input writes keys, those of all units are
brought together by ranges, and then each unit is read again.  What comes first in the input stays.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from megallama.config.errors import DataError
from megallama.config.schema import Section

UTF8 = ("utf-8", "backslashreplace")  # half a character, as in names of files that are not UTF-8, as JSON has it
Apply = Callable[["Document"], str]
"""What a stage does to a document, in place: why it is dropped, or ""."""


@dataclass(slots=True)
class Document:
    """A text on its way; `meta` is what its reader knows of it: url, path, license, score."""

    text: str
    id: str
    source: str
    scores: dict[str, float | str] = field(default_factory=dict)
    meta: dict[str, str] = field(default_factory=dict)

    def line(self) -> bytes:
        """As a line of JSON."""
        row = {"text": self.text, "source": self.source, "id": self.id, "scores": self.scores, "meta": self.meta}
        return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode(*UTF8) + b"\n"

    @classmethod
    def of(cls, line: bytes) -> Document:
        """From a line that `line` made."""
        return cls(**json.loads(line))


class Stage(Section):
    """Options of a stage; `start` makes it ready in a process, `train` makes the model that it needs."""

    kind: str

    def start(self) -> Apply:
        """Open what it needs, where it needs anything. Raises: DataError."""
        return self.apply

    def apply(self, document: Document) -> str:
        """What a stage does that needs nothing."""
        raise AssertionError(self.kind)

    def train(self, say: Callable[[str], None]) -> None:
        """Write its model; `say` is told how good it is. Raises: DataError."""


class UnitKeys(NamedTuple):
    """What a unit of input wrote for a barrier: memory-mapped arrays, and its documents."""

    file: Path
    keys: np.ndarray  # uint64 [keys], sorted
    docs: np.ndarray  # uint32 [keys]: which document of the unit
    offsets: np.ndarray  # int64 [documents]: where each begins in `file`


class Found(NamedTuple):
    """What a barrier found: what units are to know, and the pairs that were compared."""

    owners: np.ndarray  # int [n]: the numbers of units
    values: np.ndarray  # int [n]: what each is to know
    pairs: list[dict[str, Any]]  # dropped, kept, their sources, similarity


class Barrier(Stage):
    """A stage for which documents must be seen together."""

    many: ClassVar[bool] = True  # a key may come again in a unit, and is of another document then

    def keys(self, document: Document) -> np.ndarray:
        """uint64 [n]: what is compared of it; 0 is never equal to another."""
        raise AssertionError(self.kind)

    def combine(self, units: list[UnitKeys], lowest: int, beyond: int) -> Found:
        """Bring the keys in [lowest, beyond) of all units together."""
        raise AssertionError(self.kind)

    def finish(self, order: np.ndarray, counts: np.ndarray, found: np.ndarray) -> Apply:
        """For a unit's documents in order: `order` are their keys, `counts` of each, `found` what it is to know."""
        raise AssertionError(self.kind)


def need(name: str, what: str) -> Any:
    """A module of an optional package. Raises: DataError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(f"{what} needs the module {name}; pip install 'megallama[curate]'") from None
