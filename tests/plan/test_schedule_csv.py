"""A user's own schedule: what it may look like, and every way to get it wrong."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.config.schema import ParallelConfig
from megallama.plan.builders import build_forward, build_schedule, gpipe
from megallama.plan.schedule import Schedule, ScheduleError, check, lower, parse_action
from megallama.plan.schedule_csv import read_csv
from megallama.plan.timeline import simulate
from tests.plan.text import text

GOOD = "F0.0,F0.1,B0.0,B0.1\nF1.0,B1.0,F1.1,B1.1\n"


def read(tmp_path: Path, content: str, ranks: int = 2, stages: int = 2, microbatches: int = 2) -> str:
    """What it says to this file, with the name of the file as FILE."""
    file = tmp_path / "my.csv"
    file.write_text(content)
    with pytest.raises(ScheduleError) as caught:
        read_csv(file, ranks, stages, microbatches)
    return str(caught.value).replace(str(file), "FILE")


def test_a_file_is_a_schedule(tmp_path: Path) -> None:
    file = tmp_path / "my.csv"
    file.write_text("# mine\nF0.0, F0.1,,B0.0,B0.1\n\nF1.0,I1.0,F1.1,I1.1,W1.1,W1.0,\n,,\n")
    s = build_schedule(ParallelConfig(pp=2, schedule="csv", schedule_file=str(file)), 2)
    assert (s.name, s.owners, s.num_stages) == ("my.csv", (0, 1), 2)
    assert text(s).split("\n")[1:] == [
        "F0.0 send_F0.0 F0.1 send_F0.1 recv_B0.0 B0.0 recv_B0.1 B0.1",
        "recv_F1.0 recv_F1.1 F1.0 I1.0 send_B1.0 F1.1 I1.1 send_B1.1 W1.1 W1.0",
    ]
    assert [s.peak_in_flight(r) for r in (0, 1)] == [2, 2]
    assert simulate(s).makespan == 7


def test_who_computes_a_stage_owns_it(tmp_path: Path) -> None:
    """Three stages on the second of two ranks, the first among them."""
    file = tmp_path / "my.csv"
    file.write_text("F1.0,B1.0\nF0.0,F2.0,F3.0,B3.0,B2.0,B0.0\n")
    s = read_csv(file, 2, 4, 1)
    assert s.owners == (1, 0, 1, 1) and s.stages_of(1) == (0, 2, 3)
    parallel = ParallelConfig(pp=2, chunks=2, schedule="csv", schedule_file=str(file))
    forward = build_forward(build_schedule(parallel, 1), 5)
    assert forward.owners == s.owners and forward.num_microbatches == 5
    check(forward)


CASES = [
    (GOOD + "F2.0,B2.0\n",
     "FILE has 3 lines of actions, but parallel.pp=2; write one line per pipeline rank"),
    ("F0.0,F0.1,X0.0,B0.1\nF1.0,B1.0,F1.1,B1.1",
     "FILE, line 1, cell 3: 'X0.0' is no action; write F, B, I or W with stage.micro-batch, e.g. F2.0"),
    ("# mine\n\nF0.0,F0.1,B0.0,B0.1\nF1.0;B1.0,F1.1,B1.1",
     "FILE, line 4, cell 1: 'F1.0;B1.0' is no action; write F, B, I or W with stage.micro-batch, e.g. F2.0"),
    ("F0.0,send_F0.0,F0.1,B0.0,B0.1\nF1.0,B1.0,F1.1,B1.1",
     "FILE, line 1, cell 2: 'send_F0.0' is a transfer; leave it out, the program inserts what F, B and I need"),
    ("F0.0,F0.1,B0.0,B0.1,B0.0\nF1.0,B1.0,F1.1,B1.1",
     "FILE, line 1, cell 5: B0.0 stands already at FILE, line 1, cell 3; write every action once"),
    ("F0.0,F0.1,B0.0,B0.1\nF1.0,B1.0,F0.1,B1.1",
     "FILE, line 2, cell 3: F0.1 stands already at FILE, line 1, cell 2; write every action once"),
    ("F0.0,F0.1,B0.0\nF1.0,B1.0,F1.1,B1.1,B0.1",
     "FILE, line 2, cell 5: B0.1 is of stage 0, which another rank computes at FILE, line 1, cell 1; "
     "write all actions of a stage on one line"),
    ("F0.0,F0.1,B0.0,B0.1\nF2.0,B2.0,F1.1,B1.1",
     "FILE, line 2, cell 1: there is no stage 2; parallel.pp x parallel.chunks = 2 stages, write 0 to 1, "
     "or another parallel.chunks"),
    ("F0.0,F0.1,B0.0,B0.1,F0.2\nF1.0,B1.0,F1.1,B1.1",
     "FILE, line 1, cell 5: there is no micro-batch 2; the batch gives each rank 2 of them, write 0 to 1, "
     "or change batch.global_batch_size"),
    ("F0.0,F0.1,B0.0,B0.1\nF1.0,B1.0",
     "FILE lacks F1.1; each of 2 stages needs a forward of each of 2 micro-batches, "
     "write F1.1 on the line of its stage"),
    ("F0.0,B0.0\n# nothing\n,",
     "FILE has 1 line of actions, but parallel.pp=2; write one line per pipeline rank"),
    ("F0.0,F0.1,B0.0,B0.1\nF1.0,B1.0,F1.1",
     "FILE lacks I1.1 and W1.1; write B1.1, or I1.1 and W1.1, behind F1.1 of FILE, line 2, cell 3"),
    ("F0.0,F0.1,B0.0,B0.1\nF1.0,B1.0,F1.1,I1.1",
     "FILE lacks W1.1; write W1.1 behind F1.1 of FILE, line 2, cell 3"),
    ("F0.0,F0.1,B0.0,B0.1,W0.1\nF1.0,B1.0,F1.1,B1.1",
     "FILE, line 1, cell 5: W0.1, but FILE, line 1, cell 4 has the whole backward; write B0.1, or I0.1 and W0.1"),
    ("F0.0,F0.1,B0.0,B0.1\nF1.0,B1.0,B1.1,F1.1",
     "FILE, line 2, cell 3: B1.1 needs F1.1, which stands behind it in FILE, line 2, cell 4; write F1.1 before B1.1"),
    ("F0.0,F0.1,W0.0,I0.0,B0.1\nF1.0,B1.0,F1.1,B1.1",
     "FILE, line 1, cell 3: W0.0 needs I0.0, which stands behind it in FILE, line 1, cell 4; write I0.0 before W0.0"),
    ("F0.0,B0.0,F0.1,B0.1\nF1.0,F1.1,B1.0,B1.1",
     "in my.csv the lines wait for one another forever; move one of these behind what it needs:\n"
     "  FILE, line 1, cell 2: B0.0 needs B1.0, which stands at FILE, line 2, cell 3\n"
     "  FILE, line 2, cell 2: F1.1 needs F0.1, which stands at FILE, line 1, cell 3"),
]  # fmt: skip


@pytest.mark.parametrize("content,message", CASES, ids=range(len(CASES)))
def test_messages(tmp_path: Path, content: str, message: str) -> None:
    assert read(tmp_path, content) == message


def test_a_stage_that_nobody_has(tmp_path: Path) -> None:
    assert read(tmp_path, "F0.0,B0.0\nF2.0,B2.0", stages=3, microbatches=1) == (
        "FILE lacks F1.0; each of 3 stages needs a forward of each of 1 micro-batch, write F1.0 on one of the lines"
    )


def test_too_few(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD, microbatches=3) == (
        "FILE has 2 micro-batches, but the batch gives each rank 3; write micro-batches 0 to 2, "
        "or change batch.global_batch_size"
    )
    assert read(tmp_path, GOOD, stages=4) == (
        "FILE has 2 stages, but parallel.pp x parallel.chunks = 4; write stages 0 to 3, or another parallel.chunks"
    )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError) as caught:
        read_csv(tmp_path / "none.csv", 2, 2, 2)
    where = f"cannot read parallel.schedule_file={tmp_path / 'none.csv'}"
    assert str(caught.value) == f"{where}: No such file or directory; give a CSV file"
    (tmp_path / "none.csv").write_bytes(b"\xff\xfe\x00F")
    with pytest.raises(ScheduleError) as caught:
        read_csv(tmp_path / "none.csv", 2, 2, 2)
    assert str(caught.value) == f"{where}: it is not UTF-8 text; give a CSV file"


def test_what_is_accepted_is_what_can_be_proved(tmp_path: Path) -> None:
    """All orders of two lines: refused exactly where the transfers cannot be put in, or the proof fails."""
    file, accepted = tmp_path / "my.csv", 0
    for lines in itertools.product(*(itertools.permutations(line.split(",")) for line in GOOD.split())):
        steps = tuple(tuple(map(parse_action, line)) for line in lines)
        file.write_text("\n".join(map(",".join, lines)))
        try:
            check(lower(Schedule("my.csv", 2, 2, 2, steps)))
        except ScheduleError:
            with pytest.raises(ScheduleError, match="needs"):
                read_csv(file, 2, 2, 2)
        else:
            accepted += read_csv(file, 2, 2, 2).steps == steps
    assert accepted == 26


CELLS = "F0.0 F0.1 F1.0 F1.1 B0.0 I0.1 W0.1 B1.0 B1.1 I1.1 x F9.9 send_F0.0 B-1.0 F0 \u00b9"
WORDS = st.sampled_from(["", *CELLS.split()])


@given(st.lists(st.lists(WORDS, max_size=9), max_size=3))
@settings(max_examples=100, deadline=None)
def test_any_cells_at_all_give_a_message(rows: list[list[str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "my.csv"
        file.write_text("\n".join(map(",".join, rows)), encoding="utf-8")
        try:
            check(lower(read_csv(file, 2, 2, 2)))
        except ScheduleError as error:
            assert "my.csv" in str(error) and ";" in str(error)


def test_any_schedule_can_be_written_down(tmp_path: Path) -> None:
    """The compute of a built-in schedule, as CSV, is that schedule."""
    file = tmp_path / "gpipe.csv"
    compute = gpipe(3, 4, 2)
    file.write_text("\n".join(",".join(map(str, steps)) for steps in compute.steps))
    written = read_csv(file, 3, 6, 4)
    assert (written.steps, written.owners) == (compute.steps, compute.owners)
