"""Schedules: closed forms, proofs for random sizes, the checker's own teeth, text form."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.config.schema import ParallelConfig
from megallama.plan.builders import (
    FIXED_CHUNKS,
    build_forward,
    build_schedule,
    compute_schedule,
    dualpipe_v,
    gpipe,
    one_f_one_b,
    zb_v,
    zero_bubble,
)
from megallama.plan.schedule import Action, Kind, Schedule, ScheduleError, check, looped, lower
from megallama.plan.timeline import StageCost, draw, simulate
from tests.plan.text import parse, text

F, B, I, W = Kind.F, Kind.B, Kind.I, Kind.W  # noqa: E741
CASES = [(p, m) for p in (1, 2, 3, 4, 8) for m in (1, 2, 3, 4, 8, 16)]


def proved(schedule: Schedule, max_in_flight: int | None = None) -> Schedule:
    """The lowered schedule, checked."""
    out = lower(schedule)
    check(out, max_in_flight)
    return out


@pytest.mark.parametrize("p,m", CASES)
def test_1f1b_closed_form(p: int, m: int) -> None:
    r = simulate(proved(one_f_one_b(p, m), max_in_flight=min(p, m)))
    assert r.makespan == 3 * (m + p - 1)
    assert r.peak_in_flight == tuple(min(p - k, m) for k in range(p))
    assert r.makespan / max(r.busy) - 1 == pytest.approx((p - 1) / m)
    assert r.bubble == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize("p,m", CASES)
def test_gpipe_closed_form(p: int, m: int) -> None:
    r = simulate(proved(gpipe(p, m), max_in_flight=m))
    assert r.makespan == 3 * (m + p - 1)
    assert r.peak_in_flight == (m,) * p


@pytest.mark.parametrize("p,m", [(p, m) for p in (2, 4, 8) for m in (8, 16)])
@pytest.mark.parametrize("v", [2, 4])
def test_interleaved_closed_form(p: int, m: int, v: int) -> None:
    s = proved(one_f_one_b(p, m, v))
    r = simulate(s)
    assert r.makespan == 3 * m * v + 3 * (p - 1)
    assert r.makespan / max(r.busy) - 1 == pytest.approx((p - 1) / (v * m))
    assert r.peak_in_flight == tuple(min(2 * (p - k - 1) + (v - 1) * p + 1, m * v) for k in range(p))
    assert max(map(s.peak_received, range(p))) <= 4


@pytest.mark.parametrize("p,m", [(p, m) for p in (1, 2, 4, 8) for m in (8, 16, 32)])
def test_zero_bubble_closed_form(p: int, m: int) -> None:
    r = simulate(proved(zero_bubble(p, m, 1), max_in_flight=p))
    assert r.makespan == 3 * m + (p - 1)  # bubble (p-1)(F+I-W)
    assert r.peak_in_flight == (p,) * p


def test_unequal_stages_and_hops() -> None:
    s = proved(one_f_one_b(2, 4))
    slow = simulate(s, [StageCost(1, 1, 1), StageCost(2, 2, 2)])
    assert slow.makespan == 1 + 4 * 6 + 2 and slow.busy == (12.0, 24.0)  # the slow stage is never idle in between
    assert simulate(proved(one_f_one_b(2, 1)), hop=0.5).makespan == 6 + 2 * 0.5
    assert simulate(proved(gpipe(3, 1)), hop=0.25).makespan == 9 + 4 * 0.25


NAMES = ["gpipe", "1f1b", "zb-h1", "zb-h2", "zb-v", "v-half", "dualpipe-v"]
ORDERS = {  # of every schedule of up to 6 ranks and 13 micro-batches, lowered: a run that resumes repeats its order
    "gpipe": "cc98f67d8048efea",
    "1f1b": "946c3a956cebe229",
    "zb-h1": "0479d4502b2b00bc",
    "zb-h2": "402a06276adf40cd",
    "zb-v": "919be21975a317c5",
    "v-half": "ab953e4eb62bc301",
    "dualpipe-v": "37d877ae863ede2a",
}


@pytest.mark.parametrize("name", NAMES)
def test_orders_stay_as_they_were(name: str) -> None:
    digest = hashlib.sha256()
    for v in (FIXED_CHUNKS[name][0],) if name in FIXED_CHUNKS else (1, 2, 3):
        for p, m in product(range(1 + (v > 1), 7), range(1, 14)):
            with suppress(ScheduleError):  # a number of micro-batches that does not suit it
                schedule = lower(compute_schedule(ParallelConfig(pp=p, chunks=v, schedule=name), m))
                digest.update("\n".join(" ".join(map(str, row)) for row in schedule.steps).encode())
    assert digest.hexdigest()[:16] == ORDERS[name]


layouts = st.tuples(
    st.sampled_from(NAMES), st.integers(1, 6), st.integers(1, 4), st.integers(1, 13)
)


@given(layouts)
@settings(max_examples=120, deadline=None)
def test_any_layout(layout: tuple[str, int, int, int]) -> None:
    """Everything `build_schedule` returns is proved, reads back from its text and has the work of its size."""
    name, p, v, m = layout
    v = 1 if p == 1 or name in ("zb-h1", "zb-h2") else v
    if name.endswith("v") or name == "v-half":
        p, v, m = max(2, p), 2, m + 12 * (name == "dualpipe-v")
    if name == "1f1b" and v > 1:
        m *= p
    s = build_schedule(ParallelConfig(pp=p, chunks=v, schedule=name), m)
    assert parse(text(s)) == s
    flat = [a for steps in s.steps for a in steps]
    assert sum(a.kind is F for a in flat) == p * v * m
    assert sum(a.kind in (B, I) for a in flat) == p * v * m
    crossings = 2 * m * sum(a != b for a, b in zip(s.owners, s.owners[1:], strict=False))
    assert sum(a.kind in (Kind.SEND_F, Kind.SEND_B) for a in flat) == crossings
    for rank in range(p):
        compute = [a for a in s.steps[rank] if a.kind.is_compute]
        assert compute == list(compute_schedule(ParallelConfig(pp=p, chunks=v, schedule=name), m).steps[rank])


@given(st.integers(1, 6), st.integers(1, 13), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_forward_only(p: int, m: int, v: int) -> None:
    owners = looped(p, p * v)
    s = build_forward(gpipe(p, 1, v), m)
    assert s.owners == owners and not s.is_training
    assert [s.peak_in_flight(r) for r in range(p)] == [0] * p
    assert sum(a.kind is F for steps in s.steps for a in steps) == p * v * m


MUTATED = [one_f_one_b(3, 4), one_f_one_b(2, 4, 2), gpipe(3, 3), zero_bubble(3, 4, 1), zb_v(2, 3), dualpipe_v(2, 4)]


@given(st.sampled_from(MUTATED), st.data())
@settings(max_examples=100, deadline=None)
def test_every_mutation_is_found(compute: Schedule, data: st.DataObject) -> None:
    """Drop or double any action, or swap two transfers of a rank: never both accepted and wrong."""
    s = lower(compute)
    rank = data.draw(st.integers(0, s.num_ranks - 1))
    steps = list(s.steps[rank])
    i = data.draw(st.integers(0, len(steps) - 1))
    how = data.draw(st.sampled_from(["drop", "double", "elsewhere"]))
    if how == "drop":
        del steps[i]
    elif how == "double":
        steps.insert(i, steps[i])
    else:
        steps[i] = steps[i]._replace(microbatch=s.num_microbatches)
    with pytest.raises(ScheduleError):
        check(replace(s, steps=(*s.steps[:rank], tuple(steps), *s.steps[rank + 1 :])))


TINY = lower(one_f_one_b(2, 2))


def changed(rank: int, actions: str) -> Schedule:
    """TINY with the actions of one rank replaced."""
    lines = text(TINY).split("\n")
    lines[1 + rank] = actions
    return parse("\n".join(lines))


def test_tiny_as_text() -> None:
    assert text(TINY).split("\n") == [
        "1f1b ranks=2 stages=2 microbatches=2",
        "F0.0 send_F0.0 F0.1 send_F0.1 recv_B0.0 B0.0 recv_B0.1 B0.1",
        "recv_F1.0 recv_F1.1 F1.0 B1.0 send_B1.0 F1.1 B1.1 send_B1.1",
    ]


@pytest.mark.parametrize(
    "rank,actions,message",
    [
        (0, "F0.0 send_F0.0 F0.1 send_F0.1 recv_B0.1 B0.1 recv_B0.0 B0.0",
         "ranks 0 and 1 disagree on transfer 2: B1.1 against B1.0"),
        (0, "F0.0 send_F0.0 F0.1 send_F0.1 recv_B0.0 B0.0", "no backward for stage 0 micro-batch 1"),
        (0, "send_F0.0", "no forward for stage 0 micro-batch 0, stage 0 micro-batch 1"),
        (0, "B0.0", "rank 0, step 0, B0.0: before its F"),
        (0, "F0.0 F0.0", "rank 0, step 1, F0.0: runs twice"),
        (0, "F1.0", "rank 0, step 0, F1.0: stage of rank 1"),
        (0, "F0.7", "rank 0, step 0, F0.7: there is no such stage or micro-batch"),
        (0, "F0.0 F0.1 B0.0 I0.0 W0.0 B0.1", "both a whole and a split backward for stage 0 micro-batch 0"),
        (0, "F0.0 F0.1 B0.0 I0.1", "only one of I and W for stage 0 micro-batch 1"),
        (0, "F0.0 send_F0.0 F0.1 send_F0.1 B0.0 recv_B0.0 recv_B0.1 B0.1",
         "rank 0, step 4, B0.0: needs B1.0, not made or received yet"),
        (0, "F0.0 send_F0.0 F0.1 recv_B0.0 B0.0 recv_B0.1 B0.1", "rank 0 never sends F0.1"),
        (0, "F0.0 send_F0.0 send_F0.1 F0.1 recv_B0.0 B0.0 recv_B0.1 B0.1",
         "rank 0, step 2, send_F0.1: sent before it was made"),
        (0, "F0.0 send_F0.0 F0.1 send_F0.1 send_F0.1 recv_B0.0 B0.0 recv_B0.1 B0.1",
         "rank 0, step 4, send_F0.1: listed twice"),
        (0, "F0.0 send_F0.0 send_B0.0 F0.1 send_F0.1 recv_B0.0 B0.0 recv_B0.1 B0.1",
         "send_B0.0: there is no stage on the other side"),
        (1, "recv_F1.0 F1.0 send_F1.0 B1.0 recv_F1.1 send_B1.0 F1.1 B1.1 send_B1.1",
         "send_F1.0: there is no stage on the other side"),
        (1, "recv_F1.0 F1.0 B1.0 recv_F1.1 send_B1.0 F1.1 B1.1 send_B1.1 recv_F1.1",
         "rank 1, step 8, recv_F1.1: listed twice"),
    ],
)  # fmt: skip
def test_messages_of_the_checker(rank: int, actions: str, message: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        check(changed(rank, actions))
    assert str(caught.value) == message


def test_compute_that_waits_for_ever() -> None:
    wrong = Schedule("mine", 2, 2, 2, ((Action(F, 0, 0), Action(B, 0, 0)), (Action(B, 1, 0), Action(F, 1, 0))))
    with pytest.raises(ScheduleError) as caught:
        lower(wrong)
    assert str(caught.value) == (
        "the schedule mine deadlocks: rank 0 at B0.0, rank 1 at B1.0 wait for values nobody makes"
    )


def test_a_value_that_is_made_but_sent_too_late() -> None:
    """Rank 0 has F0.1, which rank 1 waits for, and sends it only after F3.0, for which it waits itself."""
    hangs = """mine ranks=3 stages=6 microbatches=2
        F0.0 send_F0.0 F0.1 recv_F3.0 F3.0 send_F0.1 send_F3.0 recv_F3.1 F3.1 send_F3.1
        recv_F1.0 recv_F1.1 F1.1 send_F1.1 F1.0 send_F1.0 recv_F4.0 F4.0 send_F4.0 recv_F4.1 F4.1 send_F4.1
        recv_F2.1 recv_F2.0 F2.0 send_F2.0 F2.1 send_F2.1 recv_F5.0 F5.0 recv_F5.1 F5.1"""
    with pytest.raises(ScheduleError) as caught:
        check(parse(hangs))
    assert str(caught.value) == "the schedule mine deadlocks: rank 0 at F3.0, rank 1 at F1.1, rank 2 at F2.0"


def test_ranks_that_wait_for_one_another() -> None:
    """Every pair agrees, every rank is in order by itself, and yet the job hangs: rank 1 wants micro-batch 1 first."""
    hangs = """mine ranks=3 stages=6 microbatches=2
        F0.0 send_F0.0 recv_F3.0 F3.0 send_F3.0 F0.1 send_F0.1 recv_F3.1 F3.1 send_F3.1
        recv_F1.0 recv_F4.0 recv_F1.1 recv_F4.1 F1.1 send_F1.1 F1.0 send_F1.0 F4.0 send_F4.0 F4.1 send_F4.1
        recv_F2.1 recv_F2.0 recv_F5.0 recv_F5.1 F2.0 send_F2.0 F2.1 send_F2.1 F5.0 F5.1"""
    with pytest.raises(ScheduleError) as caught:
        check(parse(hangs))
    assert str(caught.value) == "the schedule mine deadlocks: rank 0 at F3.0, rank 1 at F1.1, rank 2 at F2.0"
    right = hangs.replace("F3.0 send_F3.0 F0.1 send_F0.1", "F0.1 send_F0.1 F3.0 send_F3.0")
    check(parse(right.replace("recv_F4.0 recv_F1.1", "recv_F1.1 recv_F4.0")))


def test_in_flight_bound() -> None:
    with pytest.raises(ScheduleError) as caught:
        check(lower(gpipe(2, 4)), max_in_flight=2)
    assert str(caught.value) == "rank 0 holds 4 micro-batches at once, more than 2"
    with pytest.raises(ScheduleError) as caught:
        check(lower(gpipe(2, 4)), max_received=1)
    assert str(caught.value) == "rank 1 holds 2 received tensors at once, more than 1"


def test_messages_of_builders() -> None:
    with pytest.raises(ScheduleError) as caught:
        build_schedule(ParallelConfig(pp=4, chunks=2), 6)
    assert str(caught.value) == (
        "interleaved 1F1B (chunks=2) needs a number of micro-batches that is a multiple of pp=4, not 6; "
        "use 4 or 8 micro-batches, or chunks=1"
    )
    with pytest.raises(ScheduleError, match="not 3; use 4 micro-batches, or chunks=1"):
        build_schedule(ParallelConfig(pp=4, chunks=2), 3)
    with pytest.raises(ScheduleError, match="zb-h1 has one chunk per rank, not chunks=2; use chunks=1 or 1f1b"):
        build_schedule(ParallelConfig(pp=4, chunks=2, schedule="zb-h1"), 8)


def test_one_rank_needs_no_transfers() -> None:
    s = build_schedule(ParallelConfig(), 3)
    assert text(s).split("\n")[1] == "F0.0 B0.0 F0.1 B0.1 F0.2 B0.2"
    assert text(build_schedule(ParallelConfig(schedule="zb-h1"), 2)).split("\n")[1] == "F0.0 I0.0 W0.0 F0.1 I0.1 W0.1"


def test_chart() -> None:
    assert draw(simulate(lower(zero_bubble(2, 2, 1)))).split("\n") == [
        "rank  0 |0011..AAaaBBbb|",
        "rank  1 |..00AA11BBaabb|",
    ]
    assert {len(line) for line in draw(simulate(lower(one_f_one_b(4, 64))), 80).split("\n")} == {90}
