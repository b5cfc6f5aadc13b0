"""Which source sample n comes from: exact shares at every moment, without arrays of the run's length.

After n samples a source of share w has given floor(n w) or ceil(n w) of them, for every n: a fair schedule of one
processor (Baruah, Cohen, Plaxton and Varvel 1996, "Proportionate progress"), whose j-th sample falls into the slots
floor((j-1)/w)+1 .. ceil(j/w).  Earliest deadline first finds one, but only from n = 0 on.  To ask for any n, the line
is cut into blocks of at least 4 / (smallest share), with the counts at their ends in closed form:

At n the sources with fraction f = n w - floor(n w) > 0 are inside a slot window; as many as the f sum to are rounded
up. The future is feasible if, ordered by deadline, every prefix with fractions summing to F has floor(F) rounded up;
the past, if the same holds ordered by release (Hall's condition; no window straddles both ends of a block).  Walking
the deadlines and taking the earliest release seen whenever one is due satisfies both.
"""

import heapq
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm

import numpy as np

from megallama.config.errors import DataError
from megallama.config.schema import DataConfig, SourceConfig

MIN_SHARE = Fraction(1, 100_000)
MIN_BLOCK = 256
SamplesAfter = Callable[[int], int]  # of the first n steps


class Blend:
    """Source numbers, in which every source keeps its share exactly. One block is kept in memory.

    Raises: DataError for a weight that is not positive or vanishes beside the others.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(str(weight)) for weight in weights]
        if not exact or (least := min(exact)) <= 0:
            raise DataError(f"the weights of the data sources are {list(weights)}; every weight must be positive")
        if least < sum(exact) * MIN_SHARE:
            few = f"less than 1 sample in {MIN_SHARE.denominator:,}; leave it out or raise its weight"
            raise DataError(f"a data source has weight {float(least)} of {float(sum(exact))} in all, {few}")
        whole = lcm(*(x.denominator for x in exact))
        parts = [int(x * whole) for x in exact]
        shared = gcd(*parts)
        self.parts = tuple(part // shared for part in parts)
        self.total = sum(self.parts)
        self.block_length = max(MIN_BLOCK, 4 * -(-self.total // min(self.parts)))
        self._block = (-1, np.empty((2, 0), np.int64))  # number; each slot's source and index

    def locate(self, numbers: np.ndarray) -> np.ndarray:
        """Where samples come from: int64 [2, n], source and index in it: 0, 1, 2, ..."""
        blocks, slots = np.divmod(numbers, self.block_length)
        out = np.empty((2, len(numbers)), np.int64)
        for number in sorted(set(blocks.tolist())):
            block = self._block  # read once: another thread may ask for another block meanwhile
            if block[0] != number:
                block = self._block = (number, self._build(number))
            here = blocks == number
            out[:, here] = block[1][:, slots[here]]
        return out

    def counts(self, n: int) -> list[int]:
        """How many of the first n samples each source gives: n times its share, within one."""
        number, slot = divmod(n, self.block_length)
        counts = self._counts_at(n - slot)
        if slot:
            counts = (counts + np.bincount(self._build(number)[0, :slot], minlength=len(counts))).tolist()
        return counts

    def _counts_at(self, n: int) -> list[int]:
        """The counts at a block end, in closed form (see the top of the file)."""
        counts, open_windows = [n * part // self.total for part in self.parts], []
        for source, (part, done) in enumerate(zip(self.parts, counts, strict=True)):
            if rest := n * part % self.total:  # (deadline, source, release, fraction * total)
                open_windows.append((-(-(done + 1) * self.total // part), source, done * self.total // part, rest))
        seen: list[tuple[int, int]] = []
        mass = 0  # sum of their fractions less what was rounded up, times total
        for _, source, release, rest in sorted(open_windows):
            heapq.heappush(seen, (release, source))
            mass += rest
            if mass >= self.total:
                mass -= self.total
                counts[heapq.heappop(seen)[1]] += 1
        return counts

    def _build(self, number: int) -> np.ndarray:
        """Lay out one block: earliest deadline first between the counts at its two ends."""
        start, stop = number * self.block_length, (number + 1) * self.block_length
        units = []  # (release, deadline, source, index): slots release+1 .. deadline may hold it
        before, after = self._counts_at(start), self._counts_at(stop)
        for source, part in enumerate(self.parts):
            for index in range(before[source], after[source]):
                deadline = min(-(-(index + 1) * self.total // part), stop)
                units.append((max(index * self.total // part, start), deadline, source, index))
        units.sort(reverse=True)
        chosen: list[list[int]] = []
        ready: list[tuple[int, int, int]] = []
        for slot in range(start, stop):
            while units and units[-1][0] <= slot:
                heapq.heappush(ready, units.pop()[1:])
            deadline, *unit = heapq.heappop(ready)
            assert deadline > slot, (self.parts, slot)
            chosen.append(unit)
        return np.array(chosen, np.int64).T


@dataclass(frozen=True)
class Phase:
    """Constant weights from a step (counted from 1, as logged) and its first sample on.

    starts: the index in each source where it begins, by name; None is where the phase before it ended.
    """

    step: int
    sample: int
    weights: Mapping[str, float]  # by source name; a source that is missing has weight 0
    starts: Mapping[str, int] | None = None


def phases_of(config: DataConfig, samples_after: SamplesAfter) -> tuple[Phase, ...]:
    """The phases that data.train and data.mixture_schedule describe."""
    phases = [Phase(1, 0, {s.label: s.weight for s in config.train})]
    for change in config.mixture_schedule:
        weights = {**phases[-1].weights, **change.weights}
        phases.append(Phase(change.step, samples_after(change.step - 1), weights))
    return tuple(phases)


class Mixture:
    """A `Blend` for each phase; nothing depends on the order in which the sources are listed.

    A source goes on in a phase where it stopped: no document comes again before its epoch ends.
    """

    def __init__(self, names: Sequence[str], phases: Sequence[Phase]) -> None:
        self.names, self.phases = tuple(names), tuple(phases)
        self._firsts = np.array([phase.sample for phase in phases], np.int64)
        self._parts: list[tuple[Blend, np.ndarray, np.ndarray]] = []  # blend, sources, samples given before
        for phase in phases:
            chosen = sorted((i for i, name in enumerate(names) if phase.weights.get(name)), key=lambda i: names[i])
            blend = Blend([phase.weights[names[i]] for i in chosen])
            at = self.counts(phase.sample) if self._parts else [0] * len(names)
            at = at if phase.starts is None else [phase.starts.get(name, 0) for name in names]
            self._parts.append((blend, np.array(chosen), np.array(at, np.int64)))

    def locate(self, numbers: np.ndarray) -> np.ndarray:
        phases = np.searchsorted(self._firsts, numbers, side="right") - 1
        out = np.empty((2, len(numbers)), np.int64)
        for number in set(phases.tolist()):
            blend, chosen, before = self._parts[number]
            here = phases == number
            found, index = blend.locate(numbers[here] - self._firsts[number])
            out[:, here] = chosen[found], index + before[chosen[found]]
        return out

    def counts(self, n: int) -> list[int]:
        n = max(n, int(self._firsts[0]))  # a run that goes on from another begins there
        number = int(np.searchsorted(self._firsts[: len(self._parts)], n, side="right")) - 1
        blend, chosen, before = self._parts[number]
        counts = before.copy()
        counts[chosen] += blend.counts(n - int(self._firsts[number]))
        return counts.tolist()

    def step_past(self, source: SourceConfig, sequences: int, steps: int, samples_after: SamplesAfter) -> int | None:
        """The first of `steps` steps that takes a source past its max_epochs, if any."""
        number = self.names.index(source.label)

        def past(step: int) -> bool:
            return self.counts(samples_after(step))[number] > Fraction(str(source.max_epochs)) * sequences

        if source.max_epochs is None or not past(steps):
            return None
        return 1 + bisect_left(range(1, steps + 1), True, key=past)
