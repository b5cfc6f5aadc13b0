"""Which rank is slower than those with the same work: by what each did itself, its waits left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from statistics import median

SLOWER, STEPS_COMPARED, TIMES = 1.06, 20, 3  # excess that counts (1.1 is found); steps compared; times in a row


class Stragglers:
    """Finds ranks whose own work, waits left out, takes longer than that of the ranks with the same stage."""

    def __init__(self, stages: Sequence[int]) -> None:
        self._stages, self._compared = stages, 0
        self._in_a_row: dict[int, int] = {}  # of the ranks that are slow now: in how many comparisons
        self.slowest: tuple[int, float] | None = None  # rank, its time over that of its peers

    def look(self, busy: Mapping[int, tuple[int, Sequence[int]]]) -> list[tuple[int, float]]:
        """Who has now been slow TIMES times, and by what; busy: rank -> steps, own work of the last [ns]."""
        done = min((steps for steps, _ in busy.values()), default=0)
        if len(busy) < len(self._stages) or done < self._compared + STEPS_COMPARED:
            return []
        first, self._compared = self._compared == 0, done  # the first steps warm up
        took = {r: median(times[-(STEPS_COMPARED + steps - done) :]) for r, (steps, times) in busy.items() if times}
        if first or len(took) < len(self._stages):
            return []
        same = {r: [took[p] for p, s in enumerate(self._stages) if s == self._stages[r] and p != r] for r in took}
        excess = {rank: took[rank] / median(peers) for rank, peers in same.items() if peers}
        self.slowest = max(excess.items(), key=itemgetter(1), default=None)
        self._in_a_row = {rank: self._in_a_row.get(rank, 0) + 1 for rank, by in excess.items() if by >= SLOWER}
        return [(rank, excess[rank]) for rank, times in self._in_a_row.items() if times == TIMES]
