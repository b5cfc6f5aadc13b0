"""What happened in a step: every action of the pipeline and every communication, timed.

Barriers before the first traced step align clocks.  On a GPU, blocked is where its stream stood still.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from megallama.comm.flight_record import FlightRecord
from megallama.comm.group import Done, Group, Groups, Handle, Op, Wrapped
from megallama.comm.stream_record import event_now
from megallama.config.schema import Config
from megallama.pipeline.runtime import Observer, PipelineRuntime
from megallama.plan.schedule import Action, Schedule
from megallama.plan.timeline import Flight, Span, chrome_trace, exposure
from megallama.train.log import Logger

CLOCK_SYNC_ROUNDS = 7  # barriers whose ends are compared: a rank may hear of some of them late


def seconds_after(zero: Any, device: torch.device) -> Callable[[Any], float]:
    """A function of readings of the clock, or of events on a GPU, which is waited for once."""
    if device.type != "cuda":
        return lambda reading: reading - zero
    torch.cuda.synchronize(device)
    return lambda reading: zero.elapsed_time(reading) / 1e3


@dataclass
class Tape:
    """What `Timed` groups write while `clock` is set, in order of the calls."""

    clock: Callable[[], Any] | None = None
    calls: list[TimedCall] = field(default_factory=list)


@dataclass
class TimedCall:
    """A handle that notes its first wait; by the tape's clock, None outside a traced step."""

    axis: str
    op: str
    nbytes: int
    tape: Tape
    inner: Handle = Done()
    issued: Any = None
    started: Any = None  # the call that started it has returned
    waited: Any = None  # somebody began to wait
    end: Any = None  # and need not wait any more

    def wait(self) -> None:
        self._note(self.inner.wait)

    def done(self) -> bool:
        if done := self.inner.done():
            self._note(lambda: None)
        return done

    def _note(self, wait: Callable[[], None]) -> None:
        clock = None if self.end is not None else self.tape.clock
        if clock is not None:
            if self.issued is None:  # before the traced step
                self.tape.calls.append(self)
            self.waited = clock()
        wait()
        if clock is not None:
            self.end = clock()
        self.inner = Done()  # the tape must not keep its tensors


class Timed(Wrapped):
    """While the tape has a clock, notes when operations were started and waited for."""

    def __init__(self, inner: Group, tape: Tape) -> None:
        super().__init__(inner)
        self._tape = tape

    def _call(
        self, op: str, tensor: Tensor, start: Callable[[], Handle], peer: int | None = None, reduce: Op = "sum"
    ) -> Handle:
        call, now = TimedCall(self.name, op, tensor.nbytes, self._tape), self._tape.clock
        if now is not None:
            self._tape.calls.append(call)
            call.issued = now()
        call.inner = start()
        call.started = now and now()
        return call


class StepTracer(Observer):
    """Writes a file per pipeline for each of `log.trace_steps`."""

    def __init__(self, config: Config, groups: Groups, device: torch.device, log: Logger, record: FlightRecord) -> None:
        super().__init__(record)
        self._log, self._tape, self._device = log, Tape(), device
        self._now = partial(event_now, device) if device.type == "cuda" else time.perf_counter
        self._steps, self._folder = config.log.trace_steps or (0, -1), Path(config.run.folder) / "trace"
        several = [] if self._steps[1] < 0 else [g for g in vars(groups).items() if len(getattr(g[1], "ranks", ())) > 1]
        timed: dict[str, Any] = {name: Timed(group, self._tape) for name, group in several}
        self.groups = replace(groups, **timed)  # those of several ranks write on the tape
        self._timings: list[list[Any]] = []  # of each action: start, input there, end
        self._syncs: list[Any] = []
        self._pending: list[tuple[int, Schedule, list[Any]]] = []

    def started(self, action: Action | None) -> None:
        super().started(action)
        self._timings.append([now := self._now(), now, now])

    def arrived(self) -> None:
        self._timings[-1][1] = self._now()

    def ended(self) -> None:
        super().ended()
        self._timings[-1][2] = self._now()

    @contextmanager
    def step(self, runtime: PipelineRuntime, number: int, schedule: Schedule) -> Iterator[None]:
        """Trace the ``with`` block, if step `number` is to be."""
        if not self._steps[0] <= number <= self._steps[1]:
            yield
            return
        now, before = self._now, runtime.observer
        if not self._syncs:
            for _ in range(CLOCK_SYNC_ROUNDS):
                self.groups.world.barrier()
                self._syncs.append(now())
        self._tape.clock, runtime.observer, self._timings = now, self, []
        start = now()
        yield
        end = now()
        self._tape.clock, runtime.observer = None, before
        at = seconds_after(self._syncs[0], self._device)
        begin, stop = at(start), at(end)
        flights = []
        for call in self._tape.calls:  # what lies outside the step is put at its border
            issued = (begin, begin) if call.issued is None else (at(call.issued), at(call.started))
            ended = (stop, stop) if call.end is None else (at(call.waited), at(call.end))
            flights.append((call.axis, f"{call.op} {call.nbytes / 2**20:.3g} MiB", *issued, *ended))
            call.issued = None  # of those that are still under way, the next step shows the rest
        self._tape.calls.clear()
        row = [[*map(at, self._syncs)], begin, stop, [[*map(at, times)] for times in self._timings], flights]
        self._pending.append((number, schedule, row))
        if number == self._steps[1]:
            self.write()

    def write(self) -> None:
        """Write the files of all steps, after the last of them: none waits for a disk."""
        for number, schedule, row in self._pending:
            rows = self.groups.pp.gather_values(row)
            if self.groups.pp.rank == 0:
                self._write(number, schedule, rows)
        self._pending.clear()

    def _write(self, number: int, schedule: Schedule, rows: list[Any]) -> None:
        ahead = [median(m - n for m, n in zip(syncs, rows[0][0], strict=True)) for syncs, *_ in rows]  # of rank 0
        zero = min(begin - early for early, (_, begin, *_) in zip(ahead, rows, strict=True))
        spans = [
            Span(r, str(action), *(t - zero - ahead[r] for t in times))
            for r, (*_, timings, _) in enumerate(rows)
            for action, times in zip([*schedule.steps[r], "waits for sends"], timings, strict=True)
        ]
        flights = [
            Flight(r, axis, name, *(t - zero - ahead[r] for t in times))
            for r, (*_, found) in enumerate(rows)
            for axis, name, *times in found
        ]
        coords, seconds = self.groups.coords, max(stop - begin for _, begin, stop, *_ in rows)
        title = f"step {number}, {schedule.name}"
        file = self._folder / f"step-{number:08d}-dp{coords['dp']}-tp{coords['tp']}.json"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(chrome_trace({title: spans}, {title: flights}), encoding="utf-8")
            self._log.info(f"trace of step {number}: {file}")
        except OSError as error:
            self._log.warn(f"no trace of step {number}: {file} cannot be written: {error.strerror}")
        words = exposure(flights, len(rows), seconds)
        self._log.info(f"step {number}: {seconds * 1e3:.1f} ms, blocked in communication: {words}")
