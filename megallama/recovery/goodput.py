"""Where the time of a run goes, over all its starts: new steps, steps made again, waits, starts, and no run at all."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

from megallama.recovery.node import write_json

KINDS = ("productive", "waiting", "starting", "repeated", "down")


class Goodput:
    """Counts what rank 0 does; goes on with the counts in `path`, which the starts before have left."""

    def __init__(self, path: Path) -> None:
        self._path, self._first_step, self._trains = path, True, False
        self.seconds, self.restarts, self.best = dict.fromkeys(KINDS, 0.0), 0, 0
        self._last, now = time.monotonic(), time.time()
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or not ours: counted from here
            before = json.loads(path.read_text(encoding="utf-8"))
            self.seconds |= {kind: float(before["seconds"][kind]) for kind in KINDS}
            self.best, self.restarts = int(before["step"]), int(before["restarts"]) + 1
            self.seconds["down"] += max(0.0, now - float(before["time"]))

    def count(self, step: int, phase: str) -> None:
        """The time since the last call is what the rank does now."""
        now = time.monotonic()
        self._trains |= phase not in ("setting up", "between steps", "evaluate")
        if phase == "setting up":
            kind = "starting"
        elif not self._trains:  # evaluations that the start before has not made
            kind = "waiting"
        elif step <= self.best and self._first_step:
            kind = "repeated"
        else:
            self._first_step = False  # from here on all is new
            kind = "waiting" if phase in ("data", "save", "evaluate") else "productive"
            self.best = max(self.best, step)
        self.seconds[kind] += now - self._last
        self._last = now

    def write(self) -> None:
        counts = {"seconds": self.seconds, "restarts": self.restarts, "step": self.best, "time": time.time()}
        write_json(self._path, counts)
