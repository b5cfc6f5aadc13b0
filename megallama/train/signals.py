"""Signals that ask the run to stop, from the first line of the program to its last.

Before training all ranks are told, and end where they stand; then the next step's consensus tells.
"""

import ctypes  # and no torch, whose import takes seconds
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal, Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
FINISHED, SAVED = 0, 75  # exit statuses: all steps are done; stopped as asked, the same command continues
STACKS = signal.SIGRTMIN + 9  # the supervisor asks where all threads stand, which is told in C
FAILED = 4  # exit status: something failed after steps had been made
_INSIST = (signal.SIGTERM, signal.SIGINT)  # a second is obeyed even if the main thread is stuck


class SignalFlag:
    """While installed, a signal of `SIGNALS` sets `received` instead of killing the process.

    patience: seconds before a second one counts: Slurm and torchrun both forward one request.
    telling: seconds in which the others can be told before training; then it leaves without them.
    """

    def __init__(self, patience: float = 2.0, telling: float = 6.0) -> None:
        self.received: signal.Signals | None = None
        self.phase: Literal["setting up", "about to train", "training", "leaving"] = "setting up"
        self._patience, self._telling = patience, telling
        self._deciding = threading.Lock()  # where the phase changes, and where it is asked for
        self._ending = threading.Lock()  # never given back: the process ends with it
        self._tell: Callable[[str], None] | None = None
        self._acts: list[Callable[[str, int], object]] = []
        self.asked: Callable[[str], object] = lambda name: None  # in a thread, when a request comes
        self._status, self._for_good = SAVED, False
        self._old: dict[signal.Signals, Any] = {}
        self._pipe: tuple[int, int] = (-1, -1)
        self._old_wakeup = -1
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._watcher.start()
        self._old_wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                self._old[number] = signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # with a supervisor they wait until now
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

    def listen(self, tell: Callable[[str], None]) -> None:
        """While set-up lasts a request calls `tell` with its name; one that has come, now."""
        self._tell = tell
        if self.received is not None:
            tell(self.received.name)

    def before_leaving(self, act: Callable[[str, int], object]) -> None:
        """`act` is done, with reason and status, before `leave` ends the process."""
        self._acts.append(act)

    def leave(self, why: str, status: int = SAVED) -> None:
        """End the process now, whatever its main thread does, but not once training began."""
        if self.phase in ("training", "leaving") or self._watcher is None:
            return
        self._ending.acquire()
        try:
            for act in self._acts:
                act(why, status)
        finally:
            os._exit(status)

    def last_call(self) -> str | None:
        """The request that has come; from here on the consensus of a step tells of one."""
        with self._deciding:
            if self.received is None:
                self.phase = "about to train"
            return self.received.name if self.received else None

    def leaving(self, status: int, *, for_good: bool = False) -> None:
        """All is done: who insists gets this status; `for_good`: no handler comes back."""
        self.phase, self._status, self._for_good = "leaving", status, for_good

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)

    def _watch(self) -> None:
        """Read the number of every signal; do what cannot wait for the main thread."""
        first = 0.0  # when the first that insists arrived
        while data := os.read(self._pipe[0], 64):
            for number in data:
                if number == 0:
                    return
                if number in _INSIST:
                    if first and time.monotonic() - first >= self._patience:
                        self._obey(number)
                    first = first or time.monotonic()
                self._request(signal.Signals(number))

    def _request(self, number: signal.Signals) -> None:
        threading.Thread(target=self.asked, args=[number.name], daemon=True).start()
        with self._deciding:
            self.received = self.received or number  # a busy main thread runs its handler late
            if self.phase != "setting up":
                return
        alone = threading.Timer(self._telling, self.leave, [number.name])
        alone.daemon = True
        alone.start()
        if self._tell is not None:
            self._tell(number.name)

    def _obey(self, number: int) -> None:
        """End the process, by the signal's default action if nothing is done yet."""
        if self.phase == "leaving":
            os._exit(self._status)
        libc = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        libc.signal(number, None)  # SIG_DFL; `signal.signal` works in the main thread only
        os.kill(os.getpid(), number)
