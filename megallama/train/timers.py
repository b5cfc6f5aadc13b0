"""Where the time of a step goes: named phases, two clock reads each.

Phases may nest; a phase counts only the time in which no inner phase runs, so the phases add up to at most the whole.
It is the time of the host: on a GPU kernels run after the call that started them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Timers:
    """Seconds per phase since the last `lap`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._inner: list[float] = []  # per open phase: seconds spent in the phases inside it
        self._start = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the ``with`` block under `name`; the same name adds up."""
        start = self._clock()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = self._clock() - start
            own = elapsed - self._inner.pop()
            self._seconds[name] = self._seconds.get(name, 0.0) + own
            if self._inner:
                self._inner[-1] += elapsed

    def lap(self) -> tuple[float, dict[str, float]]:
        """(seconds since the last lap, seconds of each phase in it); starts the next one."""
        assert not self._inner, "lap() inside a phase"
        now = self._clock()
        total, self._start = now - self._start, now
        phases, self._seconds = self._seconds, {}
        return total, phases
