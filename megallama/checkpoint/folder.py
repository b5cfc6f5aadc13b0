"""The folder of a run's checkpoints: its lock, what is in it, cleaning up, choosing.

    step-00001000                        a checkpoint
    step-00001000.damaged, .damaged-2    quarantined: its bytes are not what was saved
    step-00001000.megallama-unfinished   being written or deleted: removed at the next start
    step-00001000.megallama-replaced     making way for the same step: restored if that is missing
    latest                               a hint for people
    lock                                 says who holds the folder

Earlier versions wrote ``.tmp`` and ``.old``, as people do: only what a crash left is touched.
"""

import json
import os
import re
import shutil
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from math import inf
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from megallama.checkpoint import disk, manifest
from megallama.checkpoint.disk import CheckpointError, DamagedError, MissingError, UnreadableError
from megallama.comm.group import Assembly, on_all_ranks
from megallama.config.load import NOTHING, Begun
from megallama.config.schema import Config

T = TypeVar("T")
UNFINISHED, REPLACED, DAMAGED = ".megallama-unfinished", ".megallama-replaced", ".damaged"
LOCK = "lock"
LEASE_SECONDS = 60.0  # of our own clock, so clocks need not agree
LOCK_BYTES = 1 << 16  # more is read of none
_STEP = re.compile(r"step-\d{8,}")


def unfinished(path: Path) -> Path:
    """The name of what is not complete, or no longer."""
    return path.with_name(path.name.removesuffix(REPLACED) + UNFINISHED)


class Brief(NamedTuple):
    """What choosing among checkpoints needs of a manifest."""

    sequence: int
    step: int
    lineage: str


@lru_cache(maxsize=4096)  # that of a large model takes long; it is read again if it changes
def _brief(path: Path, inode: int, size: int, modified_ns: int) -> Brief:
    saved = manifest.read_manifest(path)
    return Brief(saved.sequence, saved.step, saved.lineage)


def checkpoints(folder: Path) -> dict[Path, Brief | CheckpointError]:
    """What the manifest of every step folder says, or why not. Raises: UnreadableError."""
    paths = [folder / name for name in disk.names(folder) if _STEP.fullmatch(name)]
    return {path: _brief_of(path) for path in paths if not path.is_file()}


def _brief_of(path: Path) -> Brief | CheckpointError:
    try:
        at = disk.patiently(os.stat, path / manifest.NAME)
        return _brief(path, at.st_ino, at.st_size, at.st_mtime_ns)
    except CheckpointError as error:
        return error


def known(folder: Path) -> list[tuple[Brief, Path]]:
    """Those with a good manifest, in the order of their saves. Raises: UnreadableError."""
    return sorted((b, path) for path, b in checkpoints(folder).items() if isinstance(b, Brief))


def newest_step(folder: Path, log: Callable[[str], None]) -> Path | None:
    """The last save, only looking; `log` hears of damaged ones. Raises: UnreadableError."""
    found = checkpoints(folder)
    for path, brief in found.items():
        if isinstance(brief, DamagedError):
            log(f"{path} is left out: {brief}")
        elif isinstance(brief, CheckpointError):
            raise brief
    return max(((b, path) for path, b in found.items() if isinstance(b, Brief)), default=(None, None))[1]


def step_folder(folder: Path) -> Path | None:
    """The step folder that `folder` is, or is the model/ of; None if it is neither."""
    candidates = (folder, folder.parent) if folder.name == "model" else (folder,)
    return next((c for c in candidates if disk.exists(c / manifest.NAME)), None)


def find_checkpoint(path: Path, log: Callable[[str], None] = lambda text: None) -> Path:
    """The step folder that `path` is, is in, or has as its newest; else `path`."""
    return step_folder(path) or newest_step(path, log) or newest_step(path / "checkpoints", log) or path


