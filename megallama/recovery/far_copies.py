"""The copies of a rank's state with its buddy: a file as large as its own, in the memory of another host.

Who connects says the run's token first. A request is a line, [place, bytes that follow, bytes wanted]; the answer is
what is wanted, or a line. It is used by one thread at a time.
"""

from __future__ import annotations

import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from mmap import mmap
from typing import Any

from megallama.checkpoint.disk import HEAD, read_head
from megallama.recovery.copy_files import why_not

CHUNK, PATIENCE = 4 << 20, 10.0  # the most bytes of a request; seconds for one


class FarCopies:
    """Two slots of `size` bytes; `steps` has those that may be gone on from, by `why_not` of `key` and `now`.

    `hello` has the token, and says whose. Raises: OSError or ValueError where the buddy is not reached, as its methods.
    """

    def __init__(self, end: tuple[str, int], hello: dict[str, Any], size: int, key: dict[str, Any], now: Any) -> None:
        self._size, self.steps = size, dict[int, int]()
        self._peer = socket.create_connection(end, timeout=PATIENCE)
        self._stream: Any = self._peer.makefile("rwb")
        _write(self._stream, hello)
        if problem := json.loads(self._stream.readline() or b'"it has let go"'):
            raise OSError(problem)
        for slot in range(2):
            said = read_head(memoryview(self._call(slot * size, HEAD)))
            if said and not why_not(said, key, now):
                self.steps[said["step"]] = slot
        self._turn = 1 - self.steps[max(self.steps)] if self.steps else 0

    def send(self, slots: Sequence[memoryview], step: int, rate: float) -> bool:
        """Send the copy of `step` in place of the older one there, at most `rate` GB/s; whether it has stayed whole."""
        own = next((slot for slot in slots if read_head(slot).get("step") == step), None)
        if own is None:
            return False
        there, begun = self._turn * self._size, time.monotonic()
        self._call(there, data=bytes(8))  # from here on it is none, until it is whole
        for at in range(8, self._size, CHUNK):
            self._call(there + at, data=own[at : (end := min(at + CHUNK, self._size))])
            time.sleep(max(0.0, begun + end / (rate * 1e9) - time.monotonic()))
        if read_head(own).get("step") != step:
            return False
        self._call(there, data=own[:8])
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
                own[at : at + count] = self._call(far + at, count)

    def _call(self, at: int, want: int = 0, data: bytes | memoryview = b"") -> bytes:
        """Write `data` there, or read what is wanted: of both at most CHUNK bytes."""
        _write(self._stream, [at, len(data), want], data)
        answer = bytes(self._stream.read(want or 1))
        if len(answer) < (want or 1):
            raise ConnectionError("it has let go")
        return answer

    def close(self) -> None:
        _end(self._peer)
        self._peer.close()


class Door:
    """The server, with a thread for each that comes: `memory` gives what a hello asks for, or raises an OSError.

    `token` is what it has to say; while that is empty nobody gets in. Of two with one `who` the later is served.
    """

    def __init__(self, memory: Callable[[dict[str, Any]], mmap], token: Callable[[], str]) -> None:
        self._memory, self._token = memory, token
        self._door: socket.socket | None = None
        self._peers: dict[str, socket.socket] = {}

    def listen(self, towards: str) -> tuple[str, int]:
        """From now on; the address, on the way to host `towards`, and the port that others are to be told."""
        family, _, _, _, there = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(there)  # sends nothing
            address = str(probe.getsockname()[0])
        inside = address.startswith("127.") or address == "::1"  # this is that host, and calls itself so
        if self._door is None:
            self._door = socket.create_server(("" if inside else address, 0), family=family, backlog=64)
            threading.Thread(target=self._accept, args=[self._door], daemon=True).start()
        return towards if inside else address, int(self._door.getsockname()[1])

    def _accept(self, door: socket.socket) -> None:
        while True:
            try:
                threading.Thread(target=self._serve, args=[door.accept()[0]], daemon=True).start()
            except OSError:  # no more files
                time.sleep(1.0)

    def _serve(self, peer: socket.socket) -> None:
        """Whatever is wrong with it, it is let go of."""
        with suppress(OSError, ValueError, LookupError, TypeError), peer, peer.makefile("rwb") as stream:
            peer.settimeout(PATIENCE)
            hello = json.loads(stream.readline(1 << 12))
            if not self._token() or not secrets.compare_digest(str(hello["token"]), self._token()):
                return
            if (before := self._peers.get(who := str(hello["who"]))) is not None:
                _end(before)
            self._peers[who] = peer
            try:
                memory, problem = self._memory(hello), ""
            except OSError as error:
                problem = str(error)
            _write(stream, problem)
            peer.settimeout(None)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            while line := b"" if problem else stream.readline(1 << 12):
                at, put, get = map(int, json.loads(line))
                if min(at, put, get) < 0 or max(put, get) > CHUNK or at + put + get > len(memory):
                    return
                if put:
                    memory[at : at + put] = stream.read(put)
                stream.write(memory[at : at + get] or b"\n")
                stream.flush()


def _write(stream: Any, line: Any, data: bytes | memoryview = b"") -> None:
    stream.write(json.dumps(line).encode() + b"\n")
    stream.write(data)
    stream.flush()


def _end(peer: socket.socket) -> None:
    with suppress(OSError):
        peer.shutdown(socket.SHUT_RDWR)
