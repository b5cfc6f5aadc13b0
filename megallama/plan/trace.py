"""Timelines of a step as Chrome trace events, which ui.perfetto.dev and chrome://tracing open.

Every timeline is a process and every pipeline rank a thread of it, so that a simulated and a measured step,
both beginning at 0, lie one below the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from megallama.plan.simulate import Report


class Span(NamedTuple):
    """One action of one pipeline rank; times in seconds from the beginning of the step."""

    rank: int
    name: str  # an action as schedules write it, e.g. F0.3; or the words for a wait
    start: float
    arrived: float  # when what it waited for was there: `start` if it did not wait
    end: float


def simulated(report: Report, unit: float = 1.0) -> list[Span]:
    """The spans of a simulation, rank by rank; `unit` is one unit of its costs [s]."""
    spans = [Span(e.rank, str(e.action), e.start * unit, e.start * unit, e.end * unit) for e in report.events]
    return sorted(spans, key=lambda span: (span.rank, span.start))


def chrome_trace(timelines: Mapping[str, Sequence[Span]]) -> str:
    """The text of a trace file with these timelines, by name."""
    events: list[dict[str, Any]] = []
    for pid, (title, spans) in enumerate(timelines.items()):
        events.append({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": title}})
        for rank in sorted({span.rank for span in spans}):
            name = {"name": f"pipeline rank {rank}"}
            events.append({"ph": "M", "pid": pid, "tid": rank, "name": "thread_name", "args": name})
        for span in spans:
            kind = span.name.rstrip("0123456789.")
            events.append(_event(pid, span.rank, span.name, kind, span.start, span.end))
            if span.arrived > span.start and span.arrived < span.end:
                events.append(_event(pid, span.rank, "waits", "waits", span.start, span.arrived))
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, indent=0)


def _event(pid: int, rank: int, name: str, kind: str, start: float, end: float) -> dict[str, Any]:
    """A complete event; times of the format are microseconds."""
    ts, dur = round(start * 1e6, 3), round((end - start) * 1e6, 3)
    return {"ph": "X", "pid": pid, "tid": rank, "name": name, "cat": kind, "ts": ts, "dur": dur}
