"""A rank of a soak writes down the samples of every step that it is given, whoever has started its process.

The file SOAK_RECORDS gets one line per step, at once: the moment [s of the monotonic clock], how many steps were
finished before it, the numbers of its samples.  What is made again after a fault is written again: the last line of a
step counts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from megallama.train import supervised

if TYPE_CHECKING:
    from megallama.comm.flight_record import FlightRecord

PAUSE = 0.01  # s before every step: steps of so small a model are too short for a kill to fall into one


def write_down(file: int) -> None:
    """From now on the loader of this process says what it gives."""
    import megallama.train.loop as loop  # with torch: a trainer, not its supervisor
    from megallama.data.loader import Loader

    class Recorded(Loader):
        """Says what it gives."""

        def __init__(self, read: Any, ids_of_step: Any, **more: Any) -> None:
            self._ids: dict[int, list[int]] = {}

            def known(step: int) -> Sequence[Sequence[int]]:
                rows: Sequence[Sequence[int]] = ids_of_step(step)
                self._ids[step] = [number for row in rows for number in row]
                return rows

            super().__init__(read, known, **more)

        def __next__(self) -> Any:
            time.sleep(PAUSE)
            step, batches = self.step, super().__next__()
            words = [f"{time.monotonic():.6f}", str(step), ",".join(map(str, self._ids.pop(step)))]
            os.write(file, f"{' '.join(words)}\n".encode())
            return batches

    loop.Loader = Recorded  # type: ignore[misc]


def install(file: str) -> None:
    """From now on every trainer of this process writes into `file`, those of a maker that a supervisor starts too."""
    opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for name in ("start_supervisor", "make_again"):
        setattr(supervised, name, partial(_recorded, getattr(supervised, name), opened))


def _recorded(start: Callable[[], FlightRecord], file: int) -> FlightRecord:
    record = start()  # comes back in every trainer
    write_down(file)
    return record
