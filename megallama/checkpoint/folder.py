"""The folder of a run's checkpoints: what is in it, cleaning up, choosing what to go on from.

    step-00001000                        a checkpoint
    step-00001000.damaged, .damaged-2    quarantined: its bytes are not what was saved
    step-00001000.megallama-unfinished   being written or deleted: removed at the next start
    step-00001000.megallama-replaced     making way for the same step: restored if that is missing
    latest                               a hint for people

Earlier versions wrote ``.tmp`` and ``.old``, as people do: only what a crash left is touched.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from math import inf
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from megallama.checkpoint import disk, manifest
from megallama.checkpoint.disk import CheckpointError, DamagedError, MissingError, UnreadableError
from megallama.comm.group import Assembly
from megallama.comm.on_all_ranks import on_all_ranks
from megallama.config.schema import Config

T = TypeVar("T")
UNFINISHED, REPLACED, DAMAGED = ".megallama-unfinished", ".megallama-replaced", ".damaged"
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
    found = []
    for path, brief in checkpoints(folder).items():
        if isinstance(brief, Brief):
            found.append((brief, path))
        elif isinstance(brief, DamagedError):
            log(f"{path} is left out: {brief}")
        else:
            raise brief
    return max(found)[1] if found else None


def step_folder(folder: Path) -> Path | None:
    """The step folder that `folder` is, or is the model/ of; None if it is somebody else's."""
    candidates = (folder, folder.parent) if folder.name == "model" else (folder,)
    return next((c for c in candidates if disk.exists(c / manifest.NAME)), None)


def find_checkpoint(path: Path, log: Callable[[str], None] = lambda text: None) -> Path:
    """The step folder that `path` is, or is the model/ of; of a folder of steps or a run folder the one saved last.

    Any other path is returned as it is. `log` hears of damaged steps.
    """
    if (step := step_folder(path)) is not None:
        return step
    found = (newest_step(folder, log) for folder in (path, path / "checkpoints"))
    return next((step for step in found if step is not None), path)


def samples_before(config: Config) -> int:
    """How many samples lie behind the checkpoint that a run would resume; 0 where none can be read (yet)."""
    folder = None if config.checkpoint.resume == "fresh" else config.checkpoint.folder
    with suppress(CheckpointError, KeyError):
        if folder is not None and (step := newest_step(Path(folder), lambda text: None)):
            return int(manifest.read_manifest(step).counters["samples"])
    return 0


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint so that no moment shows half of it under its name."""
    trash = unfinished(folder)
    _remove(trash)
    os.rename(folder, trash)
    _remove(trash)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def recover_folder(folder: Path) -> list[str]:
    """Clean up after a crash; a line for each thing done. Raises: UnreadableError; OSError."""
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


def point_latest(final: Path) -> None:
    """Write the hint file `latest`."""
    temporary = unfinished(final.with_name("latest"))
    disk.write_durably(temporary, (final.name + "\n").encode())
    os.rename(temporary, final.with_name("latest"))


class Choice:
    """Which checkpoint a run goes on from; every rank of `group` has one and calls the same methods.

    One that is damaged is quarantined, and the one before it taken. One that cannot be read now may be whole, and
    an older one would throw steps away: that ends the start, unless `previous` was asked for.
    """

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
        """The step to look at next, and whether its place in the order is known; not on rank 0: any."""
        if self._group.rank:
            return next(filter(_STEP.fullmatch, disk.names(self._folder)), None), True
        order: list[tuple[float, str]] = []
        for path, brief in checkpoints(self._folder).items():
            if path.name not in self._left_out and isinstance(brief, UnreadableError):
                self._leave_out(path.name, brief)
            elif path.name not in self._left_out:  # the damaged ones first: each may be the newest
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
        """The manifest of a step whose training state is there in full size. Raises: as `read_on_all`."""
        found: list[manifest.Manifest] = []

        def work() -> None:
            found.append(manifest.read_manifest(path))
            for name, record in found[0].files.items():
                if name.startswith("optimizer/"):
                    os.close(disk.open_file(path / name, record.size)[0])

        self.read_on_all("cannot resume", work)
        return found[0]

    def read_on_all(self, what: str, work: Callable[[], Any]) -> list[Any]:
        """`on_all_ranks` of reading. Raises: UnreadableError also if a rank misses what another one has."""
        try:
            return on_all_ranks(self._group, what, work)
        except MissingError as error:
            here = isinstance(error.__cause__, MissingError)
            if all(on_all_ranks(self._group, what, lambda: here)):
                raise
            raise UnreadableError(f"{error} (but other ranks have it: do all nodes share the folder?)") from error

    def _leave_out(self, name: str, error: CheckpointError) -> None:
        """Go on without a step that cannot be read, if that was asked for. Raises: UnreadableError."""
        if not self._previous:
            raise UnreadableError(
                f"{error}. That need not be damage: nothing was changed and no older step is taken. Once {name} can be "
                "read start again, or write checkpoint.resume=previous to go on from the step before it"
            )
        self._left_out[name] = f"{name}: {error}"
        self._log(f"warning: {self._left_out[name]}; left out, as checkpoint.resume=previous asks")

    def _quarantine(self, path: Path, error: DamagedError) -> None:
        """Rename a damaged checkpoint, so that it is neither used nor deleted."""

        def work() -> str | None:
            if self._group.rank:
                return None
            names = [path.name + DAMAGED, *(f"{path.name}{DAMAGED}-{i}" for i in range(2, 1000))]
            return path.rename(next(p for p in map(path.with_name, names) if not os.path.lexists(p))).name

        name = on_all_ranks(self._group, f"quarantining {path}", work)[0]
        self._left_out[path.name] = f"{name}: {error}"
        self._log(f"warning: {error}; quarantined as {name}")
