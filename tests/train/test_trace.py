"""A traced step: the schedule's own actions, by a real clock, in a file that the drawing tool reads back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megallama.plan.plan import make_plan
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
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["step 3, zb-v"]
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
    for value, reader in (("F0.3", "F1.3"), ("F2.1", "F3.1"), ("I3.2", "I2.2"), ("I1.0", "I0.0")):
        assert done[value] < done[reader] + 1000  # one clock, to a millisecond: a value is made before it is read
    waits = [e for e in events if e["name"] == "waits"]
    assert waits and all(e["dur"] > 0 for e in waits)
    first = {e["name"]: e["ts"] for e in events if "ts" in e}
    assert all(
        any(e["ts"] == w["ts"] and e["dur"] >= w["dur"] for e in events if e is not w and "ts" in e) for w in waits
    )
    assert first["F0.0"] < first["F1.0"]


def test_a_folder_that_cannot_be_written_stops_nothing(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "trace").write_text("a file where the folder should be")
    (answer,) = pool.run(1, RUN, str(tmp_path), {"train": {"steps": 2}, "log": {"trace_steps": (1, 1)}})
    assert answer == {"status": 0, "step": 2, "updates": 2}
    assert "warning: no trace of step 1: " in (tmp_path / "run.log").read_text()
