"""Tokenized corpora on disk: Megatron's .bin/.idx pair, read by pread; PREFIX.json.

PREFIX.bin has nothing but token ids, document after document.  PREFIX.idx says where they begin, little-endian:

    9 bytes   b"MMIDIDX\\0\\0"
    uint64    version, 1
    uint8     code of the token type: 8 is uint16, 4 is int32
    uint64    n, number of sequences        (our writer: one sequence per document)
    uint64    d, number of document marks   (documents + 1)
    int32[n]  length of each sequence [tokens]
    int64[n]  first byte of each sequence in .bin
    int64[d]  first sequence of each document, and n at the end

Reading uses pread, never mmap: a file that shrinks is an error with a name in it, not a SIGBUS.
"""

import hashlib
import json
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megallama.config.errors import DataError, counted
from megallama.data.blocks import AGAIN, File, Sums

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
CODES: dict[int, np.dtype] = {8: np.dtype("<u2"), 4: np.dtype("<i4")}
CHUNK = 1 << 20  # entries handled at a time where a whole file is walked
NEAR = 256  # documents looked at together
SPOTS, SPAN = 64, 4096  # looked at for the largest token, and tokens of each


def strip_suffix(path: str | Path) -> str:
    """The prefix of a pair, given the prefix or either of its two files."""
    text = str(path)
    return text[:-4] if text.endswith((".bin", ".idx")) else text


def _read_metadata(prefix: str) -> dict[str, Any]:
    path = Path(prefix + ".json")
    try:
        metadata = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        if not isinstance(metadata, dict):
            raise ValueError("it holds no object")
        for key in ("documents", "tokens", "bytes", "vocab_size"):
            if type(value := metadata.get(key, 0)) is not int or value < 0:
                raise ValueError(f"{key} is {value!r}")
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); preprocess the text again, or delete this file") from error
    return metadata


