"""Signals that ask the run to stop, from the first line of the program to its last.

Before training has begun nothing is worth saving: a request interrupts the main thread wherever it is, and ends the
process where it does not come back in time.  Then it is only noted, and the next step's vote tells all ranks.  Once
the exit status is known a repeated request changes it no more.  Imports no torch: it is installed before that is.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal

from megallama.comm.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
SAVED = 75  # exit status: stopped as asked, with everything saved there is; the same command continues
_INSIST = (signal.SIGTERM, signal.SIGINT)  # a second one of these is obeyed at once

Phase = Literal["setting up", "about to train", "training", "leaving"]


class SignalFlag:
    """While installed, a signal of `SIGNALS` sets `received` instead of killing the process.

    A second SIGTERM or SIGINT ends the process at once by that signal, even where the main thread is
    stuck in a collective: a thread watches for it.  Launchers deliver one request twice in quick
    succession (Slurm and torchrun both forward SIGTERM), so a second one counts only `patience`
    seconds after the first.  SIGHUP stays ignored where it was (nohup).  Use as a context manager.
    Outside the main thread, where Python cannot handle signals, it does nothing.

    telling: seconds for `listen`'s function to reach the other ranks; grace: seconds for the main thread to come back.
    """

    def __init__(self, patience: float = 2.0, *, telling: float = 6.0, grace: float = 2.0) -> None:
        self.received: signal.Signals | None = None
        self.phase: Phase = "setting up"
        self.why: str | None = None  # in words, once set-up is to stop
        self._patience, self._telling, self.grace = patience, telling, grace
        self._lock = threading.RLock()  # held where the phase changes, and where it decides
        self._tell: Callable[[str], None] | None = None
        self._deadline: float | None = None  # then set-up stops (`why` is None), or the process leaves
        self._last: list[Callable[[], None]] = []
        self.status, self._for_good = SAVED, False
        self._raised = False
        self._old: dict[signal.Signals, Any] = {}
        self._pipe: tuple[int, int] = (-1, -1)
        self._old_wakeup = -1
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> SignalFlag:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._watcher.start()
        self._old_wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._watcher is None:
            return
        for number, handler in self._old.items():
            signal.signal(number, signal.SIG_IGN if self._for_good else handler)
        signal.set_wakeup_fd(self._old_wakeup)
        os.write(self._pipe[1], b"\0")  # no signal has number 0: the watcher leaves
        self._watcher.join()
        self._watcher = None
        for end in self._pipe:
            os.close(end)

    # ---- before training ----

    def listen(self, tell: Callable[[str], None]) -> None:
        """While set-up lasts a request calls `tell` with its name, in another thread; one that has come, now."""
        self._tell = tell
        if self.received is not None:
            tell(self.received.name)

    def stop(self, why: str, status: int = SAVED) -> None:
        """Stop setting up, from any thread, with this exit status; does nothing once training has begun."""
        with self._lock:
            if self._watcher is None or self.why is not None or self.phase not in ("setting up", "about to train"):
                return
            self.why, self.status, self._deadline = why, status, time.monotonic() + self.grace
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)  # `_note` raises

    def before_leaving(self, act: Callable[[], None]) -> None:
        """`act` is done by a process that leaves without its main thread, which does it otherwise."""
        self._last.append(act)

    def last_call(self) -> str | None:
        """Why to stop, if anybody has asked; else requests are left to the first step's vote from here on."""
        with self._lock:
            why = self.why or (self.received.name if self.received else None)
            if why is None:
                self.phase = "about to train"
            return why

    def begin_training(self) -> None:
        """All ranks have answered their `last_call`, with None."""
        with self._lock:
            self.phase = "training"

    # ---- after it ----

    def leaving(self, status: int, *, for_good: bool = False) -> None:
        """What was to be done is done: whoever insists from here on gets this exit status.

        for_good: the process ends with the flag, and the previous handlers do not come back to kill it before.
        """
        with self._lock:
            self.phase, self.status, self._for_good = "leaving", status, for_good

    # ---- both ----

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.why is not None and not self._raised:
            self._raised, self._deadline = True, time.monotonic() + 10 * self.grace  # rank 0 waits for the others
            raise Stopped(self.why, self.status)
        if self.received is None:
            self.received = signal.Signals(number)

    def _watch(self) -> None:
        """Read the number of every signal as it arrives; do what cannot wait for the main thread."""
        first: float | None = None  # when the first that insists arrived
        arrival = select.poll()
        arrival.register(self._pipe[0], select.POLLIN)
        while True:
            left = None if self._deadline is None else max(0.0, 1000 * (self._deadline - time.monotonic()))
            if not arrival.poll(left):
                self._too_late()
                continue
            for number in os.read(self._pipe[0], 64):
                if number == 0:
                    return
                now = time.monotonic()
                if number in _INSIST:
                    if first is not None and now - first >= self._patience:
                        self._obey(number)
                    first = first if first is not None else now
                self._request(signal.Signals(number), now)

    def _request(self, number: signal.Signals, now: float) -> None:
        """The first request: told to the other ranks if nothing is to be saved yet."""
        with self._lock:
            if self._deadline is not None or self.why is not None:
                return
            self.received = self.received or number  # where the main thread is busy its handler runs late
            if self.phase != "setting up":
                return
            self._deadline = now + self._telling
        if self._tell is not None:
            self._tell(number.name)

    def _too_late(self) -> None:
        with self._lock:
            before, why = self.phase in ("setting up", "about to train"), self.why
            if self._deadline is None or time.monotonic() < self._deadline:
                return
            self._deadline = None
        if before and why is not None:
            for act in self._last:
                act()
            os._exit(self.status)
        if before and self.received is not None:  # nobody could be told
            self.stop(self.received.name)

    def _obey(self, number: int) -> None:
        """End the process, by a signal's default action if nothing is done yet: as it would have without a handler."""
        if self.phase == "leaving":
            os._exit(self.status)
        libc = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        libc.signal(number, None)  # SIG_DFL is the null pointer; `signal.signal` works in the main thread only
        os.kill(os.getpid(), number)
