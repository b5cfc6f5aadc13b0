"""Copies of a rank's state in memory that outlives its process: what a rank that is replaced goes on from.

There are two, for a rank may end while it makes one.  A copy is taken only where every rank has a whole one of the same
step: each tensor's bits are digested where they were trained, and compared when they are read.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megallama.checkpoint.manifest import STATE
from megallama.comm.group import Assembly
from megallama.layers.param import Shard, digest

_HEAD = 1 << 20  # bytes before the data: eight for the length of the text behind them, which says what the data are


class MemoryCopies:
    """The two copies of one rank, in files that somebody else keeps open.

    `key` says whose state it is, run, configuration and ranks: copies of another key are none. `pinned`: on a GPU they
    are written without a detour. Raises: OSError where memory does not suffice.
    """

    def __init__(self, files: Sequence[int], shards: Sequence[Shard], key: str, pinned: bool) -> None:
        self._tensors = [shard.state[kind].detach() for shard in shards for kind in STATE]
        sizes = _sizes(shards)
        self._key, self._memories, self._copies = key, list[mmap.mmap](), list[list[Tensor]]()
        for file in files:
            os.posix_fallocate(file, 0, _HEAD + sum(sizes))
            memory = mmap.mmap(file, _HEAD + sum(sizes))
            data = torch.frombuffer(memory, dtype=torch.uint8, offset=_HEAD, count=sum(sizes))
            if pinned:
                torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(data.data_ptr(), data.nbytes, 0)))
            places = zip(data.split(sizes), self._tensors, strict=True)
            self._memories.append(memory)
            self._copies.append([place[: t.nbytes].view(t.dtype) for place, t in places])

    @staticmethod
    def need(shards: Sequence[Shard]) -> int:
        """Bytes of both."""
        return 2 * (_HEAD + sum(_sizes(shards)))

    def keep(self, step: int, counters: dict[str, Any]) -> None:
        """Copy the state of `step` in place of the older copy."""
        found = [self._said(memory) for memory in self._memories]
        slot = min(range(len(found)), key=lambda i: found[i]["step"] if found[i] else -1)
        memory = self._memories[slot]
        memory[:8] = bytes(8)  # from here on it is none, until it is whole
        for copy, tensor in zip(self._copies[slot], self._tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        digests = torch.stack([digest(tensor) for tensor in self._tensors]).tolist()  # waits for the device
        text = json.dumps({"key": self._key, "step": step, "counters": counters, "digests": digests}).encode()
        if len(text) <= _HEAD - 8:
            memory[8 : 8 + len(text)] = text
            memory[:8] = len(text).to_bytes(8, "little")

    def forget(self) -> None:
        """The run goes on from somewhere else: what has been copied is none any more."""
        for memory in self._memories:
            memory[:8] = bytes(8)

    def resume(self, group: Assembly, above: int, log: Callable[[str], None]) -> dict[str, Any] | None:
        """Fill the state from the newest step after `above` of which every rank of `group` has a whole copy.

        Its counters; None where there is no such step. A copy that is damaged is told to `log`.
        """
        whole: dict[int, int] = {}
        for slot, memory in enumerate(self._memories):
            if said := self._said(memory):
                wrong = [i for i, copy in enumerate(self._copies[slot]) if int(digest(copy)) != said["digests"][i]]
                if not wrong:
                    whole[said["step"]] = slot
                else:
                    log(f"warning: the copy of step {said['step']} in memory is damaged ({len(wrong)} tensors)")
        everyone = group.gather_values([step for step in whole if step > above])
        common = set.intersection(*map(set, everyone))
        if not common:
            return None
        slot = whole[max(common)]
        for copy, tensor in zip(self._copies[slot], self._tensors, strict=True):
            tensor.copy_(copy)
        counters: dict[str, Any] = self._said(self._memories[slot])["counters"]
        return counters

    def _said(self, memory: mmap.mmap) -> dict[str, Any]:
        """What a copy says of itself; nothing where it is none of ours."""
        size = int.from_bytes(memory[:8], "little")
        if not 0 < size <= _HEAD - 8:
            return {}
        try:
            said = json.loads(memory[8 : 8 + size])
            fits = said["key"] == self._key and len(said["digests"]) == len(self._tensors)
        except (ValueError, KeyError, TypeError):
            return {}
        return said if fits else {}


def _sizes(shards: Sequence[Shard]) -> list[int]:
    """Bytes of every tensor in a copy: whole lines of the processor's cache."""
    return [-(-shard.state[kind].nbytes // 64) * 64 for shard in shards for kind in STATE]
