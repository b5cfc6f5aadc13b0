"""Groups of ranks on one machine that talk through shared memory; what is large goes over gloo.

Every rank owns a segment: an anonymous file in memory that its peers map too.  It copies its data there and
posts a notice for each reader, who reads, or sums, out of it, with `C10d`'s bits.  That who sees a notice's
number sees what was written before, without locks, is a promise of x86 processors; on others gloo is kept.
"""

import ctypes
import fcntl
import mmap
import os
import platform
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from megallama.comm.c10d import FREE_TAG, MESSAGE, C10d
from megallama.comm.group import ContactLost, Done, Handle

MAX_SHM_BYTES = 8 << 20  # most bytes of an operation that goes this way
_ARENA = 64 << 20  # bytes of a segment's data; only what is used becomes memory
_NOTICES, _WORDS = 2048, 4  # operations under way to one reader; words of a notice:
_NUMBER, _PLACE, _BYTES, _READ = range(_WORDS)  # number, place (-1: over gloo), size, number when read
_BELL, _CLOSED, _TOKEN, _HEAD = range(4)  # words before the notices
_TO_ALL, _TO_ONE, _KINDS = range(3)  # notices of collectives, of messages
_SPIN, _SLICE, _LOOK = 200e-6, 5_000_000, 0.2  # polling [s], sleep [ns], between looks for the dead [s]
_FUTEX, _FUTEX_WAIT, _FUTEX_WAKE = 202, 0, 1  # Linux on x86-64


