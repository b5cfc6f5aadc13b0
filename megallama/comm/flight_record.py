"""What a rank is doing, in memory that its supervisor reads, also when the rank stands still.

It is a file without a name: numbers of 64 bits, each written by one process, and texts, read again if half written.
"""

import json
import mmap
import os
import signal
import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

PHASES = "setting up,between steps,data,forward_backward,grad_sync,agree,optimizer,save,evaluate".split(",")
ACTIONS = ("", "F", "B", "I", "W", "send_F", "recv_F", "send_B", "recv_B", "last sends")
OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "send", "recv", "all_to_all")
TRAINER, STEP, PHASE, ACTION, STAGE, MICROBATCH, LAYER, CHANGED, LIMIT, LAUNCHED = range(10)
COMPLETED, SAVING, STEPS, WAITED, BEAT, ENDED, PORT, SLOWEST, EXCESS, LAUNCHER = range(10, 20)
SUPERVISOR, GENERATION, ASKED, ANSWERED, COPIED, BUDDY, SPARE = range(20, 27)
"""Words: process; position; when it last moved [ns]; longest wait of now [ns]; actions started, and on CUDA finished;
whether a save is under way; steps done and all time spent in waits [ns]; by the supervisor: when it last
looked [ns], the trainer's wait status + 1, where it listens; the slowest rank + 1, and its excess in millionths; the
launcher's process and the supervisor's; how often trainers have been replaced; questions of the trainer, and answers;
the step of its newest copy + 1, and of the newest that its buddy has, -1 while there is none; its maker's spare."""
_LASTING = (BEAT, PORT, LAUNCHER, SUPERVISOR, GENERATION, ASKED, ANSWERED, SPARE)
CALLS, CALL_WORDS = 64, 8  # the last communications, and of each:
NUMBER, GROUP, OPERATION, ROWS, BYTES, PEER, BEGAN, DONE = range(CALL_WORDS)  # NUMBER: from 1 in its group
BUSY, FIRST_BUSY = 64, 32  # steps whose own work is remembered [ns]; first word
FIRST_CALL = FIRST_BUSY + BUSY
MAX_GROUPS, COUNTS = 16, FIRST_CALL + CALLS * CALL_WORDS  # of each group: communications begun
SINCE = COUNTS + MAX_GROUPS  # the call that is waited for: its place + 1, and since when [ns]
WORDS = SINCE + 2
TEXTS = {"about": 1 << 19, "groups": 1 << 16, "cause": 1 << 14, "verdict": 1 << 14}  # bytes of each
TEXTS |= {"place": 1 << 16, "asked": 1 << 18, "answer": 1 << 16}
PLACES = dict(zip(TEXTS, accumulate(TEXTS.values(), initial=WORDS * 8), strict=False))  # their first bytes
_SIZE = -(-(WORDS * 8 + sum(TEXTS.values())) // mmap.PAGESIZE) * mmap.PAGESIZE


class FlightRecord:
    """The record of one rank, in `file` made by `create`, or in memory that nobody reads.

    `stacks`: the file into which the rank writes where its threads stand.
    """

    def __init__(self, file: int = -1, stacks: int = -1) -> None:
        self.file, self.stacks = file, stacks
        self.memory = mmap.mmap(file, _SIZE)
        self.words = memoryview(self.memory)[: WORDS * 8].cast("q")
        self._next = self._began = self._since = 0
        self.clock = time.monotonic_ns  # of own work; the thread's CPU time where ranks share cores
        self.groups: list[list[Any]] = []  # of every group: name, ranks

    @staticmethod
    def create() -> int:
        """A file for a record, also for those it starts. Raises: OSError without room."""
        file = os.memfd_create("megallama-flight-record", 0)
        os.posix_fallocate(file, 0, _SIZE)  # without memory it fails here, not by a signal later
        return file

    @property
    def watched(self) -> bool:
        """Whether a supervisor reads it."""
        return self.file >= 0

    def begin_again(self) -> None:
        """Nothing is known of the next trainer; `Node.begin_generation` drops the texts."""
        for word in range(WORDS):
            if word not in _LASTING:
                self.words[word] = 0

    # ---- the trainer ----

    def at(self, step: int | None = None, phase: str | None = None) -> None:
        if step is not None:
            self.words[STEP] = step
        if phase is not None:
            self.words[PHASE] = PHASES.index(phase)
        self.words[CHANGED] = time.monotonic_ns()

    def action(self, kind: str, stage: int = 0, microbatch: int = 0) -> None:
        """It begins an action of its pipeline; empty: it is between two."""
        words = self.words
        words[ACTION], words[STAGE], words[MICROBATCH], words[LAYER] = ACTIONS.index(kind), stage, microbatch, -1
        words[LAUNCHED] += 1
        words[CHANGED] = time.monotonic_ns()

    def add_group(self, name: str, ranks: Sequence[int]) -> int:
        """The number of a group in this record."""
        self.groups.append([name, [*ranks]])
        self.tell("groups", self.groups)
        return min(len(self.groups), MAX_GROUPS) - 1

    def begins(self, group: int, operation: str, rows: int, nbytes: int, peer: int = -1) -> int:
        """It starts a communication, with global rank `peer` or the group; its place in the list."""
        place, words = self._next, self.words
        self._next = (place + 1) % CALLS
        at = FIRST_CALL + place * CALL_WORDS
        words[COUNTS + group] += 1
        words[at + NUMBER], words[at + GROUP] = words[COUNTS + group], group
        words[at + OPERATION], words[at + ROWS] = OPERATIONS.index(operation), rows
        words[at + BYTES], words[at + PEER] = nbytes, peer
        words[at + DONE], words[at + BEGAN] = 0, time.monotonic_ns()
        return place

    def waits(self, place: int) -> None:
        self._since, self.words[SINCE + 1] = self.clock(), time.monotonic_ns()
        self.words[SINCE] = place + 1

    def arrived(self, place: int) -> None:
        words, now = self.words, time.monotonic_ns()
        words[SINCE] = 0
        words[FIRST_CALL + place * CALL_WORDS + DONE] = words[CHANGED] = now
        words[WAITED] += self.clock() - self._since

    def layer(self, number: int, gradient: object = None) -> None:
        """It begins a layer: forward, or backward where a hook has its gradient."""
        self.words[LAYER] = number

    def work_begins(self) -> None:
        """From here on the time of a step is its own work, but for waits."""
        self._began = self.clock() - self.words[WAITED]

    def work_done(self) -> None:
        self._remember(self.clock() - self.words[WAITED] - self._began)

    def _remember(self, busy_ns: int) -> None:
        self.words[FIRST_BUSY + self.words[STEPS] % BUSY] = busy_ns
        self.words[STEPS] += 1

    def ends(self, status: int, why: str, *, echo: bool = False, final: bool = False) -> None:
        """It leaves; the first reason stays. `echo`: another's; `final`: it cannot be replaced."""
        if self.told("cause") is None:
            self.tell("cause", {"status": status, "text": why, "echo": echo, "final": final})

    def ask(self, **question: Any) -> dict[str, Any]:
        """The supervisor's answer; its "problem" is empty where all is well."""
        self.tell("asked", question)
        self.words[ASKED] += 1
        os.kill(self.words[SUPERVISOR], signal.SIGCHLD)  # it looks at once
        since, most = time.monotonic(), self.words[LIMIT] / 1e9 or 1800.0
        while self.words[ANSWERED] != self.words[ASKED]:
            if time.monotonic() - since >= most:
                return {"problem": f"the supervisor has not answered for {most:g} s"}
            time.sleep(0.005)
        return dict(self.told("answer"))

    # ---- texts ----

    def tell(self, name: str, value: Any) -> None:
        """Write a JSON value; what is too long for its place is cut to a text."""
        at, most = PLACES[name], TEXTS[name]
        data = json.dumps(value).encode()
        if len(data) > most - 8:
            data = json.dumps(str(value)[: most // 8]).encode()
        self.memory[at : at + 8] = bytes(8)
        self.memory[at + 8 : at + 8 + len(data)] = data
        self.memory[at : at + 8] = len(data).to_bytes(8, "little")

    def told(self, name: str) -> Any:
        """The value last written; None before, and while it is being written."""
        at = PLACES[name]
        size = int.from_bytes(self.memory[at : at + 8], "little")
        try:
            return json.loads(self.memory[at + 8 : at + 8 + size]) if size else None
        except ValueError:
            return None
