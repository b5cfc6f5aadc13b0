"""tools/dryrun.py: what it prints, and what it says to a user who errs."""

from __future__ import annotations

import re

import pytest

from megallama.analysis import dryrun as library
from megallama.cli import command
from megallama.plan.plan import Plan

LAYOUT = ["parallel.tp=2", "parallel.pp=2", "model.preset=debug", "batch.global_batch_size=16"]


def test_it_reports_what_was_proved(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("dryrun")(["ranks=8", *LAYOUT]) == 0
    out = capsys.readouterr().out
    assert "tp=2 x pp=2 x dp=2 = 8 ranks: 3 distinct" in out  # norms of the last stage: shards differ
    assert "executed  loading, step 1, step 2, evaluation, skipped step 3" in out
    assert "no rank waits for ever, even if every collective held its rank" in out
    # 2 micro-batches on 2 x 2 pipelines: of each an activation forth and a gradient back, 128 x 64 bf16
    assert re.search(r"^ +pp +send +16 calls +0\.000262 GB$", out, re.M), out
    assert re.search(r"^ +pp +recv +16 calls +0\.000262 GB$", out, re.M), out
    assert re.search(r"^ +world +all_reduce +8 calls +0\.000001 GB$", out, re.M), out
    assert re.search(r"^took +\d+\.\d s, \d+\.\d\d GiB at most$", out, re.M)


def test_a_job_that_can_hang_has_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One kind of rank forgets a call: the first place where the ranks differ is printed."""
    real = library.record

    def record(plan: Plan, rank: int) -> library.Program:
        program = real(plan, rank)
        calls = [c for c in program.calls if not (rank and c.group == "world" and c.label == "step 2")]
        return library.Program(tuple(calls), ()) if rank else program

    monkeypatch.setattr(library, "record", record)
    assert command("dryrun")(["ranks=8", *LAYOUT]) == 1
    err = capsys.readouterr().err
    assert err.startswith("this job can hang: group world of ranks 0, 1, 2, 3, 4, 5, 6, 7, call 1: "), err
    assert "rank 0 says all_reduce (10,) float64 in step 2, rank 4 says all_reduce (10,) float64 in evaluation" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a dry run needs one number of ranks; write for example ranks=8"),
        (["ranks=many"], "a dry run needs one number of ranks, not ranks=many; write for example ranks=8"),
        (["ranks=2", "ranks=4"], "a dry run needs one number of ranks, not ranks=2 ranks=4"),
        (["a.toml", "b.toml", "ranks=2"], "two configuration files, a.toml and b.toml; give one"),
        (["ranks=3", "parallel.tp=2"], "ranks=3 cannot be cut into parallel.tp=2 x parallel.pp=1 = 2"),
        (["ranks=2", "parallel.pq=2"], "unknown setting 'parallel.pq'"),
        (["ranks=2", "batch.global_batch_size=3"], "batch.global_batch_size=3 is not a multiple of"),
    ],
)
def test_errors_of_a_user_have_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("dryrun")(arguments) == 2
    assert message in capsys.readouterr().err
