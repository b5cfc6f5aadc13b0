"""A traced step: the schedule's own actions, by a real clock, in a file that the drawing tool reads back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megallama.analysis.communication import collectives
from megallama.comm.flight_record import FlightRecord
from megallama.comm.group import Groups, Handle, Place, Solo
from megallama.comm.stream_record import event_now
from megallama.plan.plan import Plan, make_plan
from megallama.plan.timeline import Flight, Span, chrome_trace, exposure
from megallama.train.trace import StepTracer, Tape, Timed, seconds_after
from tests.pool import Pool
from tests.small import small_config

RUN = "tests.train.runs:run"


def test_a_trace_is_the_schedule(pool: Pool, tmp_path: Path) -> None:
    parallel = {"pp": 2, "chunks": 2, "schedule": "zb-v"}
    sections: dict[str, Any] = {"parallel": parallel, "train": {"steps": 4}, "log": {"trace_steps": (2, 3)}}
    pool.run(4, RUN, str(tmp_path), sections)
    names = [f"step-0000000{step}-dp{dp}-tp0.json" for step in (2, 3) for dp in (0, 1)]
    assert sorted(p.name for p in (tmp_path / "trace").iterdir()) == names
    assert f"trace of step 3: {tmp_path / 'trace' / names[2]}" in (tmp_path / "run.log").read_text()
    schedule = make_plan(small_config(parallel=parallel), 4).schedule
    events = json.loads((tmp_path / "trace" / names[3]).read_text())["traceEvents"]
    lanes = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert list(lanes) == list(range(len(lanes))) and {"rank 0 pp", "rank 1 dp", "rank 1 world"} <= {*lanes.values()}
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["step 3, zb-v"]
    check_communication(events, lanes, make_plan(small_config(parallel=parallel), 4))
    done: dict[str, float] = {}
    for rank in (0, 1):
        spans = [e for e in events if e["ph"] == "X" and e["tid"] == rank and e["name"] != "waits"]
        *actions, sends = spans
        assert [e["name"] for e in actions] == [str(a) for a in schedule.steps[rank]]
        assert sends["name"] == "waits for sends" and sends["dur"] >= 0
        assert all(e["dur"] > 0 for e in actions) and actions[0]["ts"] >= 0
        for one, two in zip(spans, spans[1:], strict=False):
            assert one["ts"] + one["dur"] <= two["ts"] + 0.002  # rounded to nanoseconds
        done |= {e["name"]: e["ts"] + e["dur"] for e in actions}
        own = [lane for lane, name in lanes.items() if name.startswith(f"rank {rank} pp")]
        messages = [e["ts"] for e in events if e.get("cat") == "communication" and e["tid"] in own]
        assert messages and 0 <= min(messages) and max(messages) < sends["ts"] + sends["dur"]  # on the actions' clock
    for value, reader in (("F0.3", "F1.3"), ("F2.1", "F3.1"), ("I3.2", "I2.2"), ("I1.0", "I0.0")):
        assert done[value] < done[reader] + 1000  # one clock, to a millisecond: a value is made before it is read
    waits = [e for e in events if e["name"] == "waits"]
    assert waits and all(e["dur"] > 0 for e in waits)
    assert all(
        any(e["ts"] == w["ts"] and e["dur"] >= w["dur"] for e in events if e is not w and "ts" in e) for w in waits
    )
    assert done["F0.0"] < done["F1.0"]


def check_communication(events: list[dict[str, Any]], lanes: dict[int, str], plan: Plan) -> None:
    """The lanes hold what the plan says of a step, and the log's sums are theirs."""
    for rank in (0, 1):
        seen = Counter[tuple[str, ...]]()
        for e in (e for e in events if e.get("cat") == "communication" and lanes[e["tid"]].startswith(f"rank {rank} ")):
            op, size, _ = e["name"].split()
            seen[lanes[e["tid"]].split()[2], op, size] += 1
        want = Counter[tuple[str, ...]]()
        for c in collectives(plan.config, plan.topology, plan.stages, plan.schedule, rank):
            want[c.axis, c.op, f"{c.nbytes / c.count / 2**20:.3g}"] += c.count
        gathers = {key: n for key, n in want.items() if key[:2] == ("dp", "all_gather")}
        want.update(gathers)  # also those that the step before began
        assert seen == want
    for lane in lanes:
        flights = [e for e in events if e.get("tid") == lane and e.get("cat") == "communication"]
        for one, two in zip(flights, flights[1:], strict=False):
            assert one["ts"] + one["dur"] <= two["ts"] + 0.002
        for inner in (e for e in events if e.get("tid") == lane and e.get("cat") == "blocked"):
            assert any(
                e["ts"] <= inner["ts"] + 0.002 and inner["ts"] + inner["dur"] <= e["ts"] + e["dur"] + 0.002
                for e in flights
            )


def test_exposed_time_is_what_was_blocked() -> None:
    flights = [
        Flight(0, "tp", "all_gather 1 MiB", 0.000, 0.001, 0.005, 0.007),  # blocked 3 ms of 7
        Flight(1, "tp", "all_gather 1 MiB", 0.000, 0.001, 0.001, 0.002),  # not overlapped: all of it
        Flight(0, "dp", "reduce_scatter 4 MiB", 0.002, 0.002, 0.010, 0.010),  # all of it hidden
    ]
    assert [round(f.blocked, 9) for f in flights] == [0.003, 0.002, 0.0]
    assert exposure(flights, 2, 0.010) == "tp 2.5 ms (25.0%), dp 0.0 ms (0.0%)"
    assert exposure([], 1, 1.0) == "nothing"


