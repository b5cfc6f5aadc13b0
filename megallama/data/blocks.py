"""Files read by offset, and the checksums of their blocks, by which a single flipped bit is found.

PREFIX.sums lies beside a .bin/.idx pair, whose bytes stay Megatron's: a header (magic, bytes of .bin and of .idx, crc32
of the table), then the table: crc32 of every 64 KiB of .bin and then of .idx, uint32, all little-endian.
"""

import os
import struct
import weakref
from collections.abc import Callable, Sequence
from zlib import crc32

import numpy as np

from megallama.config.errors import DataError

BLOCK = 1 << 16
HEADER = struct.Struct("<8sQQI")
MAGIC = b"MLSUMS\x00\x01"
SPOTS = 8  # blocks by which a table is recognised as that of a pair
DAMAGED = " is damaged itself; delete it, or write it with megallama inspect PREFIX --write-sums"
AGAIN = "write it again with megallama prepare"


class File:
    """A file for pread; what cannot be read is a DataError. `check` comes first."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.check: Callable[[int, int], None] | None = None
        try:
            self.fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            give = "give the prefix of a .bin/.idx pair without the suffix, and make the pair with megallama prepare"
            raise DataError(f"{path} does not exist; {give}") from None
        except OSError as error:
            raise DataError(f"cannot open {path}: {error.strerror}") from error
        weakref.finalize(self, os.close, self.fd).atexit = False  # a loader's thread may still read
        self.size = os.fstat(self.fd).st_size

    def read(self, offset: int, count: int) -> bytes:
        self.read_into(data := bytearray(count), offset)
        return bytes(data)

    def read_into(self, out: bytearray | np.ndarray, offset: int) -> None:
        view: memoryview = memoryview(out).cast("B")  # type: ignore[arg-type]
        done, count = 0, len(view)
        if self.check and count:
            self.check(offset, count)
        while done < count:  # a short read is legal, an empty one is the end of the file
            try:
                more = os.preadv(self.fd, (view[done:],), offset + done)
            except OSError as error:
                raise DataError(f"cannot read {self.path} at byte {offset + done}: {error.strerror}") from error
            if not more:
                raise DataError(
                    f"{self.path} ends at byte {os.fstat(self.fd).st_size}, expected {count} bytes from byte {offset} "
                    f"on; it had {self.size} bytes when it was opened, so it was truncated since: {AGAIN}"
                )
            done += more


class Sums:
    """PREFIX.sums of an open pair (.bin, .idx): each block is compared when it is first read.

    Raises: OSError where there is none, DataError if it is damaged or of another pair.
    """

    def __init__(self, prefix: str, pair: Sequence[File]) -> None:
        self._own = open(prefix + ".sums", "rb", buffering=0)  # noqa: SIM115
        self._pair = [File(file.path) for file in pair]  # without a check of their own
        head = self._own.read(HEADER.size)
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise DataError(f"it{DAMAGED}")
        _, *sizes, self._table = HEADER.unpack(head)
        self._blocks = [-(-size // BLOCK) for size in sizes]
        self._seen = bytearray(sum(self._blocks) // 8 + 1)  # a bit for each block compared
        which = int(self._blocks[0] < 3)  # few blocks of .bin say little: .idx
        spots = np.linspace(0, self._blocks[which] - 1, SPOTS)
        if sizes != [f.size for f in pair] or not any(self._matches(which, int(block)) for block in spots):
            raise DataError("it is of another pair and not used")

    def check(self, which: int, offset: int, count: int) -> None:
        """Compare the blocks of these bytes of .bin (0) or .idx (1). Raises: DataError."""
        for block in range(offset // BLOCK, (offset + count - 1) // BLOCK + 1):
            byte, bit = divmod(block + which * self._blocks[0], 8)
            if not self._seen[byte] >> bit & 1:
                if not self._matches(which, block):
                    self._look_again(which, block)
                self._seen[byte] |= 1 << bit

    def _look_again(self, which: int, block: int) -> None:
        path, own = self._pair[which].path, self._own
        self._pair[which] = File(path)  # a passing fault is no damage
        if self._matches(which, block):
            return
        if crc32(os.pread(own.fileno(), 4 * sum(self._blocks), HEADER.size)) != self._table:
            raise DataError(f"{own.name}{DAMAGED}")
        raise DataError(
            f"{path}: the {BLOCK} bytes from {block * BLOCK} on are not what was written, says {own.name}: the file "
            f"was damaged or changed since; put it back or {AGAIN}. If you know that it is right, delete the .sums"
        )

    def _matches(self, which: int, block: int) -> bool:
        file, start = self._pair[which], block * BLOCK
        entry = os.pread(self._own.fileno(), 4, HEADER.size + 4 * (block + which * self._blocks[0]))
        return crc32(file.read(start, min(BLOCK, file.size - start))).to_bytes(4, "little") == entry
