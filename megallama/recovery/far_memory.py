"""Memory of a process on another host: bytes at a place, written and read.

Who connects says the run's token first. A request is a line, [place, bytes that follow, bytes wanted]; the answer is
what is wanted, or a line. It is used by one thread at a time.
"""

from __future__ import annotations

import json
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from mmap import mmap
from typing import Any

CHUNK, PATIENCE = 4 << 20, 10.0  # the most bytes of a request; seconds for one


class FarMemory:
    """The client. `hello` has the token, and says whose memory. Raises: OSError or ValueError, as all its methods."""

    def __init__(self, at: tuple[str, int], hello: dict[str, Any]) -> None:
        self._peer = socket.create_connection((at[0], at[1]), timeout=PATIENCE)
        self._stream: Any = self._peer.makefile("rwb")
        self._stream.write(json.dumps(hello).encode() + b"\n")
        self._stream.flush()
        if problem := json.loads(self._stream.readline() or b'"it has let go"'):
            raise OSError(problem)

    def put(self, at: int, data: bytes | memoryview) -> None:
        """Write at most CHUNK bytes there."""
        self._call(at, len(data), 0, data)

    def get(self, at: int, size: int) -> bytes:
        """At most CHUNK bytes of what is there."""
        return self._call(at, 0, size, b"")

    def _call(self, at: int, put: int, get: int, data: bytes | memoryview) -> bytes:
        self._stream.write(json.dumps([at, put, get]).encode() + b"\n")
        self._stream.write(data)
        self._stream.flush()
        answer = bytes(self._stream.read(get or 1))
        if len(answer) < (get or 1):
            raise ConnectionError("it has let go")
        return answer

    def close(self) -> None:
        """Let go of it."""
        with suppress(OSError):
            self._peer.shutdown(socket.SHUT_RDWR)
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
                with suppress(OSError):
                    before.shutdown(socket.SHUT_RDWR)
            self._peers[who] = peer
            try:
                memory, problem = self._memory(hello), ""
            except OSError as error:
                problem = str(error)
            stream.write(json.dumps(problem).encode() + b"\n")
            stream.flush()
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
