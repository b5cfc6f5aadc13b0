"""Proof that what the ranks of a job are about to communicate fits together, so that none waits without end.

A *program* is what one rank does: its calls, in order, and where it waits for one.  Ranks that do
the same share one. Proved are agreement (members of a group make the same collectives in the same
order, and what one rank sends another receives, in order) and progress: executed with these waits,
all programs come to their end.

A call is complete once all members of its group have made it (a message: both ends).  Nothing is
chosen by who comes first: if one order of execution ends, every order does.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from typing import Any

from megallama.analysis.recording import Call, Wait
from megallama.comm.group import Partition
from megallama.config.errors import MegallamaError

Groups = Mapping[str, Partition]  # all groups by name
Channel = tuple[str, str, int]  # "send" or "recv", group, peer within the group; all collectives: "", group, -1
End = tuple[int, Channel]  # of a channel: a member, and the channel as it sees it


class Disagreement(MegallamaError):
    """Programs that would hang, or exchange the wrong things."""


@dataclass(frozen=True, eq=False)
class Program:
    """What one rank communicates."""

    calls: tuple[Call, ...]
    waits: tuple[Wait, ...]

    @cached_property
    def channels(self) -> dict[Channel, list[int]]:
        """The calls of each channel, by number."""
        out: dict[Channel, list[int]] = defaultdict(list)
        for i, call in enumerate(self.calls):
            message = call.op in ("send", "recv")
            out[(call.op, call.group, call.peer or 0) if message else ("", call.group, -1)].append(i)
        return out

    @cached_property
    def places(self) -> dict[int, tuple[Channel, int]]:
        """The channel of each call, and how many calls were made on it before."""
        return {i: (channel, n) for channel, calls in self.channels.items() for n, i in enumerate(calls)}

    @cached_property
    def steps(self) -> list[tuple[int, int, int]]:
        """(calls made before, 0 to wait for or 1 to make, number of the call), in order."""
        waits = [(before, 0, call) for before, call in self.waits]
        return sorted([*waits, *((i, 1, i) for i in range(len(self.calls)))], key=lambda step: step[:2])


def prove(programs: Sequence[Program], groups: Groups) -> bool:
    """Prove the programs of ranks 0, 1, ...; whether they would end even if every collective held its rank at once.

    Raises: Disagreement naming the group, the place and two ranks.
    """
    seen: set[Any] = set()
    for name, partition in groups.items():
        for ranks in partition:
            for member, rank in enumerate(ranks):
                _compare(seen, programs, ranks, (0, ("", name, -1)), (member, ("", name, -1)))
                for op, group, peer in programs[rank].channels:
                    if op and group == name:
                        source, to = (member, peer) if op == "send" else (peer, member)
                        _compare(seen, programs, ranks, (source, ("send", name, to)), (to, ("recv", name, source)))
    _execute(programs, groups)
    held: dict[Program, Program] = {}
    for p in dict.fromkeys(programs):
        at_once = (Wait(i + 1, i) for i, (channel, _) in p.places.items() if not channel[0])
        held[p] = Program(p.calls, (*p.waits, *at_once))
    try:
        _execute([held[p] for p in programs], groups)
    except Disagreement:
        return False
    return True


def _compare(seen: set[Any], programs: Sequence[Program], ranks: tuple[int, ...], one: End, other: End) -> None:
    """Two members' calls on two ends of a channel; each pair of programs once."""
    (a, b), (mine, theirs) = (ranks[one[0]], ranks[other[0]]), (one[1], other[1])
    if (key := (programs[a], mine, programs[b], theirs)) in seen:
        return
    seen.add(key)
    calls = ([programs[r].calls[i] for i in programs[r].channels.get(end, [])] for r, end in ((a, mine), (b, theirs)))
    for i, (x, y) in enumerate(zip_longest(*calls)):
        if x is None or y is None or (replace(x, op=y.op, peer=y.peer) if mine[0] else x) != y:
            members = ", ".join(map(str, ranks if len(ranks) <= 8 else [*ranks[:4], "...", ranks[-1]]))
            place = f"message {i} from rank {a} to rank {b}" if mine[0] else f"call {i}"
            says = (f"rank {rank} says {call or 'nothing more'}" for rank, call in ((a, x), (b, y)))
            raise Disagreement(f"group {mine[1]} of ranks {members}, {place}: {', '.join(says)}")


def _execute(programs: Sequence[Program], groups: Groups) -> None:
    """Run all programs as far as they go. Raises: Disagreement if that is not to the end."""
    first = {program: programs.index(program) for program in dict.fromkeys(programs)}
    # who must call too, where any rank of a program calls: all programs of any group that one of its ranks is in
    partners: dict[tuple[Program, Channel], set[tuple[Program, Channel]]] = defaultdict(set)
    for name, partition in groups.items():
        for members in {tuple(programs[r] for r in ranks) for ranks in partition}:
            everybody = {(program, ("", name, -1)) for program in members}
            for member, program in enumerate(members):
                for op, group, peer in (channel for channel in program.channels if channel[1] == name):
                    theirs = (members[peer], ("recv" if op == "send" else "send", name, member))
                    partners[program, (op, group, peer)] |= {theirs} if op else everybody
    made = {program: Counter[Channel]() for program in first}
    at = dict.fromkeys(first, 0)

    def missing(program: Program, call: int) -> Program | None:
        """A program that has not made its part of a call yet."""
        channel, number = program.places[call]
        return next((p for p, theirs in partners[program, channel] if made[p][theirs] <= number), None)

    def advance(program: Program) -> bool:
        before = at[program]
        while at[program] < len(program.steps):
            _, making, call = program.steps[at[program]]
            if making:
                made[program][program.places[call][0]] += 1
            elif missing(program, call) is not None:
                break
            at[program] += 1
        return at[program] > before

    while sum(map(advance, first)):
        pass
    words: dict[Program, str] = {}
    stuck = next((p for p in first if at[p] < len(p.steps)), None)
    while stuck is not None and stuck not in words:
        call = stuck.steps[at[stuck]][2]
        other = missing(stuck, call)
        lacks = "" if other is None else f", which rank {first[other]} does not reach"
        words[stuck] = f"rank {first[stuck]} waits for {stuck.calls[call]} of group {stuck.calls[call].group}{lacks}"
        stuck = other
    if words:
        raise Disagreement(f"ranks wait for one another for ever: {'; '.join(words.values())}")
