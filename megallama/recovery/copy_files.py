"""Files of copies in memory, for one user and one process at a time: in /dev/shm, or without a name."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any

from megallama.checkpoint.disk import opened
from megallama.train.signals import SAVED

SHM, PREFIX = Path("/dev/shm"), "megallama-copies-"
_FOLDER, _BUSY = 4096, 5.0  # bytes at the end of a file: the run's folder; seconds for a process to end that has it


class CopyFiles:
    """Those of one process: of its own rank, and of others. `shm`: the file system where they have names."""

    def __init__(self, shm: Path = SHM) -> None:
        self.shm = shm
        self.opened: dict[str, tuple[int, mmap.mmap]] = {}  # by name

    def open(self, folder: str, which: object, size: int, notes: list[str]) -> tuple[int, mmap.mmap]:
        """A file of `size` bytes or more, with what it had; `notes` are to be said. Raises: OSError."""
        name = name_of(folder, str(which))
        if (held := self.opened.get(name)) and len(held[1]) >= size:
            return held
        file, size, path, there = held[0] if held else -1, size + _FOLDER, self.shm / name, 0
        with opened(self.shm, os.O_RDONLY) as alone:  # else each of several processes would find the room of one
            fcntl.flock(alone, fcntl.LOCK_EX)
            notes += tidy(self.shm)
            with suppress(OSError):
                there = (os.fstat(file) if held else path.stat()).st_blocks * 512
            if size - there > (free := free_memory()):
                raise OSError(errno.ENOMEM, f"{size - there:,} bytes are needed, and {free:,} are free")
            at = os.statvfs(self.shm)
            try:
                file = file if held else _locked(path)
                if size - there > at.f_bavail * at.f_frsize:
                    path.unlink(missing_ok=True)
                    os.close(file)
                    raise OSError(errno.ENOSPC, f"{at.f_bavail * at.f_frsize:,} bytes are free of {size:,} needed")
            except OSError as error:
                text = "warning: copies in memory have no name, and do not outlive their supervisor"
                notes.append(f"{text}: {path}: {error.strerror}")
                file = os.memfd_create(name)
            os.posix_fallocate(file, 0, size)
        memory = mmap.mmap(file, size)
        memory[-_FOLDER:] = folder.encode()[:_FOLDER].ljust(_FOLDER, b"\0")
        self.opened[name] = file, memory
        return file, memory

    def drop(self) -> None:
        """Close and remove them."""
        for name, (file, _) in self.opened.items():
            with suppress(OSError):
                if os.fstat(file).st_nlink:
                    (self.shm / name).unlink()
            os.close(file)
        self.opened.clear()


def name_of(folder: str, which: str) -> str:
    """The name of the file of a rank, or of its copy for a buddy, of the run in `folder`."""
    return f"{PREFIX}{hashlib.sha256(folder.encode()).hexdigest()[:12]}-{which}"


def free_memory() -> int:
    """Bytes of this machine that nobody uses."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


def is_over(ending: Mapping[str, Any]) -> bool:
    """Whether nobody goes on from the copies of a run that ended so: all is done, or is saved."""
    return ending["status"] == 0 or (ending["status"] == SAVED and ending["step"] > 0)


def tidy(shm: Path) -> list[str]:
    """Remove the files of runs that are over, or whose folder is gone, but none that a process has; a line for each."""
    done = []
    for path in sorted(shm.glob(f"{PREFIX}*")):
        with suppress(OSError), opened(path, os.O_RDWR | os.O_NOFOLLOW) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            text = os.pread(file, _FOLDER, max(0, os.fstat(file).st_size - _FOLDER)).rstrip(b"\0")
            folder, over = Path(text.decode(errors="replace")), False
            with suppress(OSError, ValueError, LookupError, TypeError):
                over = is_over(json.loads((folder / "exit.json").read_text()))
            if over or not folder.is_dir():
                path.unlink()
                done.append(f"removed {path}: the run in {folder} is {'over' if over else 'gone'}")
    return done


def why_not(said: dict[str, Any], key: dict[str, Any], now: dict[str, Any]) -> str:
    """Why a copy is not gone on from; empty where it is. `now`: chain and newest step beside it on disk, what voids."""
    step, newest = said["step"], now["newest"]
    for name in key:
        if said["key"].get(name) != key[name]:
            return f"its {name} was {said['key'].get(name)} and is {key[name]}"
    if now["resume"] in ("fresh", "previous"):
        return f"checkpoint.resume={now['resume']}"
    if newest is not None and step <= newest:
        return f"the checkpoint of step {newest} is as new"
    if said["chain"] != now["chain"]:
        return "the run has gone on from somewhere else since"
    if newest not in said["after"]:
        last = next((f"step {step}" for step in reversed(said["after"]) if step is not None), "none")
        return f"it was made after the checkpoint of {last}, and the newest is of step {newest}"
    return ""


def _locked(path: Path) -> int:
    """Open for this process alone, and this user's. Raises: OSError."""
    deadline = time.monotonic() + _BUSY
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            at = os.fstat(file)
            if not S_ISREG(at.st_mode) or at.st_uid != os.geteuid() or at.st_mode & 0o077:
                os.close(file)
                raise PermissionError(errno.EPERM, "it is not this user's alone")
            if at.st_nlink:  # else it was removed meanwhile
                return file
        os.close(file)
        if time.monotonic() >= deadline:
            raise OSError(errno.EBUSY, "another process has it")
        time.sleep(0.05)
