"""Chrome traces: times, lanes and what was blocked."""

from __future__ import annotations

import json

from megallama.commands.draw import simulated
from megallama.plan.builders import one_f_one_b
from megallama.plan.schedule import lower
from megallama.plan.timeline import Flight, Span, chrome_trace, exposure, simulate

FLIGHTS = [
    Flight(0, "dp", "reduce", 1.0, 1.1, 1.5, 1.8),
    Flight(0, "dp", "reduce", 1.2, 1.2, 1.9, 2.0),  # begins before the first has ended: a lane of its own
    Flight(0, "dp", "gather", 1.8, 1.8, 2.5, 2.5),  # on the first lane again
    Flight(1, "tp", "sum", 0.5, 0.5, 0.5, 0.75),
]


def test_blocked_time_by_group() -> None:
    assert [round(f.blocked, 9) for f in FLIGHTS] == [0.4, 0.1, 0.0, 0.25]
    assert exposure(FLIGHTS, 2, 5.0) == "dp 250.0 ms (5.0%), tp 125.0 ms (2.5%)"
    assert exposure([], 2, 5.0) == "nothing"


def test_spans_of_a_simulation() -> None:
    report = simulate(lower(one_f_one_b(2, 1)))
    assert simulated(report, 0.5) == [
        Span(0, "F0.0", 0, 0, 0.5), Span(0, "B0.0", 2, 2, 3), Span(1, "F1.0", 0.5, 0.5, 1), Span(1, "B1.0", 1, 1, 2),
    ]  # fmt: skip


def test_events_of_a_trace() -> None:
    spans = [Span(0, "F0.0", 0.0, 0.5, 1.0), Span(1, "B1.10", 1.0, 1.0, 2.0), Span(1, "waits", 2.0, 3.0, 3.0)]
    text = chrome_trace({"model": spans, "run": spans[:1]}, {"model": FLIGHTS})
    events = json.loads(text)["traceEvents"]
    names = [(e["pid"], e.get("tid"), e["args"]["name"]) for e in events if e["ph"] == "M"]
    assert names == [
        (0, None, "model"), (0, 0, "pipeline rank 0"), (0, 1, "pipeline rank 1"), (0, 2, "rank 0 dp"),
        (0, 3, "rank 0 dp (2)"), (0, 4, "rank 1 tp"), (1, None, "run"), (1, 0, "pipeline rank 0"),
    ]  # fmt: skip
    bars = [(e["pid"], e["tid"], e["name"], e["cat"], e["ts"] / 1e6, e["dur"] / 1e6) for e in events if e["ph"] == "X"]
    waits = 0, 0, "waits", "waits", 0.0, 0.5
    assert bars[:4] == [(0, 0, "F0.0", "F", 0.0, 1.0), waits, (0, 1, "B1.10", "B", 1.0, 1.0),
                        (0, 1, "waits", "waits", 2.0, 1.0)]  # fmt: skip
    assert bars[4:-2] == [
        (0, 4, "sum", "communication", 0.5, 0.25), (0, 4, "blocked", "blocked", 0.5, 0.25),
        (0, 2, "reduce", "communication", 1.0, 0.8), (0, 2, "blocked", "blocked", 1.0, 0.1),
        (0, 2, "blocked", "blocked", 1.5, 0.3), (0, 3, "reduce", "communication", 1.2, 0.8),
        (0, 3, "blocked", "blocked", 1.9, 0.1), (0, 2, "gather", "communication", 1.8, 0.7),
    ]  # fmt: skip
    assert bars[-2:] == [(1, *bars[0][1:]), (1, *waits[1:])]
