"""Which files of text are meant by files, folders and patterns, and what of them is lost.

Each real file is read once, in a fixed order; whatever lies in a folder is read or reported.
Bad records are accidents, counted as shares of all and of their file.  A file that is cut off, unreadable
or without one good record ends the work.
"""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from megallama.config.errors import DataError, counted
from megallama.text.documents import KINDS, SUFFIXES, Record, RecordReader, place, seems, suffix_of
from megallama.text.shards import MAX_EXAMPLES, TextShard

LINKS = {errno.ENOENT: "broken links", errno.ELOOP: "links that lead in a circle"}
OUTPUTS = (".bin", ".idx", ".json", ".sums")  # of preprocessing
SURE = 100  # bad records, from which on twice too many are enough to know the end


class Found:
    """The files meant by files, folders and glob patterns, in order, those of a folder sorted.

    faults: path -> why it cannot be read.  Raises: DataError for a name that means nothing.
    """

    def __init__(self, inputs: Sequence[str | Path]) -> None:
        self.files, self.faults = list[Path](), dict[str, str]()
        self._left_out = defaultdict[str, list[Path]](list)  # by reason
        self._seen = set[str]()  # real names of files and folders
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
        """A file, or all below a folder, links last: what is reached twice keeps its own name."""
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
    """The list of versions before `Found`: no links to folders, what is named twice is twice."""
    files = list[Path]()
    for root in map(Path, inputs):
        found = [root] if root.is_file() else [Path(p) for p in sorted(glob.glob(str(root), recursive=True))]
        if root.is_dir():
            texts = sorted(p for p in root.rglob("*") if suffix_of(p) in SUFFIXES and not _hidden(p, root))
            found = [p for p in texts if p.suffix != ".json" or not p.with_suffix(".idx").exists()]
        files += filter(Path.is_file, found)
    return files


def limit_of(text: str, name: str, default: str) -> Callable[[float], float]:
    """How many of a number of records may be bad: a number, or a share such as 5%."""
    value = text or default
    with suppress(ValueError):
        if not value.endswith("%") and (most := int(value)) >= 0:
            return lambda records: most
        if value.endswith("%") and 0 <= (share := float(value[:-1]) / 100) <= 1:
            least = 0 if text else 1  # in a small file an accident is a large share
            return lambda records: max(share * records, least)
    raise DataError(f"{name}={text!r} is neither a number of records nor a share such as 5%")


class Losses:
    """Counts what became of the records of files, file after file, and says when too much is lost.

    skip_files: go on without files that cannot be read.  Empty texts count only within their file.
    """

    def __init__(self, max_bad: str = "", max_bad_per_file: str = "", *, skip_files: bool = False) -> None:
        self._all = limit_of(max_bad, "max_bad", "0.1%")
        self._one = limit_of(max_bad_per_file, "max_bad_per_file", "10%")
        self._skip_files = skip_files
        self._allowed = f"{max_bad or '0.1%'} in all and {max_bad_per_file or '10%'} of one file"
        self.skipped, self.changed = Counter[str](), Counter[str]()
        self.examples = list[str]()  # "FILE:LINE: reason", the first few
        self.faults = dict[str, str]()  # files that cannot be read
        self.records = self.bad = 0
        self._crowded = list[str]()  # files with too many bad records
        self._file, self._counts, self._reason = "", [0, 0, 0], ""

    def find(self, inputs: Sequence[str | Path], say: Callable[[str], None] = lambda text: None) -> list[Path]:
        """As `Found`; `say` is told what is not read."""
        found = Found(inputs)
        self.faults |= found.faults
        for line in found.lines():
            say(line)
        return found.files

    def texts(self, reader: RecordReader) -> Iterator[tuple[Record, str]]:
        """The good records of a reader. Raises: DataError as `check`, at the end."""
        for record in reader:
            shard = TextShard(0)
            found = shard.text(record, reader.json_key)
            self.take(shard)
            if found:
                yield record, found[0]
        self.check()

    def take(self, shard: TextShard) -> None:
        """What became of the next records."""
        self.skipped.update(shard.skipped)
        self.changed.update(shard.changed)
        self.faults |= shard.faults
        for file, line, origin, reason in shard.examples[: MAX_EXAMPLES - len(self.examples)]:
            self.examples.append(f"{place(Record(file, line, b'', (), origin))}: {reason}")
        for file, counts in shard.counts.items():
            if file != self._file:
                self._close()
                self._file = file
            self._reason = self._reason or next((e[3] for e in shard.examples if e[0] == file), "")
            self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)]
            self.records, self.bad = self.records + sum(counts), self.bad + counts[1]

    def check_early(self, done: float) -> None:
        """As `check`, if the rest of the input, of which this share is read, cannot mend it."""
        if not self._skip_files and self.bad > SURE + 2 * self._all(self.records / done):
            self.check()

    def check(self) -> None:
        """Raises: DataError if a file could not be read, or too many records were bad."""
        self._close()
        found = [f"{name}: {reason}" for name, reason in self.faults.items()]
        if found and not self._skip_files:
            raise DataError(
                "\n  ".join([f"{counted(len(found), 'file')} cannot be read:", *found]) + "\n"
                "repair or remove them, or go on with what can be read by --skip-bad-files"
            )
        if self._crowded or self.bad > self._all(self.records):
            bad = f"{self.skipped.total():,} of {counted(self.records, 'record', ',')} are bad"
            lines = [f"{bad}, more than the {self._allowed} that may be, among them", *self._crowded, *self.examples]
            raise DataError(
                "\n  ".join(lines) + "\ncorrect them, name the right --json-key, or allow more with --max-bad and "
                "--max-bad-per-file, for example --max-bad 5%"
            )

    def lines(self) -> list[str]:
        """What was lost, for a reader."""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.skipped.most_common())
        of = f"of {counted(self.records, 'record', ',')} (allowed are {self._allowed}){kinds and ': '}{kinds}"
        more = self.skipped.total() - len(self.examples)
        return [
            f"skipped {counted(self.skipped.total(), 'bad record', ',')} {of}",
            *(f"  {example}" for example in self.examples),
            *([f"  ... and {more:,} more"] if more > 0 else []),
            *(f"changed {n:,} records: {kind}" for kind, n in self.changed.items()),
            *(f"left out what cannot be read of {name}: {reason}" for name, reason in self.faults.items()),
        ]

    def _close(self) -> None:
        """Judge a file whose records have all come."""
        good, bad, empty = self._counts
        some, unusable = f"of {counted(sum(self._counts), 'record', ',')}", bad and not good
        if unusable or bad + empty > self._one(sum(self._counts)):
            why = seems(self._file) or self._reason
            if unusable:
                self.faults.setdefault(self._file, f"none {some} can be used: {why}")
                self.bad -= bad  # they are judged as a file
            else:
                self._crowded.append(f"{self._file}: {bad + empty:,} {some} are bad; {why}")
        self._counts, self._reason = [0, 0, 0], ""
