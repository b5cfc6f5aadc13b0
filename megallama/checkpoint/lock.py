"""One job per checkpoint folder.

The lock is a file created atomically (hard link) that says who holds it; a holder touches it every few
seconds. One whose process has ended on this machine is taken over at once; one from another machine, or
that does not say whose it is, once it has not been touched for `LEASE_SECONDS` of our own clock. One that
cannot be opened gets three times as long, for of such a network file system may show old times.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from megallama.checkpoint import disk
from megallama.checkpoint.disk import CheckpointError, DamagedError

NAME = "lock"
LEASE_SECONDS = 60.0
LOCK_BYTES = 1 << 16  # more is read of none


class _Seen(NamedTuple):
    """A lock at one time; two looks differ if somebody has touched it meanwhile."""

    content: bytes | None  # None: it cannot be opened
    inode: int
    modified_ns: int
    uid: int

    @property
    def job(self) -> dict[str, Any]:
        """What it says; nothing if it is not the content of a lock."""
        try:
            return disk.parse_object(self.content or b"")
        except ValueError:
            return {}

    def __str__(self) -> str:
        if "host" in (job := self.job):
            return f"the job on host {job['host']}, pid {job.get('pid')}, started {job.get('since')}"
        what = "cannot be opened" if self.content is None else f"holds {len(self.content)} bytes that name nobody"
        return f"an unknown job of user id {self.uid} (the lock {what})"


def every(seconds: float, work: Callable[[], None]) -> threading.Event:
    """Call `work` again and again in a thread, until the event is set."""
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(seconds):
            work()

    threading.Thread(target=loop, name="checkpoint-timer", daemon=True).start()
    return stop


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
    """The lock of one folder."""

    def __init__(self, folder: Path, log: Callable[[str], None], lease_seconds: float = LEASE_SECONDS) -> None:
        self._path, self._log, self._lease = folder / NAME, log, lease_seconds
        self._own: bytes | None = None
        self._stop = threading.Event()
        self.lost = False  # another job was seen to hold the folder

    def acquire(self) -> None:
        """Take the lock. Raises: CheckpointError naming the job that holds it; OSError."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        job = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine()}
        own = json.dumps(job | {"process": _process(os.getpid()), "since": now, "id": os.urandom(8).hex()}).encode()
        while not self._link(own):
            self._clear_stale()
        self._own, self._stop = own, every(self._lease / 6, self._touch)

    def check(self) -> None:
        """See before a save that the lock is still ours; one that was removed is made again.

        Raises: CheckpointError if another job has the folder now (`lost`); UnreadableError; OSError.
        """
        if self._own is None:
            return
        try:
            found = disk.read_file(self._path, LOCK_BYTES)
        except disk.MissingError:
            self._log(f"warning: {self._path} was removed while this run holds the folder; it is made again")
            self._path.parent.mkdir(parents=True, exist_ok=True)
            found = self._own if self._link(self._own) else b""
        except DamagedError:  # a folder in its place, or a large file
            found = b""
        if found != self._own:
            self.lost = True
            holder = _look(self._path) or "another job"
            raise CheckpointError(f"{self._path} is no longer ours: {holder} took the folder over")

    def release(self) -> None:
        """Give the lock back."""
        self._stop.set()
        with suppress(OSError):  # one that stays is taken over, for this process has ended by then
            if self._own is not None and (seen := _look(self._path)) and seen.content == self._own:
                self._path.unlink()
        self._own = None

    def _touch(self) -> None:
        with suppress(OSError):  # `check` makes again what is gone
            os.utime(self._path)

    def _link(self, content: bytes) -> bool:
        """Whether there was no lock, so that it is ours now."""
        new = self._path.with_name(f"{NAME}.{os.urandom(8).hex()}")
        try:
            disk.write_durably(new, content)  # first: no power failure leaves it empty
            os.link(new, self._path)
        except FileExistsError:
            seen = _look(self._path)
            return seen is not None and seen.content == content  # the first answer was lost
        finally:
            new.unlink(missing_ok=True)
        return True

    def _clear_stale(self) -> None:
        """Remove the lock if its job is gone. Raises: CheckpointError if it is not; OSError."""
        held = _look(self._path)
        if held is None:
            time.sleep(0.05)  # released, or not yet shown by a network
            return
        if (now := self._living(held)) is not None:
            raise CheckpointError(
                f"{self._path.parent} is in use by {str(now).removeprefix('the ')}; stop that job or choose "
                f"another checkpoint.folder (if it is certainly gone, delete {self._path})"
            )
        aside = self._path.with_name(f"{NAME}.{os.urandom(8).hex()}")
        try:
            os.rename(self._path, aside)
        except FileNotFoundError:
            return
        if _look(aside) != held:  # touched, or another one's, since our last look
            with suppress(FileExistsError):
                os.link(aside, self._path)
        else:
            self._log(f"took over the checkpoint folder from {held}, which has ended")
        try:
            aside.unlink()
        except OSError:  # not a file: not ours to delete
            self._log(f"what was in the lock's place is now {aside}")

    def _living(self, held: _Seen) -> _Seen | None:
        """The lock as it is when its job has shown to be alive; None if it has not."""
        machine, pid, process = (held.job.get(key) for key in ("machine", "pid", "process"))
        if machine == _machine() and type(pid) is int and isinstance(process, str):
            return held if _process(pid) == process else None
        seconds = self._lease * (3 if held.content is None else 1)
        self._log(f"waiting up to {seconds:g} s to see whether {held} still lives")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._lease / 20))
            if (now := _look(self._path)) != held:
                return now
        return None


def _look(path: Path) -> _Seen | None:
    """A lock, or whatever is in its place; None if there is nothing. Raises: OSError."""
    try:
        at = os.lstat(path)
    except FileNotFoundError:
        return None
    content = None
    if stat.S_ISREG(at.st_mode):
        with suppress(OSError), disk.opened(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW) as fd:
            content, at = os.read(fd, LOCK_BYTES), os.fstat(fd)  # opened: as the server has it
    return _Seen(content, at.st_ino, at.st_mtime_ns, at.st_uid)
