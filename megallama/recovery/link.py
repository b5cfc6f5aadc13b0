"""The sockets of supervisors: one of every host is connected to that of rank 0. A message is a line of JSON.

Who connects says the run's token first; nothing that goes wrong here raises: a link that is lost is a link that is not.
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

Message = dict[str, Any]
WAITING = 1 << 20  # more than hosts: the number of a link with a rank that has no place is this and the launched rank
_FRESH = 6.0  # seconds: who has no place and has not been heard for so long does not wait any more
_MOST, _RETRY, _STRANGE = 1 << 24, 1.0, 10.0  # bytes; seconds to the next try, to say the token


class Link:
    """One connection."""

    def __init__(self, peer: socket.socket) -> None:
        self.born, self.socket, self.host = time.monotonic(), peer, -1  # host: once it has said the token
        self.hello: Message = {}  # with which it did
        peer.setblocking(False)
        self._in, self._out, self.open = b"", b"", True

    def send(self, message: Message) -> None:
        """Queue a message, and send what the kernel takes."""
        self._out += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what has been queued."""
        while self._out and self.open:
            try:
                self._out = self._out[self.socket.send(self._out) :]
            except BlockingIOError:
                self.open = len(self._out) < _MOST
                return
            except OSError:
                self.close()

    def receive(self) -> Iterator[Message]:
        """The messages that have come."""
        while self.open:
            try:
                data = self.socket.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data or len(self._in) > _MOST:
                self.close()
            self._in += data
        *lines, self._in = self._in.split(b"\n")
        for line in lines:
            try:
                if isinstance(message := json.loads(line), dict):
                    yield message
            except ValueError:
                self.close()
                return

    def close(self) -> None:
        """Let go of it."""
        self.open = False
        self.socket.close()


class Links:
    """All connections of this supervisor: with every host's (rank 0's), or with rank 0's."""

    def __init__(self) -> None:
        self.token, self._links = "", list[Link]()
        self._door: socket.socket | None = None
        self._address: tuple[str, int] | None = None
        self._hello, self._next = Message(), 0.0
        self.met = time.monotonic()  # when there was a link
        self.heard: dict[int, float] = {}  # host number -> when it was last heard

    def listen(self, address: str) -> int:
        """The port on which the others are waited for, on the loopback interface if `address` is; 0: there is none."""
        with suppress(OSError):
            family, host = socket.getaddrinfo(address, None)[0][0], address if address == "127.0.0.1" else ""
            self._door = socket.create_server((host, 0), family=family, backlog=1024)
            self._door.setblocking(False)
            return int(self._door.getsockname()[1])
        return 0

    def connect(self, address: str, port: int, hello: Message) -> None:
        """From now on be connected to rank 0's supervisor, whenever it can be reached; with an empty `hello` not."""
        if hello != self._hello:
            for link in self._links:
                link.close()
            self._links, self._next, self.met = [], 0.0, time.monotonic()
        self._address, self._hello = (address, port) if hello else None, hello

    def waiting(self) -> dict[int, str]:
        """The launched ranks that wait for a place, with their hosts."""
        since = time.monotonic() - _FRESH
        hellos = [link.hello for link in self._links if link.host >= WAITING and self.heard[link.host] > since]
        return {hello["seat"]: hello["name"] for hello in hellos if "asks" not in hello}

    def sockets(self) -> list[socket.socket]:
        """Where something may arrive."""
        return [*([self._door] if self._door else []), *(link.socket for link in self._links if link.open)]

    def send(self, message: Message, host: int | None = None) -> None:
        """To all, or to one."""
        for link in self._links:
            if link.host >= 0 and host in (None, link.host):
                link.send(message)

    def poll(self) -> list[tuple[int, Message]]:
        """Host number and message, of all that have come; connects and accepts meanwhile."""
        self._meet()
        found = []
        for link in self._links:
            link.flush()
            for message in link.receive():
                if link.host < 0:
                    if not secrets.compare_digest(str(message.get("token", "")), self.token) or not self.token:
                        link.close()  # a stranger
                        break
                    link.host, link.hello = int(message.get("host", WAITING + message.get("seat", 0))), message
                self.heard[link.host] = time.monotonic()
                found.append((link.host, message))
            if link.host < 0 and time.monotonic() - link.born > _STRANGE:
                link.close()  # many would leave the supervisor no files
        self._links = [link for link in self._links if link.open]
        self.met = time.monotonic() if self._links else self.met
        return found

    def _meet(self) -> None:
        with suppress(OSError):
            while self._door is not None:
                self._links.append(Link(self._door.accept()[0]))
        if self._address is None or self._links or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _RETRY
        with suppress(OSError):
            link = Link(socket.create_connection(self._address, timeout=0.5))
            link.host = 0
            link.send(self._hello | {"token": self.token})
            self._links.append(link)
