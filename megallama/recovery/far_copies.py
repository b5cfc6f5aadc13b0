"""The copies of a rank's state with its buddy: a file as large as its own, in the memory of another host."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from megallama.checkpoint.disk import HEAD, read_head
from megallama.recovery.copy_files import why_not
from megallama.recovery.far_memory import CHUNK, FarMemory


class FarCopies:
    """Two slots of `size` bytes; `steps` has those that may be gone on from, by `why_not` of `key` and `now`.

    Raises: OSError or ValueError where the buddy is not reached, as all its methods.
    """

    def __init__(self, end: tuple[str, int], hello: dict[str, Any], size: int, key: dict[str, Any], now: Any) -> None:
        self._memory, self._size, self.steps = FarMemory(end, hello), size, dict[int, int]()
        for slot in range(2):
            said = read_head(memoryview(self._memory.get(slot * size, HEAD)))
            if said and not why_not(said, key, now):
                self.steps[said["step"]] = slot
        self._turn = 1 - self.steps[max(self.steps)] if self.steps else 0

    def send(self, slots: Sequence[memoryview], step: int, rate: float) -> bool:
        """Send the copy of `step` in place of the older one there, at most `rate` GB/s; whether it has stayed whole."""
        own = next((slot for slot in slots if read_head(slot).get("step") == step), None)
        if own is None:
            return False
        there, begun = self._turn * self._size, time.monotonic()
        self._memory.put(there, bytes(8))  # from here on it is none, until it is whole
        for at in range(8, self._size, CHUNK):
            self._memory.put(there + at, own[at : (end := min(at + CHUNK, self._size))])
            time.sleep(max(0.0, begun + end / (rate * 1e9) - time.monotonic()))
        if read_head(own).get("step") != step:
            return False
        self._memory.put(there, own[:8])
        self._turn = 1 - self._turn
        return True

    def fetch(self, own: memoryview, step: int, spans: Sequence[tuple[int, int]]) -> None:
        """Bytes of the copy of `step`, by start and length, or all where there are no `spans`, into the slot `own`."""
        if not spans:
            own[:8] = bytes(8)
        far = self.steps[step] * self._size
        for start, length in spans or [(8, self._size - 8), (0, 8)]:
            for at in range(start, start + length, CHUNK):
                count = min(CHUNK, start + length - at)
                own[at : at + count] = self._memory.get(far + at, count)

    def close(self) -> None:
        """Let go of it."""
        self._memory.close()
