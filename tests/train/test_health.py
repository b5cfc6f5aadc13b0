"""Signals, bad steps, and the vote of all ranks."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megallama.train.health import SIGNALS, BadSteps, SignalFlag, TrainingStopped, Vote


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_flag_and_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(s) for s in SIGNALS]
    with SignalFlag() as flag:
        assert flag.received is None
        os.kill(os.getpid(), number)
        assert flag.received == number
        os.kill(os.getpid(), signal.SIGUSR1)  # the first one stays
        assert flag.received == number
    assert [signal.getsignal(s) for s in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert not any(thread.name == "signals" for thread in threading.enumerate())


def test_outside_the_main_thread_it_does_nothing() -> None:
    before = [signal.getsignal(s) for s in SIGNALS]
    seen = []

    def run() -> None:
        with SignalFlag() as flag:
            seen.extend([flag.received, [signal.getsignal(s) for s in SIGNALS]])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [None, before]


CHILD = """
import sys, time
from megallama.train.health import SignalFlag
with SignalFlag(patience=float(sys.argv[1])) as flag:
    print("ready", flush=True)
    while flag.received is None:
        time.sleep(0.01)
    print(flag.received.name, flush=True)
    for line in sys.stdin:
        print("still here", flush=True)
"""


def start(patience: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(patience)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("first", "second"), [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGTERM"), ("SIGTERM", "SIGINT")])
def test_a_second_request_is_obeyed_at_once_by_dying_of_it(first: str, second: str) -> None:
    process = start(0.0)
    process.send_signal(signal.Signals[first])
    assert process.stdout and process.stdout.readline() == f"{first}\n"
    process.send_signal(signal.Signals[second])
    assert process.wait() == -signal.Signals[second]


def test_a_request_delivered_twice_is_one_request() -> None:
    process = start(600.0)
    assert process.stdin and process.stdout
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "SIGTERM\n"
    for number in (signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
    print("anybody?", file=process.stdin, flush=True)
    assert process.stdout.readline() == "still here\n"
    process.stdin.close()
    assert process.wait() == 0


def test_usr_signals_never_kill() -> None:
    process = start(0.0)
    assert process.stdin and process.stdout
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "SIGUSR1\n"
    for _ in range(20):
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGUSR2)
    process.send_signal(signal.SIGTERM)  # the first that asks to leave
    print("anybody?", file=process.stdin, flush=True)
    assert process.stdout.readline() == "still here\n"
    process.stdin.close()
    assert process.wait() == 0


STUCK = """
import ctypes
from megallama.train.health import SignalFlag
with SignalFlag(patience=0.0):
    print("ready", flush=True)
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # for ever, and no signal interrupts it: Python's handlers never run
"""


def test_a_process_stuck_outside_python_is_ended_by_the_second() -> None:
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert process.wait() == -signal.SIGTERM


def test_bad_steps_in_a_row_stop_the_run() -> None:
    bad = BadSteps(3)
    bad.record(40, True)
    bad.record(41, False)
    bad.record(42, False)
    bad.record(43, True)
    bad.record(44, False)
    bad.record(45, False)
    with pytest.raises(TrainingStopped) as stopped:
        bad.record(46, False, checkpoint=40)
    assert str(stopped.value) == (
        "loss or gradients were non-finite for 3 steps in a row (steps 44-46); last good step 43; resume from "
        "step 40 with a lower optimizer.lr or a longer lr_schedule.warmup_steps, "
        "or raise train.max_bad_steps=3"
    )
    assert bad.skipped == 5


def test_bad_from_the_start() -> None:
    with pytest.raises(TrainingStopped, match=r"\(step 1\); no step was good; no checkpoint exists: start again with"):
        BadSteps(1).record(1, False)


def test_overflows_that_a_smaller_scale_may_cure_do_not_stop_the_run() -> None:
    bad = BadSteps(2)
    for step in range(1, 9):
        bad.record(step, False, excused=True)
    assert (bad.skipped, bad.in_a_row, bad.last_good) == (8, 0, None)


def test_the_count_continues_after_a_resume() -> None:
    first = BadSteps(3)
    for step, finite in ((1, True), (2, False), (3, False)):
        first.record(step, finite)
    second = BadSteps(3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    with pytest.raises(TrainingStopped, match=r"\(steps 2-4\); last good step 1"):
        second.record(4, False)


def add(*votes: Vote) -> Vote:
    """What every rank holds after the sum."""
    return Vote.unpack([math.fsum(column) for column in zip(*(vote.pack() for vote in votes), strict=True)])


def test_votes_add_up() -> None:
    total = add(
        Vote.of(1.5, 4.0, finite=True, late=False, received=None),
        Vote.of(0.0, 5.0, finite=True, late=True, received=None),
    )
    assert (total.loss, total.norm_squared, total.finite, total.late_ranks) == (1.5, 9.0, True, 1)
    assert total.stop_reason == "train.stop_after_minutes is over"


def test_one_rank_decides_for_all() -> None:
    good = Vote.of(1.0, 1.0, finite=True, late=False, received=None)
    bad = Vote.of(math.nan, math.inf, finite=False, late=False, received=None)
    assert good.finite and good.stop_reason is None
    total = add(good, bad, bad, good)
    assert (total.finite, total.bad_ranks) == (False, 2)
    assert math.isnan(total.loss)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_on_any_rank_is_everybodys(number: signal.Signals) -> None:
    quiet = Vote.of(1.0, 1.0, finite=True, late=True, received=None)
    loud = Vote.of(1.0, 1.0, finite=True, late=False, received=number)
    assert add(quiet, loud).stop_reason == f"{number.name} on 1 rank"
    assert add(loud, quiet, loud).stop_reason == f"{number.name} on 2 ranks"


def test_the_module_needs_no_torch() -> None:
    code = "import sys, megallama.train.health; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
