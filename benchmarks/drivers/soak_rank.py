"""One rank of a soak: `megallama.pretrain`, which also writes down the samples of every step that it is given.

    python soak_rank.py FILE [section.key=value ...]

FILE gets one line per step, at once: the moment [s of the monotonic clock], how many steps were finished before it,
the numbers of its samples.  What is made again after a fault is written again: the last line of a step counts.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megallama import pretrain

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


def main() -> int:
    """As the entry point; the exit status."""
    file = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    start = pretrain.start_supervisor

    def started() -> FlightRecord:
        record = start()  # comes back in every trainer
        write_down(file)
        return record

    pretrain.start_supervisor = started
    return pretrain.process()


if __name__ == "__main__":
    sys.exit(main())
