"""Copies of ranks' states: in files that outlive all, and with a buddy, which never looks into them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from mmap import mmap
from typing import Any

from megallama.checkpoint.disk import read_head
from megallama.comm import flight_record as flight
from megallama.recovery.copy_files import CopyFiles, is_over, why_not
from megallama.recovery.far_copies import PATIENCE, Door, FarCopies
from megallama.recovery.flight_reader import FlightReader

Message = dict[str, Any]
_LOOK, _SLOW = 0.005, 1.0  # seconds between looks; that are told


class Keeper:
    """Of one supervisor; `say` is how it speaks."""

    def __init__(self, record: FlightReader, say: Callable[[str], None], files: CopyFiles) -> None:
        self._record, self._say, self._files = record, say, files
        self._about: Message = {}
        self._seen = self._seat = 0  # the last question that was asked by a trainer of `_about`; its launched rank
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._door = Door(self._lend, lambda: str(self._about["token"]))
        self._notes: list[str] = []  # for the trainer to say
        self._opened: Message = {}  # the trainer's questions: what is kept,
        self._meeting: Message = {}  # and with whom
        self._buddy: FarCopies | None = None
        self._next, self._why, self._slow = 0.0, "", False  # when it is met again; why it was lost; so slow is said

    def look(self, about: Message) -> None:
        """From the first question on a thread answers them."""
        self._about, self._seen = about, self._record.words[flight.ASKED]
        if not self._thread.ident and self._record.words[flight.ASKED]:
            self._thread.start()

    def leave(self, status: int) -> None:
        """The run is over: without files, where nobody goes on from them."""
        if is_over({"status": status, "step": self._record.words[flight.STEP]}):
            self._drop({})

    def _answer(self) -> None:
        words = self._record.words
        answers = {"open": self._open, "drop": self._drop, "meet": self._meet, "fetch": self._fetch}
        while True:
            if words[flight.ANSWERED] < (asked := words[flight.ASKED]) <= self._seen:
                answer: Message = {"problem": ""}
                try:
                    question = self._record.told("asked")
                    answer |= answers[question["do"]](question)
                except Exception as error:  # a trainer waits
                    answer["problem"] = str(error) if isinstance(error, OSError) else repr(error)
                self._record.tell("answer", answer)
                words[flight.ANSWERED] = asked
            elif self._meeting.get("ends") and words[flight.COPIED] not in (0, words[flight.BUDDY]):
                self._send_newest()
            time.sleep(_LOOK if self._meeting.get("ends") else 4 * _LOOK)

    def _open(self, question: Message) -> Message:
        """The file of this rank, where its trainer opens it; and where other supervisors find this one."""
        self._opened, self._meeting, self._notes = question, {}, []
        self._seat = self._about["seats"][self._about["rank"]]
        file, _ = self._file(self._seat, question["size"], self._notes)
        end = self._door.listen(self._about["address"]) if question["listens"] else None
        return {"file": f"/proc/{os.getpid()}/fd/{file}", "end": end}

    def _drop(self, question: Message) -> Message:
        self._meeting = {}
        self._files.drop()
        return {}

    def _file(self, which: object, size: int, notes: list[str]) -> tuple[int, mmap]:
        return self._files.open(self._opened["key"]["folder"], which, size, notes)

    def _own(self) -> list[memoryview]:
        """Both slots of this rank's file."""
        size, memory = self._opened["size"], memoryview(self._file(self._seat, 0, [])[1])
        return [memory[: size // 2], memory[size // 2 : size]]

    def _lend(self, hello: Message) -> mmap:
        notes: list[str] = []
        memory = self._file(f"{int(hello['who'])}-buddy", int(hello["size"]), notes)[1]
        for note in notes:
            self._say(note)
        return memory

    def _meet(self, question: Message) -> Message:
        """Which copies of this rank may be gone on from; those that only its buddy has are taken from there."""
        self._meeting, notes, own, slots = question, self._notes, dict[int, int](), self._own()
        for slot, said in enumerate(map(read_head, slots)):
            if said and (why := why_not(said, self._opened["key"], question)):
                notes.append(f"the copy of step {said['step']} in memory is not used: {why}")
            elif said:
                own[said["step"]] = slot
        if question["ends"]:
            self._record.words[flight.BUDDY], who = 0, self._end()[1]
            notes.append(f"copies in memory go to {who}, at most {question['rate']:g} GB/s; it keeps as much")
            try:
                buddy = self._reach()
                for step in sorted({*buddy.steps} - {*own}, reverse=True)[: 2 - len(own)]:
                    slot = next(slot for slot in range(2) if slot not in own.values())
                    buddy.fetch(slots[slot], step, ())
                    own[step] = slot
                    notes.append(f"the copy of step {step} in memory is not here: taken from {who}")
            except (OSError, ValueError) as error:
                notes.append(f"warning: copies in memory are here alone: {who} is not reached: {error}")
                self._lost(str(error))
        return {"own": [*own.items()], "notes": notes}

    def _end(self) -> tuple[tuple[str, int], str]:
        about, rank = self._about, buddy_of(self._about["rank"], self._about["host_of"])
        address, port = self._meeting["ends"][rank]
        return (address, port), f"rank {rank} ({about['hosts'][about['host_of'][rank]]}, {address}:{port})"

    def _reach(self) -> FarCopies:
        if self._buddy is not None:
            self._buddy.close()
        key, size = self._opened["key"], self._opened["size"]
        hello = {"token": self._about["token"], "who": self._seat, "size": size}
        self._buddy = FarCopies(self._end()[0], hello, size // 2, key, self._meeting)
        return self._buddy

    def _lost(self, why: str) -> None:
        self._buddy, self._record.words[flight.BUDDY] = None, -1
        self._why, self._next = self._why or why, time.monotonic() + PATIENCE

    def _send_newest(self) -> None:
        again, copied, began = self._buddy is None, self._record.words[flight.COPIED], time.monotonic()
        if again and began < self._next:
            return
        try:
            if again:
                self._reach()
                self._say(f"copies in memory go to {self._end()[1]} again, which was lost: {self._why}")
                self._why = ""
            if self._buddy and self._buddy.send(self._own(), copied - 1, self._meeting["rate"]):
                took, waits = time.monotonic() - began, self._record.words[flight.PHASE] == flight.PHASES.index("save")
                self._record.words[flight.BUDDY] = copied
                if took > _SLOW and waits and not self._slow:
                    self._slow = True
                    text = f"copies in memory take {took:.1f} s to {self._end()[1]}, and training waits for them"
                    self._say(f"warning: {text}: raise checkpoint.memory_interval, or checkpoint.buddy_rate")
        except (OSError, ValueError) as error:
            if again:  # not at once: all may be leaving
                self._say(f"warning: copies in memory are here alone: {self._end()[1]} is not reached: {error}")
            self._lost(str(error))

    def _fetch(self, question: Message) -> Message:
        if self._buddy is None or question["step"] not in self._buddy.steps:
            raise ConnectionError("nobody else has it")
        self._buddy.fetch(self._own()[question["slot"]], question["step"], question["spans"])
        return {"from": f"taken from {self._end()[1]}"}


def buddy_of(rank: int, host_of: list[int]) -> int:
    """The rank with the same place on the next host."""
    here, hosts = host_of[rank], [*dict.fromkeys(host_of)]
    after = hosts[(hosts.index(here) + 1) % len(hosts)]
    there = [r for r, host in enumerate(host_of) if host == after]
    return there[host_of[:rank].count(here) % len(there)]
