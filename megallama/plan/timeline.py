"""A step against the clock, simulated or measured; an ASCII chart, and a trace file.

In a trace (Chrome's trace events, for ui.perfetto.dev) every timeline is a process and every pipeline rank a thread of
it.  Communication lies on lanes of its own, a bar from the call to the end of the wait.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megallama.plan.schedule import B, Event, F, I, Kind, Schedule, W, walk

LEGEND = "digits: forward, capitals: backward (A is micro-batch 0), small letters: weight gradients, dots: idle"
COMMUNICATION, BLOCKED = "communication", "blocked"  # categories of what is no action


class StageCost(NamedTuple):
    """Time of one micro-batch on one stage."""

    forward: float = 1.0
    input_grad: float = 1.0
    weight_grad: float = 1.0

    def of(self, kind: Kind) -> float:
        return {F: self.forward, I: self.input_grad, W: self.weight_grad, B: self.input_grad + self.weight_grad}[kind]


@dataclass(frozen=True)
class Report:
    """Times are in the units of the costs."""

    makespan: float
    busy: tuple[float, ...]  # per rank
    peak_in_flight: tuple[int, ...]  # per rank, in (stage, micro-batch) units
    events: tuple[Event, ...]

    @property
    def bubble(self) -> float:
        """Idle share of all ranks' time, 0..1."""
        return 1 - sum(self.busy) / (self.makespan * len(self.busy))

    @property
    def longest_span(self) -> float:
        """Longest time from a rank's first action to its last."""
        starts, ends = {e.rank: e.start for e in reversed(self.events)}, {e.rank: e.end for e in self.events}
        return max(ends[rank] - starts[rank] for rank in ends)


def simulate(schedule: Schedule, costs: Sequence[StageCost] | None = None, hop: float = 0.0) -> Report:
    """Run a schedule against a clock; `costs` per stage, `hop` the time of one transfer."""
    costs = costs or [StageCost()] * schedule.num_stages
    assert len(costs) == schedule.num_stages, (len(costs), schedule.num_stages)
    events = tuple(walk(schedule, lambda a: costs[a.stage].of(a.kind), hop))
    busy = [0.0] * schedule.num_ranks
    for event in events:
        busy[event.rank] += event.end - event.start
    peaks = tuple(schedule.peak_in_flight(r) for r in range(schedule.num_ranks))
    return Report(max(e.end for e in events), tuple(busy), peaks, events)


def draw(report: Report, width: int = 100) -> str:
    """An ASCII chart, a row per rank, at most `width` columns of time; see `LEGEND`."""
    scale = min(2.0, width / report.makespan)
    rows = [["."] * round(report.makespan * scale) for _ in report.busy]
    for event in report.events:
        m = event.action.microbatch
        glyph = str(m % 10) if event.action.kind is F else chr((97 if event.action.kind is W else 65) + m % 26)
        first, last = round(event.start * scale), round(event.end * scale)
        rows[event.rank][first:last] = glyph * (last - first)
    return "\n".join(f"rank {r:>2} |{''.join(row)}|" for r, row in enumerate(rows))


class Span(NamedTuple):
    """One action of one pipeline rank; times in seconds from the beginning of the step."""

    rank: int
    name: str  # an action as schedules write it, e.g. F0.3; or the words for a wait
    start: float
    arrived: float  # when what it waited for was there: `start` if it did not wait
    end: float


class Flight(NamedTuple):
    """One communication of a pipeline rank; times in seconds from the step's beginning."""

    rank: int
    axis: str  # the group: tp, dp, pp, ...
    name: str
    issued: float  # it was called
    started: float  # the call had returned
    waited: float  # the wait for it began
    end: float  # and ended

    @property
    def blocked(self) -> float:
        """Seconds in which the rank only started it or waited for it: its exposed time."""
        return self.started - self.issued + self.end - self.waited


def exposure(flights: Sequence[Flight], ranks: int, seconds: float) -> str:
    """Blocked time by group, mean over pipeline ranks: ``tp 12.3 ms (4.1 %), pp ...``."""
    sums: dict[str, float] = {}
    for flight in flights:
        sums[flight.axis] = sums.get(flight.axis, 0.0) + flight.blocked / ranks
    words = [f"{axis} {s * 1e3:.1f} ms ({s / seconds:.1%})" for axis, s in sums.items()]
    return ", ".join(words) or "nothing"


def chrome_trace(timelines: Mapping[str, Sequence[Span]], flights: Mapping[str, Sequence[Flight]] | None = None) -> str:
    """The text of a trace file: timelines, and communication of some, by name."""
    events: list[dict[str, Any]] = []
    for pid, (title, spans) in enumerate(timelines.items()):
        events.append({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": title}})
        for rank in sorted({span.rank for span in spans}):
            events.append(_thread(pid, rank, f"pipeline rank {rank}"))
        for span in spans:
            kind = span.name.rstrip("0123456789.")
            events.append(_event(pid, span.rank, span.name, kind, span.start, span.end))
            if span.arrived > span.start and span.arrived < span.end:
                events.append(_event(pid, span.rank, "waits", "waits", span.start, span.arrived))
        events += _lanes(pid, 1 + max((span.rank for span in spans), default=0), (flights or {}).get(title, ()))
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, indent=0)


def _lanes(pid: int, first: int, flights: Sequence[Flight]) -> list[dict[str, Any]]:
    """Flights on as few threads as hold them, from number `first` on, without overlap."""
    lanes: dict[tuple[int, str, int], float] = {}  # rank, group, number -> when it becomes free
    placed: list[tuple[tuple[int, str, int], Flight]] = []
    for flight in sorted(flights, key=lambda f: f.issued):
        number = 0
        while lanes.get((flight.rank, flight.axis, number), flight.issued) > flight.issued:
            number += 1
        lanes[flight.rank, flight.axis, number] = flight.end
        placed.append(((flight.rank, flight.axis, number), flight))
    tids = {lane: first + i for i, lane in enumerate(sorted(lanes))}
    events = [_thread(pid, tid, f"rank {r} {axis}" + f" ({n + 1})" * (n > 0)) for (r, axis, n), tid in tids.items()]
    for lane, flight in placed:
        events.append(_event(pid, tids[lane], flight.name, COMMUNICATION, flight.issued, flight.end))
        for start, end in ((flight.issued, flight.started), (flight.waited, flight.end)):
            if end > start:
                events.append(_event(pid, tids[lane], "blocked", BLOCKED, start, end))
    return events


def _thread(pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}}


def _event(pid: int, rank: int, name: str, kind: str, start: float, end: float) -> dict[str, Any]:
    """A complete event; times of the format are microseconds."""
    ts, dur = round(start * 1e6, 3), round((end - start) * 1e6, 3)
    return {"ph": "X", "pid": pid, "tid": rank, "name": name, "cat": kind, "ts": ts, "dur": dur}
