"""Proof that what the ranks of a job are about to communicate fits together, so that none waits for ever.

A *program* is what one rank does: its calls, in order, and the places where it waits for one.  Ranks that do the
same share one program, so a job of thousands of ranks costs as much as its few distinct programs.  Proved are

- agreement: the members of every group make the same collectives on it in the same order: operation, shape,
  format, root, and what it is for; what one rank sends to another is what the other receives from it, in order;
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

Groups = Mapping[str, Partition]  # all groups by name
Channel = tuple[str, str, int]  # "send" or "recv", group, peer within the group; all collectives: "", group, -1


class Disagreement(MegallamaError):
    """Programs that would hang, or exchange the wrong things."""


@dataclass(frozen=True, eq=False)
class Program:
    """What one rank communicates."""

    calls: tuple[Call, ...]
    waits: tuple[Wait, ...]

    @cached_property
    def places(self) -> list[tuple[Channel, int]]:
        """Of each call, the channel on which it must fit the calls of others, and its number there."""
        out: list[tuple[Channel, int]] = []
        count: Counter[Channel] = Counter()
        for call in self.calls:
            channel = (call.op, call.group, call.peer or 0) if call.op in ("send", "recv") else ("", call.group, -1)
            out.append((channel, count[channel]))
            count[channel] += 1
        return out

    @cached_property
    def channels(self) -> dict[Channel, list[Call]]:
        """The calls of each channel."""
        out: dict[Channel, list[Call]] = defaultdict(list)
        for call, (channel, _) in zip(self.calls, self.places, strict=True):
            out[channel].append(call)
        return out


def prove(programs: Sequence[Program], groups: Groups) -> bool:
    """Prove the programs of ranks 0, 1, ...; whether they would end even if every collective held its rank at once.

    Raises: Disagreement naming the group, the place and two ranks.
    """
    seen: set[tuple[object, ...]] = set()
    for name, partition in groups.items():
        for ranks in partition:
            for member, rank in enumerate(ranks):
                _compare(seen, programs, ranks, (0, ("", name, -1)), (member, ("", name, -1)))
                for op, group, peer in programs[rank].channels:
                    if op and group == name:
                        source, to = (member, peer) if op == "send" else (peer, member)
                        _compare(seen, programs, ranks, (source, ("send", name, to)), (to, ("recv", name, source)))
    _execute(programs, groups)
    held = {p: Program(p.calls, tuple(sorted({*p.waits, *_at_once(p)}))) for p in dict.fromkeys(programs)}
    try:
        _execute([held[p] for p in programs], groups)
    except Disagreement:
        return False
    return True


def _compare(
    seen: set[tuple[object, ...]],
    programs: Sequence[Program],
    ranks: tuple[int, ...],
    first: tuple[int, Channel],
    second: tuple[int, Channel],
) -> None:
    """Two members' calls on two ends of a channel; each pair of programs once."""
    (a, b), (mine, theirs) = (ranks[first[0]], ranks[second[0]]), (first[1], second[1])
    if (key := (programs[a], mine, programs[b], theirs)) in seen:
        return
    seen.add(key)
    for i, (x, y) in enumerate(zip_longest(programs[a].channels.get(mine, []), programs[b].channels.get(theirs, []))):
        if x is None or y is None or (replace(x, op=y.op, peer=y.peer) if mine[0] else x) != y:
            members = ", ".join(map(str, ranks if len(ranks) <= 8 else [*ranks[:4], "...", ranks[-1]]))
            place = f"message {i} from rank {a} to rank {b}" if mine[0] else f"call {i}"
            says = (f"rank {rank} says {call or 'nothing more'}" for rank, call in ((a, x), (b, y)))
            raise Disagreement(f"group {mine[1]} of ranks {members}, {place}: {', '.join(says)}")


def _at_once(program: Program) -> list[Wait]:
    """Waits for every collective as soon as it is made."""
    return [Wait(i + 1, i) for i, (channel, _) in enumerate(program.places) if not channel[0]]


def _execute(programs: Sequence[Program], groups: Groups) -> None:
    """Run all programs as far as they go. Raises: Disagreement if that is not to the end."""
    first: dict[Program, int] = {}  # a rank of each program
    for rank, program in enumerate(programs):
        first.setdefault(program, rank)
    partners = _partners(programs, groups)
    made = {program: Counter[Channel]() for program in first}
    at = dict.fromkeys(first, (0, 0))  # calls made, waits over

    def missing(program: Program, call: int) -> Program | None:
        """A program that has not made its part of a call yet."""
        channel, number = program.places[call]
        return next((p for p, theirs in partners[program, channel] if made[p][theirs] <= number), None)

    def waits_for(program: Program) -> int | None:
        calls, waits = at[program]
        due = waits < len(program.waits) and program.waits[waits].before == calls
        return program.waits[waits].call if due else None

    def advance(program: Program) -> bool:
        before = at[program]
        while at[program] != (len(program.calls), len(program.waits)):
            calls, waits = at[program]
            if (call := waits_for(program)) is None:
                made[program][program.places[calls][0]] += 1
                at[program] = calls + 1, waits
            elif missing(program, call) is None:
                at[program] = calls, waits + 1
            else:
                break
        return at[program] != before

    while sum(map(advance, first)):
        pass
    words: dict[Program, str] = {}
    stuck = next((p for p in first if waits_for(p) is not None), None)
    while stuck is not None and stuck not in words and (call := waits_for(stuck)) is not None:
        other = missing(stuck, call)
        lacks = "" if other is None else f", which rank {first[other]} does not reach"
        words[stuck] = f"rank {first[stuck]} waits for {stuck.calls[call]} of group {stuck.calls[call].group}{lacks}"
        stuck = other
    if words:
        raise Disagreement(f"ranks wait for one another for ever: {'; '.join(words.values())}")


def _partners(
    programs: Sequence[Program], groups: Groups
) -> dict[tuple[Program, Channel], set[tuple[Program, Channel]]]:
    """Who else must call, where any rank of a program calls: all programs of any group that one of its ranks is in."""
    out: dict[tuple[Program, Channel], set[tuple[Program, Channel]]] = defaultdict(set)
    for name, partition in groups.items():
        for members in {tuple(programs[r] for r in ranks) for ranks in partition}:
            everybody = {(program, ("", name, -1)) for program in members}
            for member, program in enumerate(members):
                for op, group, peer in program.channels:
                    if group == name:
                        other = (members[peer], ("recv" if op == "send" else "send", name, member))
                        out[program, (op, group, peer)] |= {other} if op else everybody
    return out