def test_flights_that_overlap_get_lanes_of_their_own() -> None:
    times = {"a": (0.0, 4.0), "b": (1.0, 2.0), "c": (2.0, 3.0), "d": (4.0, 5.0)}
    flights = [Flight(0, "dp", name, start, start, end, end) for name, (start, end) in times.items()]
    spans = [Span(0, "F0.0", 0.0, 0.0, 1.0)]
    events = json.loads(chrome_trace({"x": spans, "y": spans}, {"x": flights}))["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name" and e["pid"] == 0}
    assert names == {0: "pipeline rank 0", 1: "rank 0 dp", 2: "rank 0 dp (2)"}
    at = {e["name"]: e["tid"] for e in events if e.get("cat") == "communication"}
    assert at == {"a": 1, "b": 2, "c": 2, "d": 1}


class Slow:
    """A handle that says when it was waited for."""

    def __init__(self, clock: Iterator[int]) -> None:
        self._clock = clock

    def wait(self) -> None:
        for _ in range(10):
            next(self._clock)

    def done(self) -> bool:
        return True


class OneGroup(Solo):
    """A group of one rank whose gathers take ten ticks of a clock."""

    def __init__(self, clock: Iterator[int]) -> None:
        super().__init__("dp")
        self._clock = clock

    def all_gather(self, output: torch.Tensor, shard: torch.Tensor) -> Handle:
        next(self._clock)
        return Slow(self._clock)


def test_what_a_timed_group_writes() -> None:
    ticks = count()
    tape = Tape()
    group, x = Timed(OneGroup(ticks), tape), torch.zeros(2)
    early = group.all_gather(x, x)
    assert tape.calls == []
    tape.clock = lambda: next(ticks)
    first = next(ticks)
    handle = group.all_gather(x, x)
    handle.wait()
    handle.wait()  # only the first counts
    early.wait()
    assert group.all_gather(x, x).done()
    late = group.all_gather(x, x)
    tape.clock = None
    late.wait()
    ours, before, polled, open_ = tape.calls
    assert (ours.started - ours.issued, ours.waited - ours.started, ours.end - ours.waited) == (2, 1, 11)
    assert ours.issued == first + 1 and (ours.axis, ours.op, ours.nbytes) == ("dp", "all_gather", 8)
    assert before.issued is None and before.end - before.waited == 11  # waited for here, begun before
    assert polled.end - polled.waited == 1  # had finished on its own
    assert open_.end is None and open_.started is not None


class Event:
    """A stand-in for torch.cuda.Event: the device is a second behind, and reaches events only when awaited."""

    device = 100.0
    awaited = False

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: str) -> None:
        assert stream == "stream of cuda:0"
        Event.device += 1.0
        self.at = Event.device

    def elapsed_time(self, later: Event) -> float:
        assert Event.awaited, "read before the device has got there"
        return 1e3 * (later.at - self.at)


def test_a_gpus_clock_waits_once_and_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: setattr(Event, "awaited", True))
    device = torch.device("cuda:0")
    zero, one, two = (event_now(device) for _ in range(3))
    assert not Event.awaited
    at = seconds_after(zero, device)
    assert (at(one), at(two)) == (1.0, 2.0)


class TwoOnOnePipeline(Solo):
    """Rank 0 of a pipeline of two; the other heard of the first barrier 4 s after it, of all others at once."""

    def gather_values(self, value: Any, summary: Any = list) -> Any:
        _, begin, stop, timings, flights = value
        own = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
        other = [0.0, *(at - 4.0 for at in own[1:])]

        def late(times: list[float]) -> list[float]:
            return [at - 4.0 for at in times]

        flights = [(axis, name, *late(times)) for axis, name, *times in flights]
        return [[own, begin, stop, timings, value[4]], [other, begin - 4.0, stop - 3.0, [*map(late, timings)], flights]]


def test_ranks_are_put_on_rank_0s_clock(tmp_path: Path) -> None:
    """Actions and a message at the same time on both ranks, 3 s after the step begins at 10 s."""
    solo = Solo()
    groups = Groups(solo, solo, Place(0, 1), solo, TwoOnOnePipeline(), solo, solo, solo, 0, {"dp": 0, "tp": 0})
    config = small_config(run={"folder": str(tmp_path)}, log={"trace_steps": (1, 1)})
    said: list[str] = []
    log: Any = SimpleNamespace(info=said.append)
    tracer = StepTracer(config, groups, torch.device("cpu"), log, FlightRecord())
    plan = make_plan(small_config(parallel={"pp": 2}), 2)
    actions = [[13.0, 13.0, 15.0]] * (len(plan.schedule.steps[0]) + 1)
    flights = [("pp", "send 1 MiB", 13.0, 13.5, 14.0, 14.5)]
    tracer._pending.append((1, plan.schedule, [[], 10.0, 20.0, actions, flights]))
    tracer.write()
    events = json.loads((tmp_path / "trace" / "step-00000001-dp0-tp0.json").read_text())["traceEvents"]
    done = [(e["tid"], e["ts"]) for e in events if e["ph"] == "X" and e["tid"] in (0, 1) and e["name"] != "waits"]
    assert {*done} == {(0, 3e6), (1, 3e6)} and len(done) == 2 * len(actions)
    assert {e["ts"] for e in events if e.get("cat") == "communication"} == {3e6}
    assert said[1] == "step 1: 11000.0 ms, blocked in communication: pp 1000.0 ms (9.1%)", "the longer of both counts"


def test_a_folder_that_cannot_be_written_stops_nothing(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "trace").write_text("a file where the folder should be")
    (answer,) = pool.run(1, RUN, str(tmp_path), {"train": {"steps": 2}, "log": {"trace_steps": (1, 1)}})
    assert answer == {"status": 0, "step": 2, "updates": 2}
    assert "warning: no trace of step 1: " in (tmp_path / "run.log").read_text()
