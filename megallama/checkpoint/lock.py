"""One job per checkpoint folder.

The lock is a file created atomically (hard link) that says who holds it: host, pid, start time.  A
holder touches it every few seconds.  A lock whose process has ended on this machine is taken over at
once; one from another machine (a job restarted elsewhere after a crash) once it has not been touched
for `LEASE_SECONDS`, watched by our own clock, so clocks need not agree.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from megallama.checkpoint.errors import CheckpointError

NAME = "lock"
LEASE_SECONDS = 60.0


def _process(pid: int) -> str | None:
    """The start time of a process in clock ticks since boot: with the pid, its identity. None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _machine() -> str:
    """Identity of this boot and pid namespace: where it is equal, a pid means the same process."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


class FolderLock:
    """The lock of one folder; `acquire`, `check` before each write, `release`."""

    def __init__(self, folder: Path, log: Callable[[str], None], lease_seconds: float = LEASE_SECONDS) -> None:
        self._path = folder / NAME
        self._log = log
        self._lease = lease_seconds
        self._mine: bytes | None = None
        self._stop = threading.Event()

    def acquire(self) -> None:
        """Take the lock. Raises: CheckpointError naming the job that holds it."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        me = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine()}
        mine = json.dumps(me | {"process": _process(os.getpid()), "since": now, "id": os.urandom(8).hex()}).encode()
        own = self._path.with_name(f"{NAME}.{os.urandom(8).hex()}")
        own.write_bytes(mine)
        try:
            while True:
                try:
                    os.link(own, self._path)
                    break
                except FileExistsError:
                    self._clear_stale()
        finally:
            own.unlink()
        self._mine = mine
        self._stop = threading.Event()
        threading.Thread(target=self._touch, args=(self._stop,), name="checkpoint-lock", daemon=True).start()

    def check(self) -> None:
        """Raises: CheckpointError if another job has taken the folder over."""
        if self._mine is not None and self._read() != self._mine:
            raise CheckpointError(f"{self._path} is no longer ours: {self._holder(self._read())} took the folder over")

    def release(self) -> None:
        """Give the lock back."""
        self._stop.set()
        if self._mine is not None and self._read() == self._mine:
            self._path.unlink()
        self._mine = None

    def _touch(self, stop: threading.Event) -> None:
        while not stop.wait(self._lease / 6):
            with suppress(OSError):  # `check` reports a lock that is gone
                os.utime(self._path)

    def _read(self) -> bytes:
        try:
            return self._path.read_bytes()
        except OSError:
            return b""

    def _holder(self, content: bytes) -> str:
        who = _parse(content)
        return f"the job on host {who.get('host')}, pid {who.get('pid')}, started {who.get('since')}"

    def _clear_stale(self) -> None:
        """Remove the lock if its job is gone. Raises: CheckpointError if it is not."""
        held = self._read()
        if not held:
            return  # released in this moment
        if self._alive(held):
            raise CheckpointError(
                f"{self._path.parent} is in use by {self._holder(held)[4:]}; stop that job or choose another "
                f"checkpoint.folder (if it is certainly gone, delete {self._path})"
            )
        aside = self._path.with_name(f"{NAME}.{os.urandom(8).hex()}")
        try:
            os.rename(self._path, aside)
        except FileNotFoundError:
            return
        if aside.read_bytes() != held:  # somebody else took it over between our look and the rename
            os.link(aside, self._path)
        else:
            self._log(f"took over the checkpoint folder from {self._holder(held)}, which has ended")
        aside.unlink()

    def _alive(self, held: bytes) -> bool:
        who = _parse(held)
        if who.get("machine") == _machine():
            return _process(int(who["pid"])) == who["process"]
        self._log(f"waiting up to {self._lease:g} s to see whether {self._holder(held)} still lives")
        first, deadline = self._touched(), time.monotonic() + self._lease
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._lease / 20))
            if self._read() != held or self._touched() != first:
                return True
        return False

    def _touched(self) -> int:
        try:
            with open(self._path, "rb") as file:  # opening asks a network file system for fresh attributes
                return os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return 0


def _parse(content: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(content))
    except ValueError:
        return {}