def before(config: Config) -> manifest.Manifest | None:
    """Of the checkpoint that a run would go on from, its own or another's; None: none can be read."""
    own, other = config.checkpoint.folder, config.checkpoint.continue_from
    with suppress(CheckpointError):
        fresh = own is None or config.checkpoint.resume == "fresh"
        step = None if fresh else newest_step(Path(str(own)), lambda text: None)
        if step or other is not None:
            return manifest.read_manifest(step or find_checkpoint(Path(str(other))))
    return None


def begun(config: Config) -> Begun:
    """What lies behind that checkpoint."""
    saved = before(config)
    if saved is None or not saved.counters.get("samples"):
        return NOTHING
    samples = int(saved.counters["samples"])
    return saved.step, samples, saved.counters.get("tokens_read", samples * saved.config["batch"]["seq_length"])


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint so that no moment shows half of it under its name."""
    trash = unfinished(folder)
    _remove(trash)
    os.rename(folder, trash)
    _remove(trash)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def recover_folder(folder: Path) -> list[str]:
    """Clean up after a crash; a line for all that is done. Raises: UnreadableError; OSError."""
    done = []
    for name in disk.names(folder):
        path, (stem, suffix) = folder / name, os.path.splitext(name)
        if suffix not in (UNFINISHED, REPLACED, ".old", ".tmp") or not (_STEP.fullmatch(stem) or stem == "latest"):
            continue
        if suffix == UNFINISHED or suffix == ".tmp" and _left_by_an_earlier_version(path):
            _remove(path)
            done.append(f"removed {name}, which was not finished")
        elif not disk.exists(folder / stem) and (
            suffix == REPLACED or suffix == ".old" and not isinstance(_brief_of(path), DamagedError)
        ):
            os.rename(path, folder / stem)
            done.append(f"restored {stem}, whose replacement was not finished")
        elif suffix == REPLACED:
            _remove(path)
            done.append(f"removed {name}, in whose place {stem} is")
        else:
            done.append(f"left {name} alone: it is not what a crash leaves; is it yours?")
    return done


def _left_by_an_earlier_version(path: Path) -> bool:
    """Whether this is an unfinished hint or save: files of the optimizer, no manifest yet."""
    if not path.is_dir() or path.is_symlink():
        return path.name == "latest.tmp" and path.is_file() and path.stat().st_size < 20
    parts = {p.relative_to(path).parts[0] for p in path.rglob("*") if not p.is_dir()}
    return parts in (set(), {"optimizer"}, {"model", "optimizer"})


class _Seen(NamedTuple):
    """A lock at one time; two looks differ if somebody has touched it meanwhile."""

    content: bytes | None  # None: it cannot be opened
    inode: int
    modified_ns: int
    uid: int

    @property
    def job(self) -> dict[str, Any]:
        with suppress(ValueError):
            return disk.parse_object(self.content or b"")
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


def under_way() -> dict[Any, str]:
    """What threads do in disk.py and writer.py: frame -> function, its file."""
    calls = {}
    for frame in sys._current_frames().values():
        if os.path.basename(frame.f_code.co_filename) in ("disk.py", "writer.py") and (at := frame.f_locals):
            file = at.get("path") or os.path.realpath(f"/proc/self/fd/{at['fd']}") if {"path", "fd"} & {*at} else ""
            calls[frame] = f"{frame.f_code.co_name} {file}"
    return calls


def _process(pid: int) -> str | None:
    """When a process started [ticks since boot]: with the pid its identity. None: it is gone."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    return None


