"""A progress bar over bytes: MB/s, tokens/s and the time left, on standard error.

Where that is no terminal (a log file), a plain line every few seconds instead.
"""

from __future__ import annotations

import sys
import time
from typing import Any

LINE_SECONDS = 10.0


class ByteProgress:
    """Shows how far a job is; `then`: what it does after the last byte, for a time nobody can tell."""

    def __init__(self, title: str, *, then: str = "", quiet: bool = False) -> None:
        self._title, self._then, self._quiet = title, then, quiet
        self._bar = None if quiet or not sys.stderr.isatty() else _bar(title)
        self._start = self._line = time.monotonic()

    def update(self, done: int, total: int, tokens: int = 0) -> None:
        """Report `done` of `total` bytes and the tokens written so far."""
        now = time.monotonic()
        seconds = max(now - self._start, 1e-6)
        rate = f"{done / seconds / 1e6:.1f} MB/s" + (f", {tokens / seconds / 1e6:.2f} M tokens/s" if tokens else "")
        if self._bar and done >= total and self._then:
            self._bar.update(self._bar.task_ids[0], description=self._then, total=None, rate="")
        elif self._bar:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total, rate=rate)
        elif not self._quiet and now - self._line >= LINE_SECONDS:
            self._line, left = now, seconds * (total - done) / max(done, 1)
            sys.stderr.write(f"{self._title}: {100 * done / max(total, 1):.0f} %, {rate}, {left:.0f} s left\n")
            sys.stderr.flush()

    def __enter__(self) -> ByteProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()


def _bar(title: str) -> Any:
    from rich import progress as rich  # takes as long to import as everything else of this room
    from rich.console import Console

    columns = [rich.TextColumn("{task.description} {task.fields[rate]}"), rich.BarColumn(), rich.TaskProgressColumn()]
    times = [rich.TimeElapsedColumn(), rich.TextColumn("left"), rich.TimeRemainingColumn()]
    bar = rich.Progress(*columns, *times, console=Console(stderr=True), transient=True)
    bar.add_task(title, total=None, rate="")
    return bar
