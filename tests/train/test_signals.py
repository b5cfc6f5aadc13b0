"""Signals: noted, obeyed, ignored; before training, while it lasts, and on the way out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megallama.train.signals import SIGNALS, SignalFlag


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_flag_and_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(s) for s in SIGNALS]
    with SignalFlag() as flag:
        assert flag.received is None
        os.kill(os.getpid(), number)
        assert flag.received == number
        os.kill(os.getpid(), signal.SIGUSR1)  # the first one stays
        assert flag.received == number
        flag.leaving(75)
    assert [signal.getsignal(s) for s in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert not any(thread.name == "signals" for thread in threading.enumerate())


def test_a_request_is_told_while_training_lasts_too() -> None:
    heard: list[str] = []
    with SignalFlag() as flag:
        flag.phase, flag.asked = "training", heard.append
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 10
        while not heard and time.monotonic() < deadline:
            time.sleep(0.01)
    assert heard == ["SIGUSR1"]


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
from megallama.train.signals import SignalFlag
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
from megallama.train.signals import SignalFlag
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


def test_hangups_that_were_ignored_stay_ignored() -> None:
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalFlag() as flag:
            os.kill(os.getpid(), signal.SIGHUP)
            assert flag.received is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


def test_a_request_before_training_is_told() -> None:
    messages: list[str] = []
    with SignalFlag() as flag:
        flag.listen(messages.append)
        os.kill(os.getpid(), signal.SIGTERM)
        while not messages:
            time.sleep(0.01)
        assert messages == ["SIGTERM"] and flag.last_call() == "SIGTERM"
    early: list[str] = []
    with SignalFlag() as flag:
        os.kill(os.getpid(), signal.SIGHUP)
        flag.listen(early.append)
        assert "SIGHUP" in early and flag.last_call() == "SIGHUP"


def test_once_training_begins_a_request_is_only_noted() -> None:
    messages: list[str] = []
    with SignalFlag(telling=0.05) as flag:
        flag.listen(messages.append)
        assert flag.last_call() is None
        os.kill(os.getpid(), signal.SIGTERM)
        flag.phase = "training"
        flag.leave("too late")
        time.sleep(0.3)
        assert (flag.received, messages) == (signal.SIGTERM, [])


LEAVES = """
import ctypes, os, signal, sys, time
from megallama.train.signals import SignalFlag
with SignalFlag(patience=0.0, telling=0.2) as flag:
    if sys.argv[1] in ("alone", "nobody"):
        flag.before_leaving(lambda why, status: print(why, status, flush=True))
        flag.before_leaving(lambda *_: print("last act", flush=True))
        if sys.argv[1] == "alone":
            flag.listen(flag.leave)
        print("ready", flush=True)
        libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)  # for ever
    flag.last_call()
    flag.phase = "training"
    flag.leaving(75, for_good=True)
    print("ready", flush=True)
    if sys.argv[1] == "slow":
        sys.stdin.read()
print("out", flush=True)
sys.stdin.read()
sys.exit(75)
"""


def leaving(how: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LEAVES, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("how", ["alone", "nobody"])
def test_before_training_a_process_leaves_wherever_its_main_thread_is(how: str) -> None:
    """At once if it is alone; if the others cannot be told, without them."""
    process = leaving(how)
    process.send_signal(signal.SIGHUP)
    assert process.communicate()[0] == "SIGHUP 75\nlast act\n"
    assert process.returncode == 75


def test_who_insists_after_the_save_gets_its_status() -> None:
    process = leaving("slow")
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.05)
    assert process.wait() == 75


def test_nothing_kills_a_process_on_its_way_out() -> None:
    process = leaving("quick")
    assert process.stdout and process.stdout.readline() == "out\n"
    for number in SIGNALS:
        process.send_signal(number)
    process.communicate()
    assert process.returncode == 75


def test_the_module_needs_no_torch() -> None:
    code = "import sys, megallama.pretrain; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
