"""What of an input is lost: bad records, as shares of all and of their file, and files that cannot be read.

A bad record is an accident. A file that is cut off, unreadable or without one good record ends the work.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from megallama.config.errors import counted
from megallama.data.errors import DataError
from megallama.text.documents import Record, RecordReader, head_of, place
from megallama.text.files import JSON_SUFFIXES, Found, suffix_of
from megallama.text.shards import MAX_EXAMPLES, TextShard

SURE = 100  # bad records, from which on twice too many are enough to know the end


def limit_of(text: str, name: str, default: str) -> Callable[[float], float]:
    """How many of a number of records may be bad: a number, or a share such as 5%.

    Where nothing was said one always may: in a small file an accident is a large share.
    """
    value = text or default
    share = value.endswith("%")
    with suppress(ValueError):
        amount = float(value[:-1]) / 100 if share else int(value)
        if 0 <= amount and (not share or amount <= 1):
            return lambda records: max(amount * records, 0 if text else 1) if share else amount
    raise DataError(f"{name}={text!r} is neither a number of records nor a share such as 5%")


class Losses:
    """Counts what became of the records of files, file after file, and says when too much is lost.

    max_bad, max_bad_per_file: as in `limit_of`; skip_files: go on without files that cannot be read.
    Empty texts count only within their file.
    """

    def __init__(self, max_bad: str = "", max_bad_per_file: str = "", *, skip_files: bool = False) -> None:
        self._all = limit_of(max_bad, "max_bad", "0.1%")
        self._one = limit_of(max_bad_per_file, "max_bad_per_file", "10%")
        self._skip_files = skip_files
        self._allowed = f"{max_bad or '0.1%'} in all and {max_bad_per_file or '10%'} of one file"
        self.skipped, self.changed = Counter[str](), Counter[str]()
        self.examples: list[str] = []  # "FILE:LINE: reason", the first few
        self.faults: dict[str, str] = {}  # files that cannot be read
        self.records = self.bad = 0
        self._crowded: list[str] = []  # files with too many bad records
        self._file, self._counts, self._reason = "", [0, 0, 0], ""

    def find(self, inputs: Sequence[str | Path], say: Callable[[str], None] = lambda text: None) -> list[Path]:
        """The files that are meant, as in `Found`; `say` is told what is not read."""
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

    def hopeless(self, done: float) -> bool:
        """Whether the rest of the input, of which this share is read, cannot mend it."""
        return not self._skip_files and self.bad > SURE + 2 * self._all(self.records / done)

    def check(self) -> None:
        """Raises: DataError if a file could not be read, or too many records were bad."""
        self._close()
        found = [f"{name}: {reason}" for name, reason in self.faults.items()]
        if found and not self._skip_files:
            raise DataError(
                f"{counted(len(found), 'file')} cannot be read:\n  " + "\n  ".join(found) + "\n"
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


def seems(file: str) -> str:
    """What a file that cannot be used seems to be instead of JSON lines or UTF-8; "" where nothing is seen."""
    head = head_of(file)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:4]:
        return "it is UTF-16 or UTF-32; convert it to UTF-8: iconv -f UTF-16 -t UTF-8"
    text = head.decode("utf-8", "ignore").lstrip("\ufeff \t\r\n")
    first = text.partition("\n")[0]
    if suffix_of(file) not in JSON_SUFFIXES or not first:
        return ""
    if first[0] == "[":
        return "it is a JSON array, not one object per line; convert it: jq -c '.[]'"
    if first[0] == "{":
        with suppress(ValueError, RecursionError):
            return "" if json.loads(first) else ""
        return "its JSON objects go over several lines, not one per line; convert it: jq -c ." if "\n" in text else ""
    return "it seems to be a table (CSV), not JSON lines" if first.count(",") + first.count("\t") else ""