class _Segment:
    """The notices and data of one rank, as this process sees them."""

    def __init__(self, file: int, readers: int, token: int, own: bool) -> None:
        self.file, self._readers = file, readers
        words = _HEAD + _KINDS * readers * _NOTICES * _WORDS
        start = -(-words * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
        if own:
            os.ftruncate(file, start + _ARENA)
        memory = mmap.mmap(file, start + _ARENA)
        self.words = memoryview(memory)[: words * 8].cast("q")
        self.bell = ctypes.addressof(ctypes.c_int32.from_buffer(memory))
        self.arena = torch.frombuffer(memory, dtype=torch.uint8, offset=start, count=_ARENA)
        if own:
            self.words[_TOKEN] = token
        elif self.words[_TOKEN] != token:
            raise OSError("the ranks do not see one another's processes")

    def notice(self, kind: int, reader: int, number: int) -> int:
        return _HEAD + ((kind * self._readers + reader) * _NOTICES + number % _NOTICES) * _WORDS

    def owner_left(self) -> bool:
        """It said so, or its lock is free because the process is gone."""
        if self.words[_CLOSED]:
            return True
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        fcntl.lockf(self.file, fcntl.LOCK_UN)
        return True


class SharedMemory(C10d):
    """A gloo group; small operations go through shared memory once `connect` has succeeded."""

    _most_bytes = 0  # an operation of more goes over gloo
    _segments: Sequence[_Segment] = ()

    def connect(self, oversubscribed: bool, timeout: timedelta) -> str | None:
        """Map one another's segments; every rank calls it. None, or why gloo is kept.

        oversubscribed: the ranks share fewer cores than they are, so waiting must not keep a core busy.
        """
        token, file, problem = secrets.randbits(62), -1, ""
        try:
            if platform.machine() != "x86_64":
                raise OSError(f"not done on {platform.machine()} processors")
            self._syscall = ctypes.CDLL(None).syscall
            file = os.memfd_create(f"megallama-{self.name}")
            own = _Segment(file, self.size, token, own=True)
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            problem = str(error)
        everyone = self.gather_values([os.getpid(), file, token, problem])
        segments: list[_Segment] = []
        opened, problem = [file], next((other for *_, other in everyone if other), "")
        try:
            for rank, (pid, number, token, _) in enumerate([] if problem else everyone):
                if rank != self.rank:
                    opened.append(os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC))
                other = own if rank == self.rank else _Segment(opened[-1], self.size, token, own=False)
                segments.append(other)
        except (OSError, ValueError) as error:
            problem = str(error)
        if problem := next(filter(None, self.gather_values(problem)), ""):
            for file in filter(lambda f: f >= 0, opened):
                os.close(file)
            return problem
        self._posted, self._expected = Counter[tuple[int, int]](), Counter[tuple[int, int]]()  # by kind and peer
        self._blocks: list[tuple[int, int, list[tuple[int, int]]]] = []  # place, end, notices and their numbers
        self._seconds, self._spin = timeout.total_seconds(), 0.0 if oversubscribed else _SPIN
        self._segments, self._most_bytes, self._direct_bytes = segments, MAX_SHM_BYTES, MAX_SHM_BYTES
        return None

    def _exchange(
        self, what: str, keep: Tensor, outgoing: Sequence[Tensor], use: Callable[[Sequence[Tensor]], None],
        incoming: Sequence[Tensor] = (),
    ) -> Handle:  # fmt: skip
        own = outgoing[self.rank]
        if self.size * own.nbytes > self._most_bytes:
            return super()._exchange(what, keep, outgoing, use, incoming)
        others = [r for r in range(self.size) if r != self.rank]
        for readers in [others] if outgoing[0] is outgoing[-1] else [[r] for r in others]:
            self._post(_TO_ALL, readers, outgoing[readers[0]])
        return self._take(what, _TO_ALL, others, (keep, outgoing), keep, own, use)

    def send(self, tensor: Tensor, to: int, tag: int = MESSAGE) -> Handle:
        if tensor.nbytes > self._most_bytes:
            return super().send(tensor, to, tag)
        self._check(tensor, peer=to)
        self._post(_TO_ONE, [to], tensor.view(-1))
        self._handle("send", [], None, tensor, peer=to)
        return Done()

    def recv(self, tensor: Tensor, source: int, tag: int = MESSAGE) -> Handle:
        if tensor.nbytes > self._most_bytes:
            return super().recv(tensor, source, tag)
        self._check(tensor, peer=source)
        flat = tensor.view(-1)
        return self._take("recv", _TO_ONE, [source], None, tensor, flat, lambda part: flat.copy_(part[source]), source)

    def bound(self, timeout: timedelta) -> None:
        self._seconds = timeout.total_seconds()
        super().bound(timeout)

    def close(self) -> None:
        """Tell the peers, who may still read what was posted."""
        if self._segments:
            self._segments[self.rank].words[_CLOSED] = 1
        for segment in self._segments:
            self._ring(segment)
            os.close(segment.file)
        self._segments, self._most_bytes = (), 0
        super().close()

    @torch.no_grad()
    def _post(self, kind: int, readers: Sequence[int], data: Tensor) -> None:
        own, notices = self._segments[self.rank], []
        place = self._room(data.nbytes)
        if place >= 0:
            own.arena[place : place + data.nbytes].copy_(data.view(torch.uint8))
        for reader in readers:
            number = self._posted[kind, reader] = self._posted[kind, reader] + 1
            at = own.notice(kind, reader, number)
            if own.words[at + _NUMBER] != own.words[at + _READ]:
                raise RuntimeError(f"group {self.name}: more than {_NOTICES} operations under way")
            own.words[at + _PLACE], own.words[at + _BYTES] = place, data.nbytes
            own.words[at + _NUMBER] = number  # last: whoever sees it sees everything before
            notices.append((at, number))
            if place < 0:
                super().send(data.clone(), reader, self._tag(kind, number))
            self._ring(self._segments[reader])
        if place >= 0:
            self._blocks.append((place, place + data.nbytes, notices))

    def _room(self, nbytes: int) -> int:
        """The lowest place with room in the arena, so that little is ever touched; -1: none."""
        words = self._segments[self.rank].words
        self._blocks = [b for b in self._blocks if any(words[at + _READ] != number for at, number in b[2])]
        at = 0
        for place, end, _ in sorted(self._blocks):
            if at + nbytes <= place:
                break
            at = max(at, -(-end // 64) * 64)
        return at if at + nbytes <= _ARENA else -1

    def _tag(self, kind: int, number: int) -> int:
        return FREE_TAG + number % (1 << 20) * _KINDS + kind

    def _take(
        self, what: str, kind: int, sources: Sequence[int], keep: Any, tensor: Tensor, own: Tensor,
        use: Callable[[Sequence[Tensor]], Any], peer: int = -1,
    ) -> Handle:  # fmt: skip
        """Give each source's next to `use`, in rank order, `own` where nothing is read."""
        self._expected.update((kind, source) for source in sources)
        due = {source: self._expected[kind, source] for source in sources}

        def finish() -> None:
            use([self._read(kind, r, due[r], own) if r in due else own for r in range(self.size)])
            for source, number in due.items():
                segment = self._segments[source]
                segment.words[segment.notice(kind, self.rank, number) + _READ] = number

        return self._handle(what, [], keep, tensor, finish, peer)

    def _read(self, kind: int, source: int, number: int, like: Tensor) -> Tensor:
        """What `source` posted as this notice, where it lies: read only, until marked as read."""
        segment = self._segments[source]
        at = segment.notice(kind, self.rank, number)
        if segment.words[at + _NUMBER] != number:
            self._sleep_until(segment, at, number, source)
        place, nbytes = segment.words[at + _PLACE], segment.words[at + _BYTES]
        if nbytes != like.nbytes:
            raise RuntimeError(f"rank {self.ranks[source]} posted {nbytes} bytes where {like.nbytes} are expected")
        if place >= 0:
            return segment.arena[place : place + nbytes].view(like.dtype)
        data = torch.empty_like(like)
        super().recv(data, source, self._tag(kind, number)).wait()
        return data

    def _sleep_until(self, segment: _Segment, at: int, number: int, source: int) -> None:
        """Poll for a moment, then sleep until the bell; look whether `source` lives."""
        words, own = segment.words, self._segments[self.rank]
        start = look = time.monotonic()
        while time.monotonic() - start < self._spin:
            if words[at + _NUMBER] == number:
                return
        pause = (ctypes.c_long * 2)(0, _SLICE)  # two ranks that ring at once may ring once
        while True:
            bell = own.words[_BELL] & 0xFFFFFFFF
            if words[at + _NUMBER] == number:
                return
            self._futex(own.bell, _FUTEX_WAIT, bell, pause)
            now = time.monotonic()
            if now - look < _LOOK:
                continue
            look = now
            if segment.owner_left() and words[at + _NUMBER] != number:
                raise ContactLost(f"lost the connection to rank {self.ranks[source]}: its process has left")
            if now - start > self._seconds:
                raise ContactLost(f"timed out after {self._seconds:g} s waiting for rank {self.ranks[source]}")

    def _ring(self, segment: _Segment) -> None:
        segment.words[_BELL] += 1
        self._futex(segment.bell, _FUTEX_WAKE, 1, None)

    def _futex(self, address: int, operation: int, value: int, timeout: Any) -> None:
        self._syscall(_FUTEX, ctypes.c_void_p(address), operation, ctypes.c_uint(value), timeout, None, 0)
