"""The star: one connection from every rank to rank 0, from before the ranks have met until after they part.

The process groups say nothing before they exist, and where they break they do not know who broke them.  Here the kernel
closes a dead rank's connection and everybody is told; the first reason to stop, of whichever rank, reaches all; and
small values are gathered on rank 0 without a connection between every two ranks.  A thread of each rank reads.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from megallama.comm.errors import ContactLost

_HEAD = struct.Struct("!II")  # before the data of a message: its channel, its bytes
_NEWS, MEETING, FREE_CHANNEL = range(3)
_HELLO_BYTES = 1 << 16  # most that is read from a stranger
_LINGER = 10.0  # seconds for the others to leave before rank 0 does
CRASHED, SAVED = 1, 75  # exit statuses


class Listener(Protocol):
    """Who is to know when the run is to end."""

    def listen(self, tell: Callable[[str], None]) -> None:
        """Call `tell`, from any thread, to ask all ranks to stop."""

    def stop(self, why: str, status: int) -> None:
        """All ranks stop, for this reason; called once, from the star's thread."""


class Star:
    """One rank's end of the star: rank 0 holds all connections, the others one.

    token: what rank 0 expects of those who connect.
    """

    def __init__(self, rank: int, size: int, host: str, listener: Listener | None = None) -> None:
        self.rank, self.size, self.token = rank, size, secrets.token_hex(16)
        self.names = {rank: f"rank {rank} ({host})"}
        self.expected = size - 1 if rank == 0 else 0  # connections that must have ended before this rank leaves
        self._news: tuple[str, int] | None = None
        self._sent: dict[int, bytes] = {}  # by rank 0, to be read by those as well who come late
        self._told, self._alone, self._listener = threading.Event(), False, listener
        self._links: dict[int, asyncio.StreamWriter] = {}  # by rank; below 0 those who are a second of theirs
        self.gone: set[int] = set()  # whose connection has ended
        self._parted: set[int] = set()  # who said so before
        self._boxes: dict[int, SimpleQueue[tuple[int, bytes | None]]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="star", daemon=True)
        self._thread.start()

    # ---- opening ----

    def open(self, loopback: bool) -> int:
        """Rank 0: the port where the others connect."""
        if loopback or not socket.has_dualstack_ipv6():
            listener = socket.create_server(("127.0.0.1" if loopback else "", 0), backlog=4096)
        else:
            listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
        self._wait(asyncio.start_server(self._accept, sock=listener, backlog=4096))
        self._listen()
        return listener.getsockname()[1]

    def connect(self, host: str, port: int, hello: dict[str, Any], seconds: float) -> None:
        """The others: connect to rank 0. `hello` is a JSON value with `rank` and `host`, and what `meet` wants to know.

        Raises: OSError, TimeoutError.
        """
        reader, writer = self._wait(asyncio.wait_for(asyncio.open_connection(host, port), seconds))
        self._links[0] = writer
        self.post(MEETING, json.dumps(hello | {"token": self.token}).encode())
        asyncio.run_coroutine_threadsafe(self._serve(0, reader), self._loop)
        self._listen()

    def _listen(self) -> None:
        if self._listener is not None:
            self._listener.listen(lambda name: self.end(f"{name} on {self.names[self.rank]}", SAVED))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            channel, data = await _message(reader, _HELLO_BYTES)
            hello = json.loads(data)
            if not secrets.compare_digest(hello.pop("token"), self.token):
                raise ValueError("a stranger")
            rank = int(hello["rank"])
            link = rank if rank not in self._links else -len(self._links)
            self.names[link] = f"rank {rank} ({hello['host']})"
        except (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError):
            writer.close()
            return
        self._links[link] = writer
        for known, message in self._sent.items():  # before this one came
            self._write({link}, known, message)
        self._box(channel).put((link, json.dumps(hello).encode()))
        await self._serve(link, reader)

    # ---- values ----

    def post(self, channel: int, data: bytes) -> None:
        """To rank 0, or from rank 0 to all others."""
        self._loop.call_soon_threadsafe(self._write, None, channel, data)

    def receive(self, channel: int, seconds: float) -> tuple[int, bytes]:
        """The next message: from whom, and what. Raises: TimeoutError; ContactLost once any rank has gone."""
        box = self._box(channel)
        try:
            link, data = box.get(timeout=max(seconds, 0.001))
        except Empty:
            raise TimeoutError from None
        if data is None:
            box.put((link, None))  # for the next who asks
            raise ContactLost(self._news[0] if self._news else f"{self.names.get(link, f'rank {link}')} has left")
        return link, data

    def _box(self, channel: int) -> SimpleQueue[tuple[int, bytes | None]]:
        new: SimpleQueue[tuple[int, bytes | None]] = SimpleQueue()
        box = self._boxes.setdefault(channel, new)
        if box is new and self.gone:
            box.put((min(self.gone), None))
        return box

    # ---- news ----

    def end(self, why: str, status: int, *, mine: bool = False) -> None:
        """Tell all ranks why the run ends, unless another reason was first; `mine`: this rank is leaving already."""
        self._alone |= mine
        self._loop.call_soon_threadsafe(self._ends, why, status)

    def first(self, seconds: float) -> str | None:
        """Why the run ends, as soon as anybody has said it; None after so long."""
        self._told.wait(seconds)
        return self._news[0] if self._news else None

    def _ends(self, why: str, status: int) -> None:
        if self.rank and 0 not in self.gone:  # rank 0 knows who was first
            self._write({0}, _NEWS, json.dumps(["end", why, status]).encode())
        else:
            self._learn(why, status)

    def _learn(self, why: str, status: int) -> None:
        if self._news is not None:
            return
        self._news = why, status
        if self.rank == 0:
            self._sent[_NEWS] = json.dumps(["end", why, status]).encode()
            self._write(None, _NEWS, self._sent[_NEWS])
        if self._listener is not None and not self._alone:
            self._listener.stop(why, status)
        self._told.set()

    def _hear(self, link: int, kind: str, *rest: Any) -> None:
        if kind == "end":
            self._learn(*rest)
        elif kind == "gone":
            self._forget(*rest)
        elif kind == "parts":
            self._parted.add(link)

    def _forget(self, link: int) -> None:
        self.gone.add(link)
        for box in [*self._boxes.values()]:
            box.put((link, None))
        if self.rank == 0:
            self._write(None, _NEWS, json.dumps(["gone", link]).encode())

    # ---- the thread ----

    async def _serve(self, link: int, reader: asyncio.StreamReader) -> None:
        with suppress(EOFError, OSError):
            while True:
                channel, data = await _message(reader)
                if channel == _NEWS:
                    self._hear(link, *json.loads(data))
                else:
                    self._box(channel).put((link, data))
        if link not in self._parted:
            name = self.names.get(link, f"rank {link}")
            self._learn(f"{name} has left without a word: killed, or ended outside Python", CRASHED)
        self._forget(link)

    def _write(self, links: set[int] | None, channel: int, data: bytes) -> None:
        if channel == MEETING:
            self._sent[channel] = data
        for link in (set(self._links) if links is None else links) - self.gone:
            self._links[link].write(_HEAD.pack(channel, len(data)) + data)

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """Part from the others; rank 0, with which the store goes, lets them go first, but not for long."""
        deadline = time.monotonic() + _LINGER
        while len(self.gone) < self.expected and time.monotonic() < deadline:
            time.sleep(0.01)
        self._wait(self._part())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _part(self) -> None:
        self._alone = True
        self._write(None, _NEWS, b'["parts"]')
        for writer in self._links.values():
            with suppress(OSError, TimeoutError):
                await asyncio.wait_for(writer.drain(), 1.0)
            writer.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)


