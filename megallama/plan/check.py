"""Proofs about a lowered schedule, without running it: complete, ordered, in agreement, free of deadlock.

The transfers between two ranks form one sequence, both directions together, as on an NCCL communicator: each happens
once both ranks have posted it and the one before has happened.  A rank blocks only where it computes.
"""

from __future__ import annotations

from itertools import zip_longest

from megallama.plan.schedule import Action, B, F, I, Kind, Schedule, ScheduleError, W, stuck_at

SENDS = {Kind.SEND_F: F, Kind.SEND_B: B}
RECVS = {Kind.RECV_F: F, Kind.RECV_B: B}
Moves = list[list[tuple[Action, int] | None]]
"""For each action of each rank, None if it computes, else the value it moves and the rank on the other side."""


def check(schedule: Schedule, max_in_flight: int | None = None, max_received: int | None = None) -> None:
    """Prove a lowered schedule, and that no rank holds more than this. Raises: ScheduleError naming rank and action."""
    _check_compute(schedule)
    moves = [[None if a.kind.is_compute else _move(schedule, a) for a in steps] for steps in schedule.steps]
    _check_transfers(schedule, moves)
    _check_pairs(moves)
    _check_progress(schedule)
    for rank in range(schedule.num_ranks):
        peak = schedule.peak_in_flight(rank)
        if max_in_flight is not None and peak > max_in_flight:
            raise ScheduleError(f"rank {rank} holds {peak} micro-batches at once, more than {max_in_flight}")
        if max_received is not None and (held := schedule.peak_received(rank)) > max_received:
            raise ScheduleError(f"rank {rank} holds {held} received tensors at once, more than {max_received}")


def _check_compute(schedule: Schedule) -> None:
    """Every stage runs every micro-batch once, forward before backward, on the rank that owns it."""
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


def _check_transfers(schedule: Schedule, moves: Moves) -> None:
    """Every value another rank needs is sent once, after it was made, and received once, before it is used."""
    for rank, steps in enumerate(schedule.steps):
        made: set[Action] = set()
        sent: set[Action] = set()
        received: set[Action] = set()
        for i, a in enumerate(steps):
            move = moves[rank][i]
            if move is None:
                for value in schedule.needs(a):
                    if value not in made and value not in received:
                        raise ScheduleError(f"rank {rank}, step {i}, {a}: needs {value}, not made or received yet")
                if (v := schedule.produces(a)) is not None:
                    made.add(v)
                continue
            value, _ = move
            seen = sent if a.kind in SENDS else received
            if value in seen:
                raise ScheduleError(f"rank {rank}, step {i}, {a}: listed twice")
            if a.kind in SENDS and value not in made:
                raise ScheduleError(f"rank {rank}, step {i}, {a}: sent before it was made")
            seen.add(value)
        for v in sorted(made - sent):
            if (c := schedule.consumer(v)) is not None and schedule.owners[c] != rank:
                raise ScheduleError(f"rank {rank} never sends {v}")


def _check_pairs(moves: Moves) -> None:
    """Both ranks of every pair list the same transfers in the same order."""
    listed: dict[tuple[int, int], list[Action]] = {}
    for rank, row in enumerate(moves):
        for value, peer in filter(None, row):
            listed.setdefault((rank, peer), []).append(value)
    for (r, peer), own in listed.items():
        for i, (x, y) in enumerate(zip_longest(own, listed.get((peer, r), []))):
            if x != y:
                words = f"{x or 'none'} against {y or 'none'}"
                raise ScheduleError(f"ranks {r} and {peer} disagree on transfer {i}: {words}")


def _check_progress(schedule: Schedule) -> None:
    """The ranks reach the end of their lists: a compute, and after _check_pairs nothing else, waits for a send."""

    def waits(a: Action) -> list[Action]:
        values = schedule.needs(a) if a.kind.is_compute else ()
        return [v for v in values if schedule.owners[v.stage] != schedule.owners[a.stage]]

    def gives(a: Action) -> list[Action]:
        return [a._replace(kind=SENDS[a.kind])] if a.kind in SENDS else []

    if stuck := stuck_at(schedule, waits, gives)[0]:
        words = ", ".join(f"rank {rank} at {a}" for rank, a in stuck.items())
        raise ScheduleError(f"the schedule {schedule.name} deadlocks: {words}")


def _move(schedule: Schedule, a: Action) -> tuple[Action, int]:
    """The value that a send or a receive moves, and the rank on the other side."""
    kind = SENDS[a.kind] if a.kind in SENDS else RECVS[a.kind]
    other = a.stage + (1 if (kind is F) == (a.kind in SENDS) else -1)
    if not 0 <= other < schedule.num_stages:
        raise ScheduleError(f"{a}: there is no stage on the other side")
    return Action(kind, a.stage if a.kind in SENDS else other, a.microbatch), schedule.owners[other]


def _list(keys: set[tuple[int, int]]) -> str:
    return ", ".join(f"stage {s} micro-batch {m}" for s, m in sorted(keys)[:4])
