"""Pipeline schedules as data: one list of actions per pipeline rank.

A *stage* is a run of consecutive layers, numbered from the embedding to the loss.  The stages that a rank owns are its
*chunks*.  A micro-batch is *in flight* on a stage from its forward until its backward has finished.

Text form: kind, stage, micro-batch, e.g. ``F2.0``.  A transfer has its rank's stage: ``send_F2.0``, ``recv_F3.0``.
"""

import heapq
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import accumulate, zip_longest
from typing import NamedTuple

from megallama.config.errors import MegallamaError


class ScheduleError(MegallamaError):
    """A schedule that would compute the wrong thing, or hang."""


class Kind(StrEnum):
    """What an action does. I and W are the halves of B: gradient of input and of weights."""

    F = "F"
    B = "B"
    I = "I"  # noqa: E741
    W = "W"
    SEND_F = "send_F"
    RECV_F = "recv_F"
    SEND_B = "send_B"
    RECV_B = "recv_B"

    @property
    def is_compute(self) -> bool:
        return self in (F, B, I, W)


F, B, I, W = Kind.F, Kind.B, Kind.I, Kind.W  # noqa: E741
SENDS = {Kind.SEND_F: F, Kind.SEND_B: B}
RECVS = {Kind.RECV_F: F, Kind.RECV_B: B}