async def _message(reader: asyncio.StreamReader, most: int = 1 << 32) -> tuple[int, bytes]:
    channel, size = _HEAD.unpack(await reader.readexactly(_HEAD.size))
    if size > most:
        raise ValueError(f"{size} bytes")
    return channel, await reader.readexactly(size)


class StarGroup:
    """All ranks, for small values alone: they go to rank 0 and what it makes of them comes back."""

    def __init__(self, star: Star, channel: int, name: str, timeout: timedelta) -> None:
        self.name, self.rank, self.size = name, star.rank, star.size
        self._star, self._channel, self._seconds = star, channel, timeout.total_seconds()

    def gather_values(self, value: Any, summary: Callable[[list[Any]], Any] = list) -> Any:
        data, deadline = json.dumps(value).encode(), time.monotonic() + self._seconds
        told: dict[int, Any] = {0: data}
        waiting = "rank 0"
        try:
            if self.rank:
                self._star.post(self._channel, data)
                return json.loads(self._star.receive(self._channel, self._seconds)[1])
            while len(told) < self.size:
                waiting = f"{self.size - len(told)} ranks, rank {min(set(range(self.size)) - set(told))} the first"
                link, data = self._star.receive(self._channel, deadline - time.monotonic())
                told[link] = data
        except TimeoutError:
            text = f"timed out after {self._seconds:g} s waiting for {waiting} in group {self.name}"
            raise ContactLost(text) from None
        data = json.dumps(summary([json.loads(told[rank]) for rank in range(self.size)])).encode()
        self._star.post(self._channel, data)
        return json.loads(data)
