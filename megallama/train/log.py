"""What the run says: the only place that prints.

Rank 0 speaks on standard output and in ``run.log``; every rank keeps its own ``logs/rank-0003.log``. Each line is one
unbuffered write: a kill loses nothing.  A full disk or a closed terminal never costs the run.
"""

import logging
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from megallama.config.errors import ConfigError, drop_output


def human_count(number: float) -> str:
    """``950``, ``12.3k``, ``4.1M``, ``6.7B``, ``1.4T``."""
    return _scaled(number, ["", "k", "M", "B", "T"], [0, 1, 1, 1, 1])


def human_bytes(number: float) -> str:
    """``512 B``, ``1.5 kB``, ``38.4 MB``, ``1.23 GB``, ``4.20 TB`` (powers of 1000)."""
    return _scaled(number, [" B", " kB", " MB", " GB", " TB"], [0, 1, 1, 2, 2])


def _scaled(number: float, units: list[str], digits: list[int]) -> str:
    place = 0
    while round(number, digits[place]) >= 1000 and place + 1 < len(units):
        number, place = number / 1000, place + 1
    return f"{number:.{digits[place]}f}{units[place]}"


def human_duration(seconds: float) -> str:
    """``0:12:34``, ``23:59:59``, ``2d 03:04:05``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02d}:{minutes:02d}:{rest:02d}" if days else f"{hours}:{minutes:02d}:{rest:02d}"


def finish_output() -> None:
    """Flush what was printed; without reader or room it is dropped: the status stays."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        drop_output()


def _print(text: str, error: bool) -> None:
    with suppress(OSError, ValueError):  # the reader has gone, or the stream is closed
        print(text, file=sys.stderr if error else sys.stdout, flush=True)


class Logger:
    """The voice of one rank. Before it has a folder, given here or to `open`, it only prints."""

    def __init__(self, rank: int, world_size: int, folder: Path | None = None, launched: int | None = None) -> None:
        self.rank, self._width = rank, len(str(world_size - 1))
        self._file = f"rank-{rank if launched is None else launched:04d}.log"  # whatever its rank is
        self._own: int | None = None  # handles of the two files
        self._run: int | None = None
        self._once: set[str] = set()
        self._early: list[bytes] = []  # lines for this rank's file, which is not there yet
        self._failures = logging.Handler()  # tracebacks that somebody logs on the way
        self._failures.emit = lambda record: self.note(self._failures.format(record))  # type: ignore[method-assign]
        logging.getLogger("megallama").addHandler(self._failures)
        if folder is not None:
            self.open(folder)

    def open(self, folder: Path) -> None:
        """Make the files, where there are none yet. Raises: ConfigError if they cannot be."""
        if self._own is not None:
            return
        try:
            (folder / "logs").mkdir(parents=True, exist_ok=True)
            self._own = _open(folder / "logs" / self._file)
            self._run = _open(folder / "run.log") if self.rank == 0 else None
            os.write(self._own, b"".join(self._early))
        except OSError as error:
            raise ConfigError(
                f"run.folder={folder} cannot be written: {error.strerror}; give run.folder a folder that can be created"
            ) from error

    def info(self, text: str) -> None:
        """A line in this rank's file; of rank 0 also on standard output and in run.log."""
        self._say(text, aloud=self.rank == 0)

    def warn(self, text: str) -> None:
        """A warning, said aloud by whichever rank has it."""
        self._say(f"warning: {text}", aloud=True)

    def warn_once(self, text: str, key: str | None = None) -> None:
        """A warning that is given once per `key` (default: the text itself)."""
        if (key or text) not in self._once:
            self._once.add(key or text)
            self.warn(text)

    def note(self, text: str) -> None:
        """A line in this rank's own file only."""
        self._say(text, aloud=False)

    def error(self, text: str, *, aloud: bool) -> None:
        """What ends the run, for the files; `aloud` also on standard error."""
        self._write(f"error: {text}", self._own, self._run)
        if aloud:
            _print(f"error: {text}", error=True)

    def close(self) -> None:
        """Close the files; later lines are only printed."""
        logging.getLogger("megallama").removeHandler(self._failures)
        for handle in (self._own, self._run):
            if handle is not None:
                os.close(handle)
        self._own = self._run = None

    def _say(self, text: str, aloud: bool) -> None:
        if aloud:
            who = "" if self.rank == 0 else f"[rank {self.rank:{self._width}d}] "
            _print(f"{time.strftime('%H:%M:%S')} {who}{text}", error=False)
        self._write(text, self._own, self._run if aloud else None)

    def _write(self, text: str, *handles: int | None) -> None:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n".encode(errors="replace")
        if self._own is None:
            self._early.append(line)
        for handle in (handle for handle in handles if handle is not None):
            try:
                os.write(handle, line)
            except OSError as error:
                if "log" not in self._once:
                    self._once.add("log")
                    _print(f"warning: log lines are lost: {error.strerror}; training goes on", error=False)


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
