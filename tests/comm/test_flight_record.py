"""What another process reads of a rank."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest
import torch

from megallama.comm import flight_record
from megallama.comm.flight_record import BUSY, CALLS, COMPLETED, LAUNCHED, STEPS, FlightRecord
from megallama.comm.stream_record import StreamRecord
from megallama.recovery.flight_reader import FlightReader
from tests.pool import Pool


def two() -> tuple[FlightRecord, FlightReader]:
    """The writer's and the reader's view of one file."""
    file = FlightRecord.create()
    return FlightRecord(file), FlightReader(os.dup(file))


def test_a_reader_sees_where_a_rank_stands() -> None:
    own, seen = two()
    assert own.watched and not FlightRecord().watched
    assert seen.state()["phase"] == "setting up" and seen.state()["step"] == 0 and "wait" not in seen.state()
    tp, dp = own.add_group("tp", (0, 1)), own.add_group("dp", [0, 2])
    own.at(step=3, phase="forward_backward")
    own.action("B", 1, 2)
    own.layer(7)
    first = own.begins(tp, "all_reduce", 8, 64)
    own.begins(dp, "reduce_scatter", 16, 128)
    own.waits(first)
    time.sleep(0.02)
    state = seen.state()
    assert [state[k] for k in ("step", "phase", "action", "stage", "microbatch", "layer")] == [
        3, "forward_backward", "B", 1, 2, 7,
    ]  # fmt: skip
    assert state["counts"] == {"tp": 1, "dp": 1}
    wait = state["wait"]
    assert 0.02 <= wait.pop("seconds") < 5
    assert wait == {
        "number": 1, "group": "tp", "ranks": [0, 1], "operation": "all_reduce", "rows": 8, "bytes": 64, "peer": -1,
        "done": False,
    }  # fmt: skip
    own.arrived(first)
    assert "wait" not in seen.state()
    assert [(c["group"], c["done"]) for c in seen.calls()] == [("tp", True), ("dp", False)]
    own.action("")
    state = seen.state()
    assert [state[key] for key in ("action", "stage", "microbatch", "layer")] == ["", 0, 0, -1]


def test_the_last_calls_are_kept_in_order() -> None:
    own, seen = two()
    group = own.add_group("world", range(4))
    for n in range(CALLS + 10):
        own.begins(group, "send", n, 8, peer=3)
    calls = seen.calls()
    assert [c["number"] for c in calls] == [*range(11, CALLS + 11)] and calls[0]["rows"] == 10
    assert calls[-1]["peer"] == 3


def test_own_work_leaves_waits_out() -> None:
    own, seen = two()
    place = own.begins(own.add_group("tp", (0, 1)), "all_gather", 1, 8)
    own.work_begins()
    own.waits(place)
    time.sleep(0.2)
    own.arrived(place)
    own.work_done()
    assert 0 < seen.busy()[0] < 0.1e9
    for _ in range(BUSY + 5):
        own.work_begins()
        own.work_done()
    assert len(seen.busy()) == BUSY and seen.words[STEPS] == BUSY + 6


def test_texts() -> None:
    own, seen = two()
    assert seen.told("cause") is None
    own.ends(4, "ValueError: no")
    own.ends(1, "later")
    assert seen.told("cause") == {"status": 4, "text": "ValueError: no", "echo": False, "final": False}
    own.tell("verdict", {"text": "x" * (1 << 20)})  # is cut, and its neighbours stay
    assert isinstance(seen.told("verdict"), str) and seen.told("cause")["status"] == 4
    own.memory[flight_record.PLACES["cause"] + 8] = 0  # half written
    assert seen.told("cause") is None


@pytest.mark.parametrize("name", flight_record.TEXTS)
def test_a_text_may_fill_its_place_and_no_more(name: str) -> None:
    own, seen = two()
    most = flight_record.TEXTS[name] - 8  # its length stands before it
    fits = "x" * (most - 2)  # and two quotes around it
    own.tell(name, fits)
    assert seen.told(name) == fits
    own.tell(name, fits + "y")
    assert seen.told(name) == fits[: (most + 8) // 8]
    after = sorted(flight_record.PLACES.values())
    assert [b - a for a, b in zip(after, after[1:], strict=False)] == [*flight_record.TEXTS.values()][:-1]


def test_of_the_last_trainer_only_what_lasts_is_kept() -> None:
    own, _ = two()
    for word in range(flight_record.WORDS):
        own.words[word] = word + 1
    own.begin_again()
    kept = {word: number for word, number in enumerate(own.words) if number}
    names = ("BEAT", "PORT", "LAUNCHER", "SUPERVISOR", "GENERATION", "ASKED", "ANSWERED", "SPARE")
    assert kept == {(word := getattr(flight_record, name)): word + 1 for name in names}


def test_time_in_waits_adds_up_and_a_layer_is_where_the_rank_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    own, seen = two()
    clock = iter([100, 130, 130, 200, 200, 205, 300, 300, 330, 330, 340, 400])
    monkeypatch.setattr(time, "monotonic_ns", lambda: next(clock))
    own.clock = time.monotonic_ns
    place = own.begins(own.add_group("tp", (0, 1)), "all_gather", 1, 8)  # at 100
    own.waits(place)
    own.arrived(place)
    assert own.words[flight_record.WAITED] == 70
    own.work_begins()
    own.waits(place)
    own.arrived(place)
    assert own.words[flight_record.WAITED] == 100 and own.words[flight_record.SINCE] == 0
    own.work_done()  # at 340, begun at 205; 30 of them waited
    assert seen.busy() == [105]
    own.layer(4)
    assert own.words[flight_record.LAYER] == 4
    own.action("F", 2, 3)
    assert own.words[flight_record.LAYER] == -1 and own.words[flight_record.CHANGED] == 400


def test_on_shared_cores_own_work_is_what_the_thread_computes() -> None:
    """Not the time in which others have the core, as a sleep is here; nor what it computes in a wait."""
    own, seen = two()

    def compute(seconds: float) -> None:
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            pass

    for own.clock in (time.monotonic_ns, time.thread_time_ns):
        own.work_begins()
        compute(0.02)
        time.sleep(0.1)
        place = own.begins(own.add_group("tp", (0, 1)), "all_gather", 1, 8)
        own.waits(place)
        compute(0.05)
        own.arrived(place)
        own.work_done()
    wall, cpu = seen.busy()
    assert wall >= 0.12e9 and 0.02e9 <= cpu < 0.04e9


def test_ranks_that_share_cores_are_compared_by_their_cpu_time(pool: Pool) -> None:
    shares = 4 > len(os.sched_getaffinity(0))
    assert pool.run(4, "tests.comm.operations:takes_turns") == [(shares, shares)] * 4


def test_a_question_waits_for_its_answer_but_not_for_ever() -> None:
    own, seen = two()
    own.words[flight_record.SUPERVISOR], own.words[flight_record.LIMIT] = os.getpid(), int(0.3e9)
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        began = time.monotonic()
        assert own.ask(do="open") == {"problem": "the supervisor has not answered for 0.3 s"}
        assert 0.3 <= time.monotonic() - began < 3 and own.words[flight_record.ASKED] == 1

        def answer() -> None:
            while own.words[flight_record.ASKED] != 2:
                time.sleep(0.001)
            own.tell("answer", {"problem": "", **own.told("asked")})
            own.words[flight_record.ANSWERED] = 2

        own.words[flight_record.LIMIT] = 0  # the longest wait is not known yet
        thread = threading.Thread(target=answer)
        thread.start()
        assert own.ask(do="meet", size=3) == {"problem": "", "do": "meet", "size": 3}
        thread.join()
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert json.loads(json.dumps(seen.told("asked"))) == {"do": "meet", "size": 3}


def test_more_groups_than_there_is_room_for_share_the_last_place() -> None:
    own, seen = two()
    numbers = [own.add_group(f"g{n}", (0,)) for n in range(flight_record.MAX_GROUPS + 3)]
    assert max(numbers) == flight_record.MAX_GROUPS - 1 and len(set(numbers)) == flight_record.MAX_GROUPS
    own.begins(numbers[-1], "send", 1, 1)
    assert len(seen.state()["counts"]) == flight_record.MAX_GROUPS


class Event:
    """A CUDA event whose time is what `clock` says, and that has come at once."""

    clock = 0.0
    come = True

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self, stream: object) -> None:
        self.at = Event.clock

    def query(self) -> bool:
        return Event.come

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


class Driver:
    """The CUDA runtime, which registers host memory or does not."""

    def __init__(self, answer: int) -> None:
        self.answer = answer

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802 - its name there
        return self.answer


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Driver(0))


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_the_stream_says_what_is_completed() -> None:
    own, seen = two()
    record = StreamRecord(own, torch.device("cpu"))
    record.action("F", 0, 0)
    assert (seen.words[LAUNCHED], seen.words[COMPLETED]) == (1, 0)
    record.action("")
    assert (seen.words[LAUNCHED], seen.words[COMPLETED]) == (2, 2)  # a device of this test is never behind
    record.waits(0)
    assert "wait" not in seen.state()  # the host does not wait


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_own_work_is_taken_by_events_a_step_later() -> None:
    own, seen = two()
    record = StreamRecord(own, torch.device("cpu"))
    for waited in (3.0, 5.0):
        record.work_begins()
        record.waits(0)
        Event.clock += waited
        record.arrived(0)
        Event.clock += 10.0  # ms
        record.work_done()
    assert seen.busy() == [10_000_000]
    Event.come = False  # the device is more than a step behind: that step is left out
    record.work_begins()
    record.work_done()
    Event.come = True
    assert seen.busy() == [10_000_000]


def test_memory_that_cannot_be_registered_is_not_copied_into(monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Driver(1))
    own, seen = two()
    record = StreamRecord(own, torch.device("cpu"))
    record.action("F", 0, 0)
    record.action("")
    assert seen.words[COMPLETED] == 0