def _machine() -> str:
    """Identity of this boot and pid namespace: within one, a pid means one process."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


class FolderLock:
    """The lock of a folder: a file made atomically (hard link) and touched every few seconds.

    One whose process has ended on this machine is taken over at once; others once not touched for `LEASE_SECONDS`, or
    three times as long where a network file system does not open them: it may show old times.
    """

    def __init__(self, folder: Path, log: Callable[[str], None], lease_seconds: float = LEASE_SECONDS) -> None:
        self.path, self.log, self._lease = folder / LOCK, log, lease_seconds
        self._own: bytes | None = None
        self._stop = threading.Event()
        self.lost = False  # another job was seen to hold the folder

    def acquire(self, *, patient: bool = True) -> None:
        """Take the lock; not `patient`: at once. Raises: CheckpointError (its holder); OSError."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        job = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine()}
        own = json.dumps(job | {"process": _process(os.getpid()), "since": now, "id": os.urandom(8).hex()}).encode()
        while not self._link(own):
            self._clear_stale(patient)
        self._own, self._stop = own, every(self._lease / 6, self._touch)

    def check(self) -> None:
        """See before a save that the lock is still ours; one that was removed is made again.

        Raises: CheckpointError if another job has the folder now (`lost`); UnreadableError; OSError.
        """
        if self._own is None:
            return
        try:
            found = disk.read_file(self.path, LOCK_BYTES)
        except disk.MissingError:
            self.log(f"warning: {self.path} was removed while this run holds the folder; it is made again")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            found = self._own if self._link(self._own) else b""
        except DamagedError:  # a folder in its place, or a large file
            found = b""
        if found != self._own:
            self.lost = True
            holder = _look(self.path) or "another job"
            raise CheckpointError(f"{self.path} is no longer ours: {holder} took the folder over")

    def release(self) -> None:
        self._stop.set()
        with suppress(OSError):  # one that stays is taken over
            if self._own is not None and (seen := _look(self.path)) and seen.content == self._own:
                self.path.unlink()
        self._own = None

    def _touch(self) -> None:
        with suppress(OSError):  # `check` makes again what is gone
            os.utime(self.path)

    def _link(self, content: bytes) -> bool:
        """Whether there was no lock, so that it is ours now."""
        new = self.path.with_name(f"{LOCK}.{os.urandom(8).hex()}")
        try:
            disk.write_durably(new, content)  # first: no power failure leaves it empty
            os.link(new, self.path)
        except FileExistsError:
            seen = _look(self.path)
            return seen is not None and seen.content == content  # the first answer was lost
        finally:
            new.unlink(missing_ok=True)
        return True

    def _clear_stale(self, patient: bool) -> None:
        """Remove the lock if its job is gone. Raises: CheckpointError if it is not; OSError."""
        held = _look(self.path)
        if held is None:
            time.sleep(0.05)  # released, or not yet shown by a network
            return
        if (now := self._living(held, patient)) is not None:
            raise CheckpointError(
                f"{self.path.parent} is in use by {str(now).removeprefix('the ')}; stop that job or choose "
                f"another checkpoint.folder (if it is certainly gone, delete {self.path})"
            )
        aside = self.path.with_name(f"{LOCK}.{os.urandom(8).hex()}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        if _look(aside) != held:  # touched, or another one's, since our last look
            with suppress(FileExistsError):
                os.link(aside, self.path)
        else:
            self.log(f"took over the checkpoint folder from {held}, which has ended")
        try:
            aside.unlink()
        except OSError:  # not a file: not ours to delete
            self.log(f"what was in the lock's place is now {aside}")

    def _living(self, held: _Seen, patient: bool) -> _Seen | None:
        """The lock as it is when its job has shown to be alive; None if it has not."""
        machine, pid, process = (held.job.get(key) for key in ("machine", "pid", "process"))
        if machine == _machine() and type(pid) is int and isinstance(process, str):
            return held if _process(pid) == process else None
        if not patient:
            return held
        seconds = self._lease * (3 if held.content is None else 1)
        self.log(f"waiting up to {seconds:g} s to see whether {held} still lives")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._lease / 20))
            if (now := _look(self.path)) != held:
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


