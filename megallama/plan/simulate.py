"""What a schedule costs: time, bubble and memory, with its own cost for every stage; and a chart of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megallama.plan.schedule import B, Event, F, I, Kind, Schedule, W, walk

LEGEND = "digits: forward, capitals: backward (A is micro-batch 0), small letters: weight gradients, dots: idle"


class StageCost(NamedTuple):
    """Time of one micro-batch on one stage: forward, gradient of the input, gradient of the weights."""

    forward: float = 1.0
    input_grad: float = 1.0
    weight_grad: float = 1.0

    def of(self, kind: Kind) -> float:
        """Time of an action of this kind."""
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
        """Longest time from a rank's first action to its last; what a step takes where ranks do not wait at its end."""
        starts, ends = {e.rank: e.start for e in reversed(self.events)}, {e.rank: e.end for e in self.events}
        return max(ends[rank] - starts[rank] for rank in ends)


def simulate(schedule: Schedule, costs: Sequence[StageCost] | None = None, hop: float = 0.0) -> Report:
    """Run a schedule against a clock; `costs` per stage (default 1, 1, 1), `hop` the time of one transfer.

    Transfers are posted without blocking; a compute waits for the values it reads.
    """
    costs = costs or [StageCost()] * schedule.num_stages
    assert len(costs) == schedule.num_stages, (len(costs), schedule.num_stages)
    events = tuple(walk(schedule, lambda a: costs[a.stage].of(a.kind), hop))
    busy = [0.0] * schedule.num_ranks
    for event in events:
        busy[event.rank] += event.end - event.start
    peaks = tuple(schedule.peak_in_flight(r) for r in range(schedule.num_ranks))
    return Report(max(e.end for e in events), tuple(busy), peaks, events)


def draw(report: Report, width: int = 100) -> str:
    """An ASCII chart, one row per rank, at most `width` columns of time.

    `LEGEND` explains it: a forward is the last digit of its micro-batch, a capital also an input gradient.
    """
    scale = min(2.0, width / report.makespan)
    rows = [["."] * round(report.makespan * scale) for _ in report.busy]
    for event in report.events:
        m = event.action.microbatch
        glyph = str(m % 10) if event.action.kind is F else chr((97 if event.action.kind is W else 65) + m % 26)
        first, last = round(event.start * scale), round(event.end * scale)
        rows[event.rank][first:last] = glyph * (last - first)
    return "\n".join(f"rank {r:>2} |{''.join(row)}|" for r, row in enumerate(rows))
