"""Proof that what the ranks of a job are about to communicate fits together, so that none waits for ever.

A *program* is what one rank does: its calls, in order, and the places where it waits for one.  Ranks that do the
same share one program, so a job of thousands of ranks costs as much as its few distinct programs.  Proved are

- agreement: the members of every group make the same collectives on it in the same order: operation, shape,
  format, root, and what it is for;
- messages: what one rank sends to another is what the other receives from it, in order;
- progress: executed with these waits, all programs come to their end.

A call starts without blocking; it is complete once all members of its group have made it (a message: once both
ends have).  Nothing is ever chosen by who comes first, so if one order of execution ends, every order does, and it
is enough to run all ranks of a program in step.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest

from megallama.comm.groups import Partition
from megallama.comm.recording import Call, Wait
from megallama.config.errors import MegallamaError

MESSAGES = ("send", "recv")
Channel = tuple[str, str, int]  # operation ("" for all collectives), group, peer within the group (-1: collectives)


class Disagreement(MegallamaError):
    """Programs that would hang, or exchange the wrong things."""


@dataclass(frozen=True, eq=False)
class Program:
    """What one rank communicates."""

    calls: tuple[Call, ...]
    waits: tuple[Wait, ...]

    @cached_property
    def channels(self) -> dict[Channel, list[Call]]:
        """The calls that must fit those of others, in order: per group all collectives, the messages per peer."""
        out: dict[Channel, list[Call]] = defaultdict(list)
        for call in self.calls:
            out[_channel(call)].append(call)
        return out


def _channel(call: Call) -> Channel:
    return (call.op, call.group, call.peer or 0) if call.op in MESSAGES else ("", call.group, -1)


def prove(programs: Sequence[Program], groups: Mapping[str, Partition]) -> None:
    """Prove the programs of ranks 0, 1, ...; `groups` are all groups by name.

    Raises: Disagreement naming the group, the place and two ranks.
    """
    seen: set[tuple[object, ...]] = set()
    for name, partition in groups.items():
        for ranks in partition:
            members = [programs[rank] for rank in ranks]
            for member, mine in enumerate(members):
                key: tuple[object, ...] = (name, mine, members[0])
                if key not in seen:
                    seen.add(key)
                    _same(name, ranks, member, members)
                for op, group, peer in mine.channels:
                    if op and group == name:
                        source, to = (member, peer) if op == "send" else (peer, member)
                        if (key := (name, source, members[source], to, members[to])) not in seen:
                            seen.add(key)
                            _matched(name, ranks, source, to, members)
    _Execution(programs, groups).run()


def holds_when_blocking(programs: Sequence[Program], groups: Mapping[str, Partition]) -> bool:
    """Whether programs that `prove` accepts would end even if every collective held its rank until it is complete."""
    held = {p: Program(p.calls, tuple(sorted({*p.waits, *_at_once(p)}))) for p in dict.fromkeys(programs)}
    try:
        _Execution([held[p] for p in programs], groups).run()
    except Disagreement:
        return False
    return True


def _same(name: str, ranks: tuple[int, ...], member: int, members: Sequence[Program]) -> None:
    first, mine = (members[i].channels.get(("", name, -1), []) for i in (0, member))
    for i, (x, y) in enumerate(zip_longest(first, mine)):
        if x != y:
            says = f"{_says(ranks[0], x)}, {_says(ranks[member], y)}"
            raise Disagreement(f"group {name} of ranks {_list(ranks)}, call {i}: {says}")


def _matched(name: str, ranks: tuple[int, ...], source: int, to: int, members: Sequence[Program]) -> None:
    sent = members[source].channels.get(("send", name, to), [])
    received = members[to].channels.get(("recv", name, source), [])
    for i, (x, y) in enumerate(zip_longest(sent, received)):
        if x is None or y is None or replace(x, op="recv", peer=source) != y:
            says = f"{_says(ranks[source], x)}, {_says(ranks[to], y)}"
            raise Disagreement(f"group {name}, message {i} from rank {ranks[source]} to rank {ranks[to]}: {says}")


def _says(rank: int, call: Call | None) -> str:
    return f"rank {rank} says {call or 'nothing more'}"


def _list(ranks: Sequence[int]) -> str:
    words = list(map(str, ranks))
    return ", ".join(words if len(words) <= 8 else [*words[:4], "...", words[-1]])


class _Execution:
    """All ranks of a program advance together; a partner is any program of any group that one of them is in."""

    def __init__(self, programs: Sequence[Program], groups: Mapping[str, Partition]) -> None:
        self.ranks: dict[Program, int] = {}  # program -> its first rank
        for rank, program in enumerate(programs):
            self.ranks.setdefault(program, rank)
        self.at = dict.fromkeys(self.ranks, (0, 0))  # calls made, waits done
        self.made = {program: Counter[Channel]() for program in self.ranks}
        self.number = {program: list(_numbers(program)) for program in self.ranks}  # of each call, on its channel
        self.partners: dict[Program, dict[Channel, set[tuple[Program, Channel]]]] = {
            program: defaultdict(set) for program in self.ranks
        }
        for name, partition in groups.items():
            for members in {tuple(programs[r] for r in ranks) for ranks in partition}:
                everybody = {(program, ("", name, -1)) for program in members}
                for member, program in enumerate(members):
                    for op, group, peer in program.channels:
                        if group == name:
                            other = (members[peer], ("recv" if op == "send" else "send", name, member))
                            self.partners[program][op, group, peer] |= {other} if op else everybody

    def run(self) -> None:
        """Advance until nothing moves. Raises: Disagreement if that is before the end."""
        while any([self._advance(program) for program in self.ranks]):
            pass
        stuck = [p for p in self.ranks if self.at[p] != (len(p.calls), len(p.waits))]
        if stuck:
            raise Disagreement(f"ranks wait for one another for ever: {self._circle(stuck[0])}")

    def _advance(self, program: Program) -> bool:
        before = self.at[program]
        while (awaited := self._next(program)) is not None:
            made, waited = self.at[program]
            if awaited >= 0 and self._missing(program, awaited) is not None:
                break
            if awaited < 0:
                self.made[program][_channel(program.calls[made])] += 1
                self.at[program] = made + 1, waited
            else:
                self.at[program] = made, waited + 1
        return self.at[program] != before

    def _next(self, program: Program) -> int | None:
        """The call that the program waits for next; -1: it makes a call; None: it has ended."""
        made, waited = self.at[program]
        if waited < len(program.waits) and program.waits[waited].before == made:
            return program.waits[waited].call
        return -1 if made < len(program.calls) else None

    def _missing(self, program: Program, call: int) -> Program | None:
        """A program that has not made its part of a call yet."""
        number = self.number[program][call]
        partners = self.partners[program][_channel(program.calls[call])]
        return next((other for other, channel in partners if self.made[other][channel] <= number), None)

    def _circle(self, program: Program) -> str:
        words: list[str] = []
        seen: set[Program] = set()
        while program not in seen and (awaited := self._next(program)) is not None and awaited >= 0:
            seen.add(program)
            other = self._missing(program, awaited)
            assert other is not None
            call, rank = program.calls[awaited], self.ranks[other]
            words.append(f"rank {self.ranks[program]} waits for {call} of group {call.group}, which rank {rank} lacks")
            program = other
        return "; ".join(words)


def _at_once(program: Program) -> list[Wait]:
    return [Wait(i + 1, i) for i, call in enumerate(program.calls) if call.op not in MESSAGES]


def _numbers(program: Program) -> list[int]:
    count: Counter[Channel] = Counter()
    out = []
    for call in program.calls:
        channel = _channel(call)
        out.append(count[channel])
        count[channel] += 1
    return out