class IndexedDataset:
    """A .bin/.idx pair opened for reading; safe to use from several threads.

    Opening costs the same for any size. `metadata`: what preprocessing recorded, PREFIX.json, or {}.
    Raises: DataError for a wrong header, size, first or last offset, or a fingerprint unlike that of PREFIX.json.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix, self.unchecked = strip_suffix(prefix), ""
        self._idx, self._bin = File(self.prefix + ".idx"), File(self.prefix + ".bin")
        name, size = self._idx.path, self._idx.size
        if size < HEADER.size:
            raise DataError(f"{name} has {size} bytes, expected at least {HEADER.size} for its header; {AGAIN}")
        magic, version, code, count, marks = HEADER.unpack(self._idx.read(0, HEADER.size))
        self.pointers_at, self._marks_at = HEADER.size + 4 * count, HEADER.size + 12 * count
        expected = self._marks_at + 8 * marks
        held = f"{counted(count, 'sequence')} and {marks} document marks"
        length = "truncated" if size < expected else "too long"
        for wrong, what in (
            (magic != MAGIC, f"begins with {magic!r}, expected {MAGIC!r}: it is no Megatron index; {AGAIN}"),
            (version != 1, f"has format version {version}, expected 1; {AGAIN}"),
            (code not in CODES, f"has token type code {code}, expected 8 (uint16) or 4 (int32); {AGAIN}"),
            (size != expected, f"has {size} bytes, expected {expected} for its {held}: it is {length}; {AGAIN}"),
            (count < 1 or marks < 2, f"holds no documents; {AGAIN} from files that hold text"),
        ):
            if wrong:
                raise DataError(f"{name} {what}")
        self.dtype, self.num_sequences, self.num_documents = CODES[code], count, marks - 1
        first, pointer = (self._int(self.pointers_at + 8 * i) for i in (0, count - 1))
        if first != 0 or [self._int(self._marks_at + 8 * i) for i in (0, marks - 1)] != [0, count]:
            raise DataError(f"{name}: its first offset or its document marks are damaged; {AGAIN}")
        size, expected = self._bin.size, pointer + self._int(self.pointers_at - 4, 4) * self.dtype.itemsize
        if size != expected:
            what = "truncated" if size < expected else "of another run"
            why = f"expected {expected} from {Path(name).name}: it is {what}; {AGAIN}"
            raise DataError(f"{self._bin.path} has {size} bytes, {why}")
        self.num_tokens = size // self.dtype.itemsize
        self.metadata = _read_metadata(self.prefix)
        made = self.metadata.get("fingerprint")
        if made and made != (found := self.fingerprint()["sha256"]):
            raise DataError(
                f"{self._bin.path} or {Path(name).name} is not the file that {Path(self.prefix).name}.json describes "
                f"(its fingerprint is {found[:12]}..., recorded was {made[:12]}...): one was replaced since; bring "
                f"the three files of one run together, or {AGAIN}"
            )

    def check_blocks(self) -> str:
        """Compare blocks with PREFIX.sums when first read; "", or why that cannot be."""
        try:
            sums = Sums(self.prefix, (self._bin, self._idx))
        except (OSError, DataError) as error:
            why = f"{self.prefix}.sums: {getattr(error, 'strerror', error)}"
            self.unchecked = f"{why}; a flipped bit would not be found (megallama inspect PREFIX --write-sums)"
        else:
            self._bin.check, self._idx.check = partial(sums.check, 0), partial(sums.check, 1)
        return self.unchecked

    def _int(self, offset: int, size: int = 8) -> int:
        return int.from_bytes(self._idx.read(offset, size), "little", signed=True)

    def array(self, offset: int, count: int, dtype: str) -> np.ndarray:
        """Numbers of .idx, from this byte on."""
        return np.frombuffer(self._idx.read(offset, count * int(dtype[-1])), dtype)

    def read(self, offset: int, count: int) -> np.ndarray:
        """Tokens offset .. offset+count-1 of the whole stream, [count] in the file's type."""
        if offset < 0 or count < 0 or offset + count > self.num_tokens:  # of a damaged index
            raise DataError(f"{self._bin.path} holds {self.num_tokens} tokens; {offset}..{offset + count} are outside")
        size = self.dtype.itemsize
        return np.frombuffer(self._bin.read(offset * size, count * size), self.dtype)

    def read_rows(self, offsets: Sequence[int], out: np.ndarray) -> None:
        """m tokens from each offset on into rows of `out` [n, m], of the file's type."""
        for offset, row in zip(offsets, out, strict=True):
            self._bin.read_into(row, offset * self.dtype.itemsize)

    def starts(self, first: int, last: int) -> np.ndarray:
        """Where documents first..last begin [tokens], int64; last may be num_documents."""
        marks = self.array(self._marks_at + 8 * first, last - first + 1, "<i8")
        low, high = int(marks[0]), min(int(marks[-1]) + 1, self.num_sequences)
        if not 0 <= low <= high or (np.diff(marks) < 0).any():
            raise DataError(f"{self._idx.path}: the marks of documents {first}..{last} do not ascend; {AGAIN}")
        pointers = self.array(self.pointers_at + 8 * low, high - low, "<i8") // self.dtype.itemsize
        return np.append(pointers, self.num_tokens)[marks - low]

    def documents_in(self, offset: int, count: int) -> np.ndarray:
        """Where documents begin in tokens offset .. offset+count-1, ascending, int64 [n]."""
        groups, found = range(0, self.num_documents, NEAR), []
        first = max(bisect_left(groups, offset * self.dtype.itemsize, key=self._first_byte) - 1, 0)
        for low in groups[first:]:
            near = self.starts(low, min(low + NEAR, self.num_documents) - 1)
            found.append(near[(near >= offset) & (near < offset + count)])
            if near[-1] >= offset + count:
                break
        return np.unique(np.concatenate(found))  # empty documents begin together

    def document_at(self, offset: int) -> int:
        return bisect_right(range(self.num_documents), offset, key=lambda n: int(self.starts(n, n)[0])) - 1

    def _first_byte(self, document: int) -> int:
        """Of a document in .bin; as `starts`, but quick."""
        at = self.pointers_at + 8 * self._int(self._marks_at + 8 * document)
        return self._int(at) if at < self._marks_at else self._bin.size

    def largest_token(self) -> int:
        """The largest token id in evenly spread spots, at one cost for any size."""
        span = min(SPAN, self.num_tokens)
        offsets = {int(x) for x in np.linspace(0, self.num_tokens - span, SPOTS)}
        return max(int(self.read(offset, span).max()) for offset in offsets)

    def fingerprint(self) -> dict[str, Any]:
        """Of the content: counts, sizes, a digest of both files' first and last 64 KiB."""
        digest = hashlib.sha256()
        for file in (self._idx, self._bin):
            span = min(file.size, 1 << 16)
            digest.update(file.read(0, span) + file.read(file.size - span, span))
        counts = {"documents": self.num_documents, "tokens": self.num_tokens}
        return counts | {"idx_bytes": self._idx.size, "bin_bytes": self._bin.size, "sha256": digest.hexdigest()}
