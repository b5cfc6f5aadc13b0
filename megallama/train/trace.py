"""What the pipeline really did in a step: every action by the clock, in the form in which a simulation is drawn.

The ranks of a pipeline begin a traced step together, so their clocks agree to the length of a barrier.  On a GPU
the device is awaited before every reading of the clock: a traced step is slower and hides no transfer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megallama.plan.schedule import Schedule
from megallama.plan.trace import Span, chrome_trace
from megallama.train.assemble import Rank
from megallama.train.log import Logger


class StepTracer:
    """Writes a file per pipeline for each step from the first to the last of `steps`."""

    def __init__(self, rank: Rank, steps: tuple[int, int] | None, folder: Path, log: Logger) -> None:
        self._rank = rank
        self._steps = steps or (0, -1)
        self._folder = folder
        self._log = log

    @contextmanager
    def step(self, number: int, schedule: Schedule) -> Iterator[None]:
        """Trace the ``with`` block, if step `number` is to be."""
        if not self._steps[0] <= number <= self._steps[1]:
            yield
            return
        runtime, pp, coords = self._rank.runtime, self._rank.groups.pp, self._rank.groups.coords
        self._rank.optimizer.wait()
        self._rank.groups.world.barrier()
        zero, runtime.clock = self._now(), self._now
        yield
        runtime.clock = None
        rows = pp.gather_values([[t - zero for t in timing] for timing in runtime.timings])
        if pp.rank > 0:
            return
        spans = [
            Span(r, str(action), *times)
            for r, timings in enumerate(rows)
            for action, times in zip([*schedule.steps[r], "waits for sends"], timings, strict=True)
        ]
        file = self._folder / f"step-{number:08d}-dp{coords['dp']}-tp{coords['tp']}.json"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(chrome_trace({f"step {number}, {schedule.name}": spans}), encoding="utf-8")
            self._log.info(f"trace of step {number}: {file}")
        except OSError as error:
            self._log.warn(f"no trace of step {number}: {file} cannot be written: {error.strerror}")

    def _now(self) -> float:
        if self._rank.device.type == "cuda":
            torch.cuda.synchronize(self._rank.device)
        return time.perf_counter()