class Action(NamedTuple):
    """One thing one rank does, on one stage, for one micro-batch."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.microbatch}"


Values = Callable[[Action], Iterable[Action]]


@dataclass(frozen=True)
class Schedule:
    """The plan of one training step (or evaluation): `steps[rank]` is executed left to right."""

    name: str
    num_ranks: int
    num_stages: int
    num_microbatches: int
    steps: tuple[tuple[Action, ...], ...]
    owners: tuple[int, ...] = ()  # the rank of each stage; filled in where it is left out

    def __post_init__(self) -> None:
        if not self.owners:
            object.__setattr__(self, "owners", looped(self.num_ranks, self.num_stages))

    @property
    def is_training(self) -> bool:
        return any(a.kind in (B, I) for a in self.steps[0])

    def stages_of(self, rank: int) -> tuple[int, ...]:
        return tuple(stage for stage, owner in enumerate(self.owners) if owner == rank)

    def peak_in_flight(self, rank: int) -> int:
        """Most (stage, micro-batch) pairs of `rank` held for a backward at once."""
        changes = (1 if a.kind is F else -1 for a in self.steps[rank] if a.kind in (F, B, W))
        return max(accumulate(changes, initial=0)) if self.is_training else 0

    def peak_received(self, rank: int) -> int:
        """Most tensors of `rank` at once that are being received, or not yet used."""
        changes = (
            1 if a.kind in RECVS else -any(self.owners[v.stage] != rank for v in self.needs(a))
            for a in self.steps[rank]
            if a.kind not in SENDS
        )
        return max(accumulate(changes, initial=0))

    def produces(self, a: Action) -> Action | None:
        """What a compute action hands on: an F value (activation) or B value (gradient)."""
        return a if a.kind is F or a.kind is B else Action(B, a.stage, a.microbatch) if a.kind is I else None

    def consumer(self, value: Action) -> int | None:
        """The stage that needs a value, if any."""
        stage = value.stage + (1 if value.kind is F else -1)
        return stage if 0 <= stage < self.num_stages else None

    def needs(self, a: Action) -> tuple[Action, ...]:
        if a.kind is F:
            return (Action(F, a.stage - 1, a.microbatch),) if a.stage else ()
        if a.kind is W:
            return (Action(B, a.stage, a.microbatch),)
        own = Action(F, a.stage, a.microbatch)
        return (own,) if a.stage == self.num_stages - 1 else (own, Action(B, a.stage + 1, a.microbatch))


def looped(num_ranks: int, num_stages: int) -> tuple[int, ...]:
    """The rank of each stage, where the stages go round the ranks (Narayanan et al. 2021)."""
    return tuple(stage % num_ranks for stage in range(num_stages))


def parse_action(word: str, where: str = "") -> Action:
    """The inverse of ``str(action)``. Raises: ScheduleError naming word and place."""
    found = re.fullmatch(r"([A-Za-z_]+?)(\d+)\.(\d+)", word)
    if not found or found[1] not in Kind._value2member_map_:
        raise ScheduleError(f"{where}{word!r} is no action; write F, B, I or W with stage.micro-batch, e.g. F2.0")
    return Action(Kind(found[1]), int(found[2]), int(found[3]))


class Event(NamedTuple):
    """One compute action and when it runs."""

    start: float
    end: float
    rank: int
    action: Action


def walk(schedule: Schedule, cost: Callable[[Action], float], hop: float = 0.0) -> Iterator[Event]:
    """Run the compute against a clock; events as they end. A value takes `hop` to another rank.

    Raises: ScheduleError if ranks wait for one another forever.
    """
    left = [deque(a for a in steps if a.kind.is_compute) for steps in schedule.steps]
    free = [0.0] * schedule.num_ranks
    made: dict[Action, float] = {}
    waiting: dict[Action, list[int]] = {}
    running: list[tuple[float, int, float]] = []
    idle = list(range(schedule.num_ranks))
    while idle or running:
        for rank in [rank for rank in idle if left[rank]]:
            needs = schedule.needs(left[rank][0])
            if lacking := [value for value in needs if value not in made]:
                waiting.setdefault(lacking[0], []).append(rank)
                continue
            there = (made[value] + hop * (schedule.owners[value.stage] != rank) for value in needs)
            begin = max([free[rank], *there])
            heapq.heappush(running, (begin + cost(left[rank][0]), rank, begin))
        idle = []
        if running:
            end, rank, begin = heapq.heappop(running)
            a = left[rank].popleft()
            yield Event(begin, end, rank, a)
            free[rank], idle = end, [rank]
            if (value := schedule.produces(a)) is not None:
                made[value] = end
                idle += waiting.pop(value, [])
    if stuck := [f"rank {rank} at {row[0]}" for rank, row in enumerate(left) if row]:
        raise ScheduleError(f"the schedule {schedule.name} deadlocks: {', '.join(stuck)} wait for values nobody makes")


def stuck_at(schedule: Schedule, waits: Values, gives: Values) -> tuple[dict[int, Action], set[Action]]:
    """Without a clock: where ranks wait for what nobody gives, and all that was given."""
    values: set[Action] = set()
    left = {rank: deque(row) for rank, row in enumerate(schedule.steps)}
    moved = True
    while moved:
        moved = False
        for row in left.values():
            while row and values.issuperset(waits(row[0])):
                values.update(gives(row.popleft()))
                moved = True
    return {rank: row[0] for rank, row in left.items() if row}, values


def lower(schedule: Schedule) -> Schedule:
    """Insert sends and receives so that no pair of ranks can disagree about their order.

    Follows the clock (F = I = W = 1).  When a value is made its producer lists the send, its consumer the receive, so
    no transfer depends on a later one: posted without blocking none deadlocks. Raises: ScheduleError, as `walk`.
    """
    out: list[list[Action]] = [[] for _ in schedule.steps]
    for event in walk(schedule, lambda a: 2.0 if a.kind is B else 1.0):
        out[event.rank].append(event.action)
        value = schedule.produces(event.action)
        consumer = None if value is None else schedule.consumer(value)
        if value is None or consumer is None or schedule.owners[consumer] == event.rank:
            continue
        send, recv = (Kind.SEND_F, Kind.RECV_F) if value.kind is F else (Kind.SEND_B, Kind.RECV_B)
        out[event.rank].append(Action(send, value.stage, value.microbatch))
        out[schedule.owners[consumer]].append(Action(recv, consumer, value.microbatch))
    return replace(schedule, steps=tuple(map(tuple, out)))


def check(schedule: Schedule, max_in_flight: int | None = None, max_received: int | None = None) -> None:
    """Prove a lowered schedule, and that no rank holds more. Raises: ScheduleError."""
    _check_compute(schedule)
    _check_transfers(schedule)
    _check_progress(schedule)
    for rank in range(schedule.num_ranks):
        peak = schedule.peak_in_flight(rank)
        if max_in_flight is not None and peak > max_in_flight:
            raise ScheduleError(f"rank {rank} holds {peak} micro-batches at once, more than {max_in_flight}")
        if max_received is not None and (held := schedule.peak_received(rank)) > max_received:
            raise ScheduleError(f"rank {rank} holds {held} received tensors at once, more than {max_received}")


def _check_compute(schedule: Schedule) -> None:
    """Every stage runs every micro-batch once, forward before backward, on its rank."""
    want = {(s, m) for s in range(schedule.num_stages) for m in range(schedule.num_microbatches)}
    done: dict[Kind, set[tuple[int, int]]] = {k: set() for k in (F, B, I, W)}
    before = {B: F, I: F, W: I}
    for rank, steps in enumerate(schedule.steps):
        for i, a in enumerate(steps):
            if not a.kind.is_compute:
                continue
            key = (a.stage, a.microbatch)
            if key not in want:
                raise ScheduleError(f"rank {rank}, step {i}, {a}: there is no such stage or micro-batch")
            if schedule.owners[a.stage] != rank:
                raise ScheduleError(f"rank {rank}, step {i}, {a}: stage of rank {schedule.owners[a.stage]}")
            if key in done[a.kind]:
                raise ScheduleError(f"rank {rank}, step {i}, {a}: runs twice")
            if a.kind in before and key not in done[before[a.kind]]:
                raise ScheduleError(f"rank {rank}, step {i}, {a}: before its {before[a.kind]}")
            done[a.kind].add(key)
    if both := done[B] & done[I]:
        raise ScheduleError(f"both a whole and a split backward for {_list(both)}")
    if done[I] != done[W]:
        raise ScheduleError(f"only one of I and W for {_list(done[I] ^ done[W])}")
    backward = done[B] | done[I]
    for name, got in (("forward", done[F]), ("backward", backward)):
        if got != want and (name == "forward" or backward):
            raise ScheduleError(f"no {name} for {_list(want - got)}")


def _check_transfers(schedule: Schedule) -> None:
    """Values are sent once, after they were made, and received once, before they are used; all in their order.

    Both ranks of a pair list the same in the order of an NCCL communicator.
    """
    listed: dict[tuple[int, int], list[Action]] = {}  # rank, peer -> what the first transfers
    for rank, steps in enumerate(schedule.steps):
        made, sent, received = (set[Action]() for _ in range(3))
        for i, a in enumerate(steps):
            if a.kind.is_compute:
                for value in schedule.needs(a):
                    if value not in made and value not in received:
                        raise ScheduleError(f"rank {rank}, step {i}, {a}: needs {value}, not made or received yet")
                if (v := schedule.produces(a)) is not None:
                    made.add(v)
                continue
            sends, kind = a.kind in SENDS, SENDS.get(a.kind) or RECVS[a.kind]
            other = a.stage + (1 if (kind is F) == sends else -1)  # the stage on the other side
            if not 0 <= other < schedule.num_stages:
                raise ScheduleError(f"{a}: there is no stage on the other side")
            value = Action(kind, a.stage if sends else other, a.microbatch)
            listed.setdefault((rank, schedule.owners[other]), []).append(value)
            seen = sent if sends else received
            if value in seen:
                raise ScheduleError(f"rank {rank}, step {i}, {a}: listed twice")
            if sends and value not in made:
                raise ScheduleError(f"rank {rank}, step {i}, {a}: sent before it was made")
            seen.add(value)
        for v in sorted(made - sent):
            if (c := schedule.consumer(v)) is not None and schedule.owners[c] != rank:
                raise ScheduleError(f"rank {rank} never sends {v}")
    for (r, peer), own in listed.items():
        for i, (x, y) in enumerate(zip_longest(own, listed.get((peer, r), []))):
            if x != y:
                words = f"{x or 'none'} against {y or 'none'}"
                raise ScheduleError(f"ranks {r} and {peer} disagree on transfer {i}: {words}")


def _check_progress(schedule: Schedule) -> None:
    """All reach their end: after _check_transfers, a compute waits only for a send."""

    def waits(a: Action) -> list[Action]:
        values = schedule.needs(a) if a.kind.is_compute else ()
        return [v for v in values if schedule.owners[v.stage] != schedule.owners[a.stage]]

    def gives(a: Action) -> list[Action]:
        return [a._replace(kind=SENDS[a.kind])] if a.kind in SENDS else []

    if stuck := stuck_at(schedule, waits, gives)[0]:
        words = ", ".join(f"rank {rank} at {a}" for rank, a in stuck.items())
        raise ScheduleError(f"the schedule {schedule.name} deadlocks: {words}")


def _list(keys: set[tuple[int, int]]) -> str:
    return ", ".join(f"stage {s} micro-batch {m}" for s, m in sorted(keys)[:4])
