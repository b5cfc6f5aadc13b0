"""Who holds up a run: what is concluded from where all its ranks stand, and how that is said.

A rank's report is its state (`FlightReader.state`) with `process` (the kernel's letter for it), `stacks`, `host`;
a rank that nothing is heard from has none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]
_ACTIONS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
_PROCESS = {
    "T": "its process is stopped (SIGSTOP)",
    "t": "a debugger holds its process",
    "D": "its process is in a call of the kernel that does not return (a disk, a device)",
}


def where(report: Report) -> str:
    """step 5, backward of micro-batch 1 in stage 0, layer 3."""
    action, layer = report["action"], report["layer"]
    parts = [f"step {report['step']}"] if report["step"] else []
    if action in ("", "last sends"):
        return ", ".join([*parts, action or report["phase"]])
    parts.append(f"{_ACTIONS.get(action, action)} of micro-batch {report['microbatch']} in stage {report['stage']}")
    parts += [f"layer {layer}"] if layer >= 0 and action in _ACTIONS else []
    return ", ".join(parts)


def waits_for(wait: Mapping[str, Any]) -> str:
    """all_reduce 17 of group tp (ranks 0-3, 512 rows, 1048576 bytes)."""
    ranks, peer, which = wait["ranks"], wait["peer"], wait["number"]
    name = f"{ranks[0]}-{ranks[-1]}" if ranks and ranks == [*range(ranks[0], ranks[-1] + 1)] else ranks
    if peer >= 0:
        which = f"to rank {peer}" if wait["operation"] == "send" else f"from rank {peer}"
    sizes = f"{wait['rows']} rows, {wait['bytes']} bytes"
    return f"{wait['operation']} {which} of group {wait['group']} (ranks {name}, {sizes})"


def hung(reports: Mapping[int, Report], hosts: Sequence[str]) -> tuple[list[int], str]:
    """The ranks that hold up the others, and the verdict; `hosts` of all ranks."""
    waiting = {rank: report["wait"] for rank, report in reports.items() if "wait" in report}
    lost = [rank for rank in range(len(hosts)) if rank not in reports]
    stuck = [rank for rank, report in reports.items() if report["process"] in _PROCESS]
    busy = [rank for rank in reports if rank not in waiting and rank not in stuck]
    groups = _groups(reports, waiting)
    choices = (
        ([rank for rank in stuck if reports[rank]["process"] == "T"], ""),  # the others may have left
        (lost, "nothing is heard from its supervisor: its host is gone, or cut off from the others"),
        (stuck, ""),
        (busy, "it is not where the others wait for it"),
        _behind(reports, waiting, groups),
        ([*waiting], "all ranks wait for one another"),
    )
    found, why = next((choice for choice in choices if choice[0]), choices[-1])
    wanted = {wait["peer"] for wait in waiting.values() if wait["peer"] >= 0}.union(*(late for _, late in groups))
    culprits = [rank for rank in found if rank in wanted] or found
    lines = []
    for rank in culprits[:8]:
        report = reports.get(rank)
        state = _PROCESS.get(report["process"]) if report else None
        at = f"; {where(report)}, nothing new for {report['seconds']:.1f} s" if report else ""
        lines.append(f"rank {rank} ({hosts[rank]}) holds up the others: {state or why}{at}")
    lines += [f"and {len(culprits) - 8} more ranks: {culprits[8:24]}"] if len(culprits) > 8 else []
    others = [rank for rank in waiting if rank not in culprits] or [*waiting]
    for rank in sorted(others, key=lambda rank: -waiting[rank]["seconds"])[:8]:
        since = f"waits for {waiting[rank]['seconds']:.1f} s in {waits_for(waiting[rank])}"
        lines.append(f"  rank {rank} ({hosts[rank]}) {since}; {where(reports[rank])}")
    return culprits, "\n".join(lines)


def stacks(reports: Mapping[int, Report]) -> str:
    """Where the threads of all ranks stand that answered; the same once."""
    same, calls = dict[str, list[int]](), list[str]()
    for rank, report in sorted(reports.items()):
        same.setdefault(report.get("stacks") or "it does not answer\n", []).append(rank)
        said = "(number, group, operation, rows, bytes, done)"
        calls.append(f"last communications of rank {rank} {said}: {report['calls']}")
    parts = [f"stacks of rank {', '.join(map(str, ranks))}:\n{text}" for text, ranks in same.items()]
    return "\n".join([*parts, *calls[:16]])


def _groups(reports: Mapping[int, Report], waiting: Mapping[int, Report]) -> list[tuple[Report, list[int]]]:
    """Of every group that is waited for, the wait for its latest communication, and its ranks that are not so far."""
    latest: dict[tuple[Any, ...], Report] = {}
    for wait in waiting.values():
        key = wait["group"], *wait["ranks"][:1]  # none: it has begun anew meanwhile
        if wait["ranks"] and wait["peer"] < 0 and (key not in latest or latest[key]["number"] < wait["number"]):
            latest[key] = wait

    def begun(rank: int, wait: Report) -> int:
        return int(reports[rank]["counts"].get(wait["group"], 0)) if rank in reports else -1

    return [(wait, [r for r in wait["ranks"] if begun(r, wait) < wait["number"]]) for wait in latest.values()]


def _behind(
    reports: Mapping[int, Report], waiting: Mapping[int, Report], groups: Sequence[tuple[Report, list[int]]]
) -> tuple[list[int], str]:
    """Ranks that have begun fewer communications of a group than those that wait in it, or others."""
    for wait, late in groups:
        name, number = wait["group"], wait["number"]
        if found := [r for r in late if r in reports]:
            count = reports[found[0]]["counts"].get(name, 0)
            text = f"it has begun {count} communications of group {name} where others have {number}"
            return found, f"{text}: it has left one out, or waits elsewhere"
        there = {r: waiting[r] for r in wait["ranks"] if r in waiting}
        same = {r: w["operation"] for r, w in there.items() if (w["group"], w["number"]) == (name, number)}
        usual = Counter(same.values()).most_common(1)[0][0]
        if odd := [r for r, operation in same.items() if operation != usual]:
            return odd, f"it is in another communication of group {name} than the others"
    return [], ""
