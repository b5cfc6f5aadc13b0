"""Which files of text are meant by files, folders and patterns: each real file once, in a fixed order.

Whatever lies in a folder is read or reported: nothing is left out in silence.
"""

from __future__ import annotations

import errno
import functools
import glob
import os
import stat
from collections import defaultdict, deque
from collections.abc import Sequence
from pathlib import Path

from megallama.data.errors import DataError

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TEXT_SUFFIXES = (*".txt .text .md .rst .tex .py .c .h .cpp .hpp .java .js .ts .go .rs .sh".split(),)
SUFFIXES = (*JSON_SUFFIXES, *TEXT_SUFFIXES, ".parquet")
LINKS = {errno.ENOENT: "broken links", errno.ELOOP: "links that lead in a circle"}
OUTPUTS = (".bin", ".idx", ".json", ".sums")  # of preprocessing
KINDS = (
    f"JSON lines end in {' '.join(JSON_SUFFIXES)}, plain text in {' '.join(TEXT_SUFFIXES)}, both also with .gz or "
    ".zst; Parquet in .parquet"
)


@functools.lru_cache(1024)  # asked once per record
def suffix_of(path: str | Path) -> str:
    """The suffix that says what a file holds, without that of its compression."""
    name = Path(path).name.lower()
    return Path(name.removesuffix(".gz").removesuffix(".zst")).suffix


class Found:
    """The files meant by a list of files, folders (searched recursively) and glob patterns.

    files: in the order of the inputs, those of a folder sorted.  faults: path -> why it cannot be read.
    Raises: DataError for a name that matches nothing, or a file of unknown kind.
    """

    def __init__(self, inputs: Sequence[str | Path]) -> None:
        self.files: list[Path] = []
        self.faults: dict[str, str] = {}
        self._left_out = defaultdict[str, list[Path]](list)  # by reason
        self._seen: set[str] = set()  # real names of files and folders
        for name in inputs:
            if not str(name).strip():
                raise DataError("an input is empty (an unset variable of the shell?); name files, folders or patterns")
            there = os.path.exists(name)
            matches = [str(name)] if there else sorted(glob.glob(str(name), recursive=True))
            if not there and matches in ([], [str(name)]):
                raise DataError(f"{name} does not exist; give a file, a folder or a pattern such as 'corpus/*.jsonl'")
            for match in matches:
                self._take(Path(match))
        if not inputs:
            raise DataError("no input files were given; name files, folders or patterns")
        if not self.files and not self.faults:
            raise DataError(f"{', '.join(map(str, inputs))} holds no text: {KINDS}\n" + "\n".join(self.lines()))

    def lines(self) -> list[str]:
        """What is not read, a line for every reason."""
        left_out = sorted(self._left_out.items())
        return [f"not read: {len(paths):,} {why}, the first {str(paths[0])!r}" for why, paths in left_out]

    def _take(self, root: Path) -> None:
        """A file, or everything below a folder.

        Links are followed last: what is reached in two ways keeps the name that is its own.
        """
        if root.is_file() and suffix_of(root) not in SUFFIXES:
            raise DataError(f"{root} is of an unknown kind {suffix_of(root)!r}; {KINDS}")
        first, waiting = len(self.files), deque([root])
        while waiting:
            path = waiting.pop()
            try:
                why = self._examine(path, root, waiting)
            except OSError as error:
                why = LINKS.get(error.errno or 0, "hidden" if _hidden(path, root) else "")
                if not why:
                    self.faults[str(path)] = f"cannot be read ({error.strerror})"
            if why:
                self._left_out[why].append(path)
        self.files[first:] = sorted(self.files[first:])

    def _examine(self, path: Path, root: Path, waiting: deque[Path]) -> str:
        """Take a file, or let what is in a folder wait; else why it is left out."""
        mode, real = path.stat().st_mode, os.path.realpath(path)
        folder = stat.S_ISDIR(mode)
        if real in self._seen:
            return f"{'folders (perhaps a loop of links)' if folder else 'files'} that are read under another name"
        if folder:
            self._seen.add(real)
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
            waiting.extendleft(path / entry.name for entry in entries if entry.is_symlink())
            waiting.extend(path / entry.name for entry in reversed(entries) if not entry.is_symlink())
            return ""
        if _hidden(path, root):
            return "hidden"
        if not stat.S_ISREG(mode):
            return "not regular files"
        if path != root and path.suffix in OUTPUTS and path.with_suffix(".idx").exists():
            return "made by preprocessing"
        if suffix_of(path) not in SUFFIXES:
            return f"of another kind ({path.suffix or 'no suffix'})"
        self._seen.add(real)
        self.files.append(path)
        return ""


def _hidden(path: Path, root: Path) -> bool:
    return path != root and any(part.startswith((".", "__pycache__")) for part in path.relative_to(root).parts)


def earlier_files(inputs: Sequence[str | Path]) -> list[Path]:
    """The list of versions before `Found`, with which a preprocessing begun by one of them goes on.

    They followed no links to folders, and what was reached twice was read twice.
    """
    files: list[Path] = []
    for root in map(Path, inputs):
        found = [root] if root.is_file() else [Path(p) for p in sorted(glob.glob(str(root), recursive=True))]
        if root.is_dir():
            texts = sorted(p for p in root.rglob("*") if suffix_of(p) in SUFFIXES and not _hidden(p, root))
            found = [p for p in texts if p.suffix != ".json" or not p.with_suffix(".idx").exists()]
        files += filter(Path.is_file, found)
    return files
