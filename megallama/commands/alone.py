"""One command at a time writes an output: two of them would mix their files, or one remove the other's."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megallama.config.errors import DataError


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock of an output, a file beside it that is gone afterwards. Raises: DataError if another has it."""
    lock, new = path.with_name(f".{path.name}.lock"), [folder for folder in path.parents if not folder.exists()]
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                why = "it is one process that does this, not each of srun's or mpirun's"
                raise DataError(f"another process is writing {path} now; wait for it ({why})") from None
            except OSError:  # of a file system without locks
                pass
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    finally:
        for folder in new:  # what nothing was written into goes again
            with suppress(OSError):
                folder.rmdir()
