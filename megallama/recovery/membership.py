"""Which of the launched ranks are the world: fewer replicas while some are lost for good, all when they are back.

A launched rank has a place in the world, or waits for one without a trainer, or is lost. The root decides; who waits is
connected with it. In every world ranks are counted from 0 on; the launched ranks are its seats.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Iterable, Set
from contextlib import suppress
from pathlib import Path

from megallama.config.errors import ranges
from megallama.recovery.flight_reader import FlightReader
from megallama.recovery.link import Links, Message
from megallama.recovery.node import begin_generation
from megallama.train.signals import FAILED, SAVED

ALONE = 30.0  # seconds without the root after which a rank that waits leaves


class Members:
    """What the root knows of all launched ranks; `about`: what its first trainer told."""

    def __init__(self, about: Message, links: Links) -> None:
        self._about, self._links = about, links
        self.seats: list[int] = about["seats"]  # the launched rank of each present one
        self._size, self._hosts = len(self.seats), list(about["hosts"])

    def lost(self) -> list[int]:
        """Launched ranks that have no place and do not wait for one."""
        return sorted({*range(self._size)} - {*self.seats} - self._links.waiting().keys())

    def next_world(self, able: Iterable[int]) -> tuple[list[int], str]:
        """The next seats, of as many whole replicas as the batch suits, and what changes; or none, and why."""
        there, (stride, dp) = {*able, *self._links.waiting()}, self._about["dp"]
        lost = [rank for rank in range(self._size) if rank not in there]
        least, why_not = self._about["min_replicas"] or dp, self._about["replicas"]
        whole = whole_replicas(self._size, stride, dp, there)
        counts = [n for n in range(least, len(whole) + 1) if n == dp or not why_not[n]]
        if not counts or 0 in lost:
            why = f"{len(whole)} of {dp} replicas are whole, run.min_replicas={self._about['min_replicas']}"
            why += f"; {why_not[len(whole)]}" if len(whole) >= least else ""
            why = "its supervisor decides" if 0 in lost else why
            return [], f"the run cannot go on without launched rank {ranges(lost)}: {why}"
        n, rows = counts[-1], range(0, len(whole[0]), stride)
        seats = [rank for row in rows for replica in whole[:n] for rank in replica[row : row + stride]]
        text = f"the world changes: {n} of {dp} replicas, of launched ranks {ranges(seats)}"
        text += f" as ranks {ranges(range(len(seats)))}" if seats != [*range(len(seats))] else ""
        text += f"; lost: {ranges(lost)}" if lost else ""
        text += f"; waiting without work: {ranges(spare)}" if (spare := sorted(there - {*seats})) else ""
        text += f"; {1 - len(seats) / self._size:.0%} of the launched ranks idle" if n < dp else ""
        return seats, text if seats != self.seats else ""

    def begin(self, seats: list[int]) -> Message | None:
        """These are the world from here on: what its ranks are told; None where worlds do not change."""
        self.seats = seats
        if not self._about["min_replicas"]:
            return None
        self._hosts = [*dict.fromkeys([*self._hosts, *self._links.waiting().values()])]
        return {name: self._about[name] for name in ("folder", "launch")} | {"seats": seats, "hosts": self._hosts}

    def answer(self, asked: Message) -> Message:
        """To a rank that was started again: nothing while it seems to be there, else why it may not wait."""
        if asked["arguments"] != sys.argv[6:]:
            return {"why": f"it was started with {sys.argv[6:]}, and not with {asked['arguments']}"}
        return {"why": ""} if asked["seat"] in self.lost() else {}


def waits(record: FlightReader) -> Message | None:
    """What is known of the run, where the rank of this record has no place in it."""
    place: Message | None = record.told("place")
    return place if place and place["seat"] not in place["seats"] else None


def wait(record: FlightReader, place: Message, links: Links, signals: list[int]) -> int | None:
    """A look of the supervisor of such a rank: does the root have a place for it? The status with which it leaves."""
    with suppress(OSError, ValueError):  # it is being written, or the folder is stuck
        root = json.loads((Path(place["folder"]) / "status" / "root").read_text(encoding="ascii"))
        links.token = root["token"]
        links.connect(root["address"], root["port"], {"seat": place["seat"], "name": socket.gethostname()})
    links.send({"signals": signals})  # a request to stop is for all; said until it is heard
    for _, message in links.poll():
        if "end" in message:
            return int(message["end"])
        if "generation" in message:
            begin_generation(record, message["generation"], message["place"] | {"seat": place["seat"]})
            if not waits(record):
                links.connect("", 0, {})
    return (SAVED if signals else FAILED) if time.monotonic() - links.met > ALONE else None


def whole_replicas(size: int, stride: int, dp: int, there: Set[int]) -> list[list[int]]:
    """The ranks of each replica that is whole, of `size` ranks in which neighbours along dp are `stride` apart.

    The first one, of rank 0, is made whole with ranks of broken ones that stood at the same place, else of the last
    whole one: rank 0 is needed.
    """
    first = [rank for rank in range(size) if rank // stride % dp == 0]
    replicas = [[rank + d * stride for rank in first] for d in range(dp)]
    donors = sorted(replicas[:0:-1], key=lambda replica: there >= {*replica})
    for i, seat in enumerate(replicas[0]):
        if seat not in there and (donor := next((r for r in donors if r[i] in there), None)):
            replicas[0][i], donor[i] = donor[i], seat
    return [replica for replica in replicas if there >= {*replica}]
