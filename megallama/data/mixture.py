"""The mixture of a run: which source sample n comes from, through every change of the weights.

A phase is a stretch of steps with constant weights and a `Blend` of its own, in which every source goes on where it
stopped: no document comes again before its source's epoch ends.  Within a phase the shares are exact after every
sample.  Nothing depends on the order in which the sources are listed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from megallama.config.schema import DataConfig, SourceConfig
from megallama.data.blend import Blend


@dataclass(frozen=True)
class Phase:
    """Constant weights from a step (counted from 1, as logged) and its first sample on."""

    step: int
    sample: int
    weights: Mapping[str, float]  # by source name; a source that is missing has weight 0


def phases_of(config: DataConfig, samples_after: Callable[[int], int]) -> tuple[Phase, ...]:
    """The phases that data.train and data.mixture_schedule describe; samples_after(n): samples of the first n steps."""
    phases = [Phase(1, 0, {s.label: s.weight for s in config.train})]
    for change in config.mixture_schedule:
        weights = {**phases[-1].weights, **change.weights}
        phases.append(Phase(change.step, samples_after(change.step - 1), weights))
    return tuple(phases)


def limits_of(sources: Sequence[SourceConfig], sequences: Sequence[int]) -> list[int | None]:
    """Most samples that max_epochs allows of each source; sequences: its samples of one epoch."""
    caps = zip((source.max_epochs for source in sources), sequences, strict=True)
    return [None if epochs is None else int(Fraction(str(epochs)) * count) for epochs, count in caps]


class Mixture:
    """Samples 0, 1, 2, ... of several sources. Memory and start-up cost depend on sources and phases alone."""

    def __init__(self, names: Sequence[str], phases: Sequence[Phase]) -> None:
        self.names, self.phases = tuple(names), tuple(phases)
        self._firsts = np.array([phase.sample for phase in phases], np.int64)
        self._parts: list[tuple[Blend, np.ndarray, np.ndarray]] = []  # blend, its sources, samples they gave before
        for phase in phases:
            chosen = sorted((i for i, name in enumerate(names) if phase.weights.get(name)), key=lambda i: names[i])
            blend = Blend([phase.weights[names[i]] for i in chosen])
            before = np.array(self.counts(phase.sample) if self._parts else [0] * len(names), np.int64)
            self._parts.append((blend, np.array(chosen), before))

    def locate(self, numbers: np.ndarray) -> np.ndarray:
        """Where samples come from: int64 [2, n], source and index in it. A source's indices are 0, 1, 2, ..."""
        phases = np.searchsorted(self._firsts, numbers, side="right") - 1
        out = np.empty((2, len(numbers)), np.int64)
        for number in set(phases.tolist()):
            blend, chosen, before = self._parts[number]
            here = phases == number
            found = blend.locate(numbers[here] - self._firsts[number])
            sources = chosen[found[0]]
            out[:, here] = sources, found[1] + before[sources]
        return out

    def counts(self, n: int) -> list[int]:
        """How many of the first n samples each source gives."""
        number = int(np.searchsorted(self._firsts[: len(self._parts)], n, side="right")) - 1
        blend, chosen, before = self._parts[number]
        counts = before.copy()
        counts[chosen] += blend.counts(n - int(self._firsts[number]))
        return counts.tolist()

    def first_step_past(
        self, limits: Sequence[int | None], steps: int, samples_after: Callable[[int], int]
    ) -> int | None:
        """The first of `steps` steps that takes more samples of a source than its limit; None if none does."""

        def past(step: int) -> bool:
            counts = self.counts(samples_after(step))
            return any(limit is not None and count > limit for count, limit in zip(counts, limits, strict=True))

        if all(limit is None for limit in limits) or not past(steps):
            return None
        return 1 + bisect_left(range(1, steps + 1), True, key=past)
