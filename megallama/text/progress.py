"""A progress bar over bytes: MB/s, tokens/s and the time left, on standard error.

Where that is no terminal (a log file), a plain line every few seconds instead.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack

LINE_SECONDS = 10.0


class ByteProgress(ExitStack):
    """Shows how far a job is; `then`: what it does after the last byte."""

    def __init__(self, title: str, *, then: str = "", quiet: bool = False) -> None:
        super().__init__()
        self._title, self._then, self._quiet, self._bar = title, then, quiet, None
        self._start = self._line = time.monotonic()
        if not quiet and sys.stderr.isatty():
            from rich import progress as rich  # slow to import
            from rich.console import Console

            columns = [rich.TextColumn("{task.description} {task.fields[rate]}"), rich.BarColumn()]
            columns += [rich.TaskProgressColumn(), rich.TimeElapsedColumn()]
            columns += [rich.TextColumn("left"), rich.TimeRemainingColumn()]
            self._bar = self.enter_context(rich.Progress(*columns, console=Console(stderr=True), transient=True))
            self._task = self._bar.add_task(title, total=None, rate="")

    def update(self, done: int, total: int, tokens: int = 0, note: str = "") -> None:
        """Report `done` of `total` bytes and the tokens written so far."""
        now = time.monotonic()
        seconds = max(now - self._start, 1e-6)
        rate = f"{done / seconds / 1e6:.1f} MB/s" + (f", {tokens / seconds / 1e6:.2f} M tokens/s" if tokens else note)
        if self._bar and done >= total and self._then:
            self._bar.tasks[0].total = None  # the bar pulses; to `update` None is no change
            self._bar.update(self._task, description=self._then, rate="")
        elif self._bar:
            self._bar.update(self._task, completed=done, total=total, rate=rate)
        elif not self._quiet and now - self._line >= LINE_SECONDS:
            self._line, left = now, seconds * (total - done) / max(done, 1)
            sys.stderr.write(f"{self._title}: {100 * done / max(total, 1):.0f} %, {rate}, {left:.0f} s left\n")
            sys.stderr.flush()