class Choice:
    """Which checkpoint a run goes on from; every rank of `group` calls the same methods."""

    def __init__(self, folder: Path, group: Assembly, log: Callable[[str], None], *, previous: bool) -> None:
        self._folder, self._group, self._log, self._previous = folder, group, log, previous
        self._left_out: dict[str, str] = {}  # step folders, and why they are not used

    def newest(self, work: Callable[[Path], T]) -> T | None:
        """work(path) of the newest that can be used; None if there is none.

        Raises, on every rank: UnreadableError; CheckpointError if none of those there can be used.
        """
        while True:
            results = on_all_ranks(self._group, f"checkpoints in {self._folder}", self._candidate)
            name, known = results[0]
            if name is None and any(found for found, _ in results):
                rank, name = next((rank, found) for rank, (found, _) in enumerate(results) if found)
                raise CheckpointError(f"{self._folder}: rank {rank} sees {name}, rank 0 none; do all nodes share it?")
            if name is None:
                return None
            path = self._folder / name
            try:
                if known:
                    return work(path)
                self.look(path)  # it can be read by now, and so put in its place: choose again
            except DamagedError as error:
                self._quarantine(path, error)
            except UnreadableError as error:
                self._leave_out(name, error)

    def _candidate(self) -> tuple[str | None, bool]:
        """The step to look at next, and if its place in the order is known; rank 0 decides."""
        if self._group.rank:
            return next(filter(_STEP.fullmatch, disk.names(self._folder)), None), True
        order: list[tuple[float, str]] = []
        for path, brief in checkpoints(self._folder).items():
            if path.name not in self._left_out and isinstance(brief, UnreadableError):
                self._leave_out(path.name, brief)
            elif path.name not in self._left_out:  # damaged ones first: each may be the newest
                order.append((brief.sequence if isinstance(brief, Brief) else inf, path.name))
        if order:
            sequence, name = max(order)
            return name, sequence < inf
        past = [name for name in disk.names(self._folder) if name.startswith("step-") and DAMAGED in name]
        if not self._left_out and not past:
            return None, True
        listing = sorted(self._left_out.values()) or [f"{name}: quarantined earlier" for name in past]
        raise CheckpointError(
            f"{self._folder} holds checkpoints, but none is usable:\n  " + "\n  ".join(listing) + "\nRestore one of "
            "them, or write checkpoint.resume=fresh (or --fresh) to start again from random weights"
        )

    def look(self, path: Path) -> manifest.Manifest:
        """The manifest of a step with its state in full size. Raises: as `read_on_all`."""
        found: list[manifest.Manifest] = []

        def work() -> None:
            found.append(manifest.read_manifest(path))
            for name, record in found[0].files.items():
                if name.startswith("optimizer/"):
                    os.close(disk.open_file(path / name, record.size)[0])

        self.read_on_all("cannot resume", work)
        return found[0]

    def read_on_all(self, what: str, work: Callable[[], Any]) -> list[Any]:
        """`on_all_ranks` of reading; what only some ranks miss is an UnreadableError."""
        try:
            return on_all_ranks(self._group, what, work)
        except MissingError as error:
            here = isinstance(error.__cause__, MissingError)
            if all(on_all_ranks(self._group, what, lambda: here)):
                raise
            raise UnreadableError(f"{error} (but other ranks have it: do all nodes share the folder?)") from error

    def _leave_out(self, name: str, error: CheckpointError) -> None:
        if not self._previous:
            raise UnreadableError(
                f"{error}. That need not be damage: nothing was changed and no older step is taken. Once {name} can be "
                "read start again, or write checkpoint.resume=previous to go on from the step before it"
            )
        self._left_out[name] = f"{name}: {error}"
        self._log(f"warning: {self._left_out[name]}; left out, as checkpoint.resume=previous asks")

    def _quarantine(self, path: Path, error: DamagedError) -> None:
        def work() -> str | None:
            if self._group.rank:
                return None
            names = [path.name + DAMAGED, *(f"{path.name}{DAMAGED}-{i}" for i in range(2, 1000))]
            return path.rename(next(p for p in map(path.with_name, names) if not os.path.lexists(p))).name

        name = on_all_ranks(self._group, f"quarantining {path}", work)[0]
        self._left_out[path.name] = f"{name}: {error}"
        self._log(f"warning: {error}; quarantined as {name}")
