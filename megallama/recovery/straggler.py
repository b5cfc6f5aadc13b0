"""Which rank is slower than those with the same work: by what each did itself, its waits left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

SLOWER, STEPS_COMPARED, TIMES = 1.1, 20, 3  # excess that counts; steps of a comparison; comparisons in a row


class Stragglers:
    """Finds ranks whose own work, waits left out, takes longer than that of the ranks with the same stage."""

    def __init__(self, stages: Sequence[int]) -> None:
        self._stages, self._compared, self._in_a_row = stages, 0, dict.fromkeys(range(len(stages)), 0)
        self.slowest: tuple[int, float] | None = None  # rank, its time over that of its peers
        self.said: set[int] = set()

    def look(self, busy: Mapping[int, tuple[int, Sequence[int]]]) -> list[tuple[int, float]]:
        """busy: rank -> steps done, own work of the last ones [ns]. Ranks that have just been found slow, and by what.

        A finding takes TIMES comparisons in a row, of STEPS_COMPARED steps each that no other comparison has.
        """
        done = min((steps for steps, _ in busy.values()), default=0)
        if len(busy) < len(self._stages) or done < self._compared + STEPS_COMPARED:
            return []
        first = self._compared == 0  # the first steps warm up
        self._compared = done
        took = {r: median(times[-(STEPS_COMPARED + steps - done) :]) for r, (steps, times) in busy.items() if times}
        if first or len(took) < len(self._stages):
            return []
        found, self.slowest = [], None
        for rank, seconds in took.items():
            peers = [took[r] for r, stage in enumerate(self._stages) if stage == self._stages[rank] and r != rank]
            excess = seconds / median(peers) if peers else 1.0
            if peers and (self.slowest is None or excess > self.slowest[1]):
                self.slowest = rank, excess
            self._in_a_row[rank] = self._in_a_row[rank] + 1 if excess >= SLOWER else 0
            if excess < SLOWER:
                self.said.discard(rank)
            elif self._in_a_row[rank] >= TIMES and rank not in self.said:
                self.said.add(rank)
                found.append((rank, excess))
        return found
