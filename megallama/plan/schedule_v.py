"""Schedules whose stages lie like a V: rank r of P owns stages r and 2P-1-r, so embedding and loss are on rank 0.

ZB-V and V-Half are one generator.  In the steady state every rank repeats the same six units of work per
micro-batch: F, I and W of its two stages.  A *pattern* says how many units a micro-batch takes from a rank to
the next on the way down and up, forward and backward, and how long it rests at the three turns; that fixes
the order of F and I on every rank, and how many micro-batches are in flight.  W fills the units in which the
next F or I cannot run, because its input is not there or because the memory is used up.

Which order comes out depends on what W is taken to cost while it is made.  W = F/2 for ZB-V and W = F for V-Half gave
the shortest steps over stages whose W costs 0.5 to 1 of F and whose transfers 0 to 0.2 of F, of all that were tried.

Papers: ZB-V, Qi et al. 2023 (arXiv:2401.10241); patterns and V-Half, Qi et al. 2024 (arXiv:2405.15362);
DualPipeV, half of DualPipe, DeepSeek-AI 2024 (arXiv:2412.19437).
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from itertools import accumulate

from megallama.plan.schedule import Action, F, I, Kind, Schedule, ScheduleError, W

UNITS = 6  # work of a rank for one micro-batch: F, I and W on two stages


def v_owners(num_ranks: int) -> tuple[int, ...]:
    """The rank of each stage."""
    return (*range(num_ranks), *reversed(range(num_ranks)))


def zb_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """ZB-V: no bubble but the fill of P-1 units (F = I = W = 1), at the peak memory of 1F1B, on every rank."""
    return _fill("zb-v", num_ranks, num_microbatches, (4, 2), (1, 1, 1), 2 * num_ranks, compute=2)


def v_half(num_ranks: int, num_microbatches: int) -> Schedule:
    """V-Half: half of 1F1B's bubble at half its peak memory, (P+2)//2 micro-batches on every rank."""
    turns = (1, 1, 1) if num_ranks % 2 else (4, 1, 4)
    limit = 2 * ((num_ranks + 2) // 2)
    return _fill("v-half", num_ranks, num_microbatches, (1, 2), turns, limit, compute=1)


def dualpipe_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipeV: forwards and whole backwards of the two stages in pairs, split backwards at the ends only.

    Peak memory 2P + 1 of (stage, micro-batch). Raises: ScheduleError if there are fewer than 2P micro-batches.
    """
    if num_microbatches < 2 * num_ranks:
        raise ScheduleError(
            f"dualpipe-v needs at least 2 x pp={2 * num_ranks} micro-batches, not {num_microbatches}; "
            f"use {2 * num_ranks} micro-batches, or zb-v"
        )
    steps = tuple(_dualpipe_rank(rank, num_ranks, num_microbatches) for rank in range(num_ranks))
    return Schedule("dualpipe-v", num_ranks, 2 * num_ranks, num_microbatches, steps, v_owners(num_ranks))


def _fill(
    name: str,
    p: int,
    m: int,
    hops: tuple[int, int],
    turns: tuple[int, int, int],
    limit: int,
    compute: int,
) -> Schedule:
    """Run F and I, of `compute` times W's length, in the pattern's order, and W where they leave room.

    hops: units from a rank to the next on the way down and up. Never more than `limit` are in flight.
    """
    schedule = Schedule(name, p, 2 * p, m, ((),) * p, v_owners(p))
    down, up = ([hop] * (p - 1) for hop in hops)
    bottom, top, back = turns
    # when micro-batch 0 is on stages 0 .. 2p-1, then on its way back
    times = list(accumulate([0, *down, bottom, *up, top, *down, back, *up]))
    timed = [
        (times[at] + UNITS * i, s, Action(kind, s, i))
        for s in range(2 * p)
        for kind, at in ((F, s), (I, -1 - s))
        for i in range(m)
    ]
    queues: list[deque[Action]] = [deque() for _ in range(p)]
    for _, s, a in sorted(timed):
        queues[schedule.rank_of(s)].append(a)
    owed: list[deque[Action]] = [deque() for _ in range(p)]
    out: list[list[Action]] = [[] for _ in range(p)]
    live, free, made, now = [0] * p, [0] * p, dict[Action, int](), 0
    while any(queues) or any(owed):
        for rank, queue in enumerate(queues):
            room = bool(queue) and (queue[0].kind is I or live[rank] < limit)
            if not (room and all(made.get(v, now + 1) <= now for v in schedule.needs(queue[0]))):
                queue = owed[rank]
            if free[rank] > now or not queue:
                continue
            a = queue.popleft()
            live[rank] += {F: 1, I: 0, W: -1}[a.kind]
            out[rank].append(a)
            free[rank] = now + (1 if a.kind is W else compute)
            if value := schedule.produces(a):
                made[value] = free[rank]
            if a.kind is I:
                owed[rank].append(a._replace(kind=W))
        now += 1
        assert now <= UNITS * compute * (m + 4 * p), f"{name} of {p} ranks and {m} micro-batches does not end"
    return replace(schedule, steps=tuple(map(tuple, out)))


def _dualpipe_rank(rank: int, p: int, m: int) -> tuple[Action, ...]:
    """The phases of one rank: fill, turn, steady pairs, and their mirror image.

    Of the last 2 (rank + 1) backwards the second half is split: its W wait until the end.
    """
    behind = p - 1 - rank
    ends = ["B1", "B0"] * (rank + 1)
    words = ["F0"] * (2 * behind) + ["F0", "F1"] * (rank + 1) + ["I1", "W", "F1"] * behind
    words += ["F0", "B1", "F1", "B0"] * (m - 2 * p + rank + 1) + ["B1", "F1", "B0"] * behind
    words += ends[: rank + 1] + [word.replace("B", "I") for word in ends[rank + 1 :]]
    words += ["W", "I0"] * behind
    stages, done = (rank, 2 * p - 1 - rank), dict.fromkeys(("F0", "F1", "B0", "B1"), 0)
    out: list[Action] = []
    owed: deque[Action] = deque()
    for word in words:
        if word == "W":
            out.append(owed.popleft())
            continue
        count = word.replace("I", "B")
        out.append(Action(Kind(word[0]), stages[int(word[1])], done[count]))
        done[count] += 1
        if word[0] == "I":
            owed.append(out[-1]._replace(kind=W))
    return (*out, *owed)
