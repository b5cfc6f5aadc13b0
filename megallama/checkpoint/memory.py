"""Copies of a rank's state that outlive its process: from them its replacement goes on.

There are two, for a rank may end while it makes one. Digests of trained bits are compared when read.
"""

import mmap
import os
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from megallama.checkpoint.disk import HEAD, read_head, write_head
from megallama.checkpoint.manifest import STATE
from megallama.comm.group import Assembly
from megallama.layers.param import Shard, digest


class MemoryCopies:
    """The two copies of one rank, in a file that somebody else keeps; `slots` are its halves.

    `key`: whose state; `chain`: of which undivided piece of the run; `pinned`: for a GPU. Raises: OSError without room.
    """

    def __init__(self, file: int, shards: Sequence[Shard], key: dict[str, Any], pinned: bool) -> None:
        self._tensors = [shard.state[kind].detach() for shard in shards for kind in STATE]
        self._names = [f"{shard.box.key} {kind}" for shard in shards for kind in STATE]
        sizes, size = _sizes(shards), self.need(shards) // 2
        self._key, self.chain, self._next = key, "", 0
        self.ends: list[tuple[str, int]] = []  # where the ranks' supervisors listen, if they do
        os.posix_fallocate(file, 0, 2 * size)
        memory = memoryview(mmap.mmap(file, 2 * size))
        if pinned:
            address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(address, 2 * size, 0)))
        self.slots, self._copies = [memory[:size], memory[size:]], list[list[Tensor]]()
        for slot in self.slots:
            places = torch.frombuffer(slot, dtype=torch.uint8, offset=HEAD).split(sizes)
            pairs = zip(places, self._tensors, strict=True)
            self._copies.append([place[: t.nbytes].view(t.dtype) for place, t in pairs])
        self._spans = [*zip(accumulate(sizes, initial=HEAD), sizes, strict=False)]  # of tensors in a slot

    @staticmethod
    def need(shards: Sequence[Shard]) -> int:
        """Bytes of both."""
        return 2 * (HEAD + sum(_sizes(shards)))

    def begin(self, chain: str) -> None:
        """The run goes on from somewhere else: what has been copied is none any more."""
        self.chain, self._next = chain, 0
        for slot in self.slots:
            slot[:8] = bytes(8)

    def keep(self, step: int, counters: dict[str, Any], after: Sequence[int | None] = ()) -> None:
        """Copy `step`'s state over the older copy; `after`: one of these is the newest on disk."""
        slot = self.slots[self._next]
        slot[:8] = bytes(8)  # from here on it is none, until it is whole
        for copy, tensor in zip(self._copies[self._next], self._tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        digests = torch.stack([digest(tensor) for tensor in self._tensors]).tolist()  # waits
        said = {"key": self._key, "chain": self.chain, "step": step, "after": [*after]}
        write_head(slot, said | {"counters": counters, "digests": digests})
        self._next = 1 - self._next

    def resume(
        self, group: Assembly, own: dict[int, int], ask: Callable[..., dict[str, Any]], log: Callable[[str], None]
    ) -> dict[str, Any] | None:
        """Fill the state from the newest step that all of `group` have whole; `own`: slots by step.

        Its counters; None without such a step. `ask` fetches what is damaged, which is told to `log`.
        """
        while common := set.intersection(*map(set, group.gather_values([*own]))):
            slot = own.pop(step := max(common))
            if wrong := self._wrong(step, slot):
                names = ", ".join([*(self._names[i] for i in wrong[:5]), *["..."][: len(wrong) > 5]])
                found = ask(do="fetch", step=step, slot=slot, spans=[self._spans[i] for i in wrong])
                wrong = self._wrong(step, slot)
                how = "damaged and not used" if wrong else "damaged"
                log(f"the copy of step {step} in memory is {how} ({names}): {found['problem'] or found['from']}")
            if all(group.gather_values(not wrong)):
                for copy, tensor in zip(self._copies[slot], self._tensors, strict=True):
                    tensor.copy_(copy)
                said, self._next = read_head(self.slots[slot]), 1 - slot
                self.chain = said["chain"]
                return dict(said["counters"])
        return None

    def _wrong(self, step: int, slot: int) -> list[int]:
        """The tensors with other bits than were copied; all if it is no copy of `step`."""
        said, copies = read_head(self.slots[slot]), self._copies[slot]
        if said.get("step") != step or len(said["digests"]) != len(copies):
            return [*range(len(copies))]
        return [i for i, copy in enumerate(copies) if int(digest(copy)) != said["digests"][i]]


def _sizes(shards: Sequence[Shard]) -> list[int]:
    """Bytes of every tensor in a copy: whole lines of the processor's cache."""
    return [-(-shard.state[kind].nbytes // 64) * 64 for shard in shards for kind in STATE]
