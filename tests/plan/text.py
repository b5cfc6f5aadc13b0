"""Schedules as text: a head, then one line of actions per rank."""

from __future__ import annotations

import re

from megallama.plan.schedule import Schedule, looped, parse_action


def text(schedule: Schedule) -> str:
    """The inverse of `parse`."""
    s = schedule
    head = f"{s.name} ranks={s.num_ranks} stages={s.num_stages} microbatches={s.num_microbatches}"
    if s.owners != looped(s.num_ranks, s.num_stages):
        head += f" owners={','.join(map(str, s.owners))}"
    return "\n".join([head, *(" ".join(map(str, steps)) for steps in s.steps)])


def parse(text: str) -> Schedule:
    """The inverse of `text`."""
    head, *lines = text.strip("\n").split("\n")
    found = re.fullmatch(r"(\S+) ranks=(\d+) stages=(\d+) microbatches=(\d+)(?: owners=([\d,]+))?", head.strip())
    assert found and len(lines) == int(found[2]), text
    owners = tuple(map(int, found[5].split(","))) if found[5] else ()
    steps = tuple(tuple(map(parse_action, line.split())) for line in lines)
    return Schedule(found[1], *map(int, found.groups()[1:4]), steps, owners)
