"""Python's garbage collection at chosen steps, so that no rank stops for it while the others wait.

Python collects whenever enough objects have been made: on every rank at another moment, each for tens of
milliseconds with a large heap.  Here all ranks collect after the same step, and what existed before the first one
is not looked at again.
"""

from __future__ import annotations

import gc
from typing import Self


class GcSchedule:
    """While entered, nothing is collected but by `step`; interval 0 leaves everything to Python."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._was_on = False

    def __enter__(self) -> Self:
        self._was_on = gc.isenabled()
        if self._interval:
            gc.collect()
            gc.freeze()
            gc.disable()
        return self

    def step(self, number: int) -> None:
        """Step `number` is done: collect, if it is one to collect after."""
        if self._interval and number % self._interval == 0:
            gc.collect()

    def __exit__(self, *exception: object) -> None:
        if self._interval:
            gc.unfreeze()
            if self._was_on:
                gc.enable()
