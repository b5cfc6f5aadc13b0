"""The schedules, and which of them a configuration chooses.

Builders take `p`, the number of pipeline ranks, and `m`, that of micro-batches.

ZB-V and V-Half are one generator, `_fill`, by a *pattern*: how many units a micro-batch takes from a rank to the next
on the way down and up, and how long it rests at the three turns; that fixes the order of F and I; W fills what is left.

Papers: GPipe, Huang et al. 2019 (arXiv:1811.06965); 1F1B and interleaving, Narayanan et al. 2021 (arXiv:2104.04473);
zero bubble (split backward) and ZB-V, Qi et al. 2023 (arXiv:2401.10241); patterns and V-Half, Qi et al. 2024
(arXiv:2405.15362); DualPipeV, half of DualPipe, DeepSeek-AI 2024 (arXiv:2412.19437).
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path

from megallama.config.schema import ParallelConfig
from megallama.plan.schedule import Action, B, F, I, Kind, Schedule, ScheduleError, W, check, lower
from megallama.plan.schedule_csv import read_csv

UNITS = 6  # work of a rank for one micro-batch in a V: F, I and W on two stages


def gpipe(p: int, m: int, chunks: int = 1) -> Schedule:
    """All forwards, then all backwards: the simplest schedule, the most memory."""
    return _alternating("gpipe", p, m, chunks, lambda behind: m * chunks)


def one_f_one_b(p: int, m: int, chunks: int = 1) -> Schedule:
    """1F1B; with `chunks` > 1, interleaved 1F1B. Bubble over ideal time: (P-1) / (chunks * M).

    Raises: ScheduleError if chunks > 1 and M is not a multiple of P.
    """
    if chunks > 1 and m % p:
        below = m // p * p
        near = " or ".join(str(n) for n in (below, below + p) if n)
        need = f"needs a number of micro-batches that is a multiple of pp={p}, not {m}"
        raise ScheduleError(f"interleaved 1F1B (chunks={chunks}) {need}; use {near} micro-batches, or chunks=1")
    pace = 1 if chunks == 1 else 2
    return _alternating("1f1b", p, m, chunks, lambda behind: pace * behind + (chunks - 1) * p)


def zero_bubble(p: int, m: int, depth: int) -> Schedule:
    """ZB-H1, or ZB-H2 with depth 2: rank r delays r * depth weight gradients."""
    whole = _alternating(f"zb-h{depth}", p, m, 1, lambda behind: depth * behind)
    split = (_split(steps, depth * rank) for rank, steps in enumerate(whole.steps))
    return replace(whole, steps=tuple(map(tuple, split)))


def _split(steps: Sequence[Action], delay: int) -> Iterator[Action]:
    """The same with every backward in two halves, the second after `delay` more."""
    owed: deque[Action] = deque()
    for a in steps:
        yield a if a.kind is F else a._replace(kind=I)
        if a.kind is B:
            owed.append(a._replace(kind=W))
            if len(owed) > delay:
                yield owed.popleft()
    yield from owed


def _alternating(name: str, p: int, m: int, chunks: int, warmup: Callable[[int], int]) -> Schedule:
    """`warmup(ranks behind)` forwards, then a forward, a backward in turn, then the rest."""
    groups = [range(first, min(first + p, m)) for first in range(0, m, p)]  # they pass chunk by chunk
    passes = [(chunk, microbatch) for group in groups for chunk in range(chunks) for microbatch in group]
    steps = []
    for rank in range(p):
        f = [Action(F, chunk * p + rank, microbatch) for chunk, microbatch in passes]
        b = [Action(B, (chunks - 1 - chunk) * p + rank, microbatch) for chunk, microbatch in passes]
        ahead = min(warmup(p - rank - 1), len(f))
        steady = [a for pair in zip(f[ahead:], b, strict=False) for a in pair]
        steps.append((*f[:ahead], *steady, *b[len(f) - ahead :]))
    return Schedule(name, p, p * chunks, m, tuple(steps))


def v_owners(p: int) -> tuple[int, ...]:
    """The rank of each stage of a V: rank r of P owns r and 2P-1-r; both ends are on 0."""
    return (*range(p), *reversed(range(p)))


def zb_v(p: int, m: int) -> Schedule:
    """ZB-V: no bubble but the fill of P-1 units, at the peak memory of 1F1B."""
    return _fill("zb-v", p, m, (4, 2), (1, 1, 1), 2 * p, compute=2)


def v_half(p: int, m: int) -> Schedule:
    """V-Half: half of 1F1B's bubble at half its peak memory."""
    turns = (1, 1, 1) if p % 2 else (4, 1, 4)
    return _fill("v-half", p, m, (1, 2), turns, 2 * ((p + 2) // 2), compute=1)


def dualpipe_v(p: int, m: int) -> Schedule:
    """DualPipeV: forwards and backwards in pairs. Raises: ScheduleError if m < 2 p."""
    if m < 2 * p:
        least = f"{2 * p} micro-batches"
        raise ScheduleError(f"dualpipe-v needs at least 2 x pp={least}, not {m}; use {least}, or zb-v")
    steps = []
    for rank in range(p):  # fill, turn, steady pairs, and their mirror image
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
        steps.append((*out, *owed))
    return Schedule("dualpipe-v", p, 2 * p, m, tuple(steps), v_owners(p))


def _fill(
    name: str, p: int, m: int, hops: tuple[int, int], turns: tuple[int, int, int], limit: int, compute: int
) -> Schedule:
    """F and I, `compute` times W's length, in the pattern's order; W where there is room."""
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
    timed.sort()
    queues = [deque(a for _, s, a in timed if schedule.owners[s] == rank) for rank in range(p)]
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


FIXED_CHUNKS: dict[str, tuple[int, Callable[[int, int], Schedule]]] = {
    "zb-h1": (1, partial(zero_bubble, depth=1)), "zb-h2": (1, partial(zero_bubble, depth=2)),
    "zb-v": (2, zb_v), "v-half": (2, v_half), "dualpipe-v": (2, dualpipe_v),
}  # fmt: skip
"""Schedules for one number of chunks per rank: that number, and the builder."""


def compute_schedule(parallel: ParallelConfig, num_microbatches: int) -> Schedule:
    """The compute of one training step under this layout, without transfers."""
    name, pp, chunks = parallel.schedule, parallel.pp, parallel.chunks
    if name == "csv":
        return read_csv(Path(parallel.schedule_file or ""), pp, pp * chunks, num_microbatches)
    if name in ("gpipe", "1f1b"):
        return (gpipe if name == "gpipe" else one_f_one_b)(pp, num_microbatches, chunks)
    fixed, build = FIXED_CHUNKS[name]
    if chunks != fixed:
        words = "one chunk" if fixed == 1 else "two chunks"
        raise ScheduleError(f"{name} has {words} per rank, not chunks={chunks}; use chunks={fixed} or 1f1b")
    return build(pp, num_microbatches)


def build_schedule(parallel: ParallelConfig, num_microbatches: int) -> Schedule:
    """The schedule of one training step, lowered and checked. Raises: ScheduleError."""
    schedule = lower(compute_schedule(parallel, num_microbatches))
    check(schedule, *bounds(parallel, num_microbatches))
    return schedule


def bounds(parallel: ParallelConfig, m: int) -> tuple[int, int]:
    """The most a rank holds: (stage, micro-batch) in flight, received tensors that wait."""
    p, v = parallel.pp, parallel.chunks
    in_flight = {
        "gpipe": m * v, "1f1b": p if v == 1 else 2 * (p - 1) + (v - 1) * p + 1, "zb-h1": p, "zb-h2": 2 * p - 1,
        "zb-v": 2 * p, "v-half": 2 * ((p + 2) // 2), "dualpipe-v": 2 * p + 1,
    }  # fmt: skip
    everything = p * v * m  # a user's own schedule promises nothing
    return in_flight.get(parallel.schedule, everything), everything if parallel.schedule == "csv" else max(4, p // 2)


def build_forward(training: Schedule, m: int) -> Schedule:
    """The schedule of an evaluation, lowered and checked, stages as in `training`."""
    owners, p = training.owners, training.num_ranks
    chunks = max(1, len(owners) // p)
    wave = sorted((s + chunks * i, s, i) for s in range(len(owners)) for i in range(m))
    steps = tuple(tuple(Action(F, s, i) for _, s, i in wave if owners[s] == rank) for rank in range(p))
    schedule = lower(Schedule("forward", p, len(owners), m, steps, owners))
    check(schedule)
    return schedule
