"""The star: one connection from every rank to rank 0, from before the ranks have met until they part.

Process groups say nothing before they exist, and where they break they do not know who broke them.
Here the kernel closes a dead rank's connection and everybody is told; the first reason to stop, of
whichever rank, reaches all; and small values are gathered on rank 0 without a connection between
every two ranks.  A message is a line of JSON; a thread of each rank reads and writes them.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from megallama.comm.errors import ContactLost

_NEWS, MEETING, FREE_CHANNEL = range(3)  # what a message is about
_GONE = object()  # in place of a value
CRASHED, SAVED = 1, 75  # exit statuses
_LONGEST = 1 << 30  # bytes of a message
_LINGER = 10.0  # seconds for the others to leave before rank 0 does


class Listener(Protocol):
    """Tells what asks this rank to stop, and leaves, in a thread of its own, when all do: why, exit status."""

    def listen(self, tell: Callable[[str], None]) -> None: ...
    def leave(self, why: str, status: int) -> None: ...
    def before_leaving(self, act: Callable[[str, int], None]) -> None: ...


class Star:
    """One rank's end of the star: rank 0 holds all connections, the others one."""

    def __init__(self, rank: int, size: int, host: str, listener: Listener | None = None) -> None:
        # the token is for those who connect
        self.rank = rank
        self.size = size
        self.token = secrets.token_hex(16)
        self.names = {rank: f"rank {rank} ({host})"}
        self.expected = size - 1 if rank == 0 else 0  # connections that must have ended before this rank leaves
        self._news: tuple[str, int] | None = None
        self._told, self._quiet, self._listener = threading.Event(), False, listener
        self._links: dict[int, asyncio.StreamWriter] = {}  # by rank; from `size` on those who are a second of theirs
        self.gone: set[int] = set()  # links that have ended, or are about to
        self._boxes: dict[int, SimpleQueue[tuple[int, Any]]] = {}
        self._sent: dict[int, bytes] = {}  # by rank 0, for those as well who come late
        self._door: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="star", daemon=True)
        self._thread.start()

    def open(self, loopback: bool) -> int:
        """Rank 0: the port where the others connect."""
        both = not loopback and socket.has_dualstack_ipv6()
        family, host = socket.AF_INET6 if both else socket.AF_INET, "127.0.0.1" if loopback else ""
        door = socket.create_server((host, 0), family=family, dualstack_ipv6=both)
        self._door = self._run(asyncio.start_server(self._admit, sock=door, backlog=4096, limit=_LONGEST))
        return door.getsockname()[1]

    def connect(self, host: str, port: int, hello: dict[str, Any], seconds: float) -> None:
        """The others: connect to rank 0, with `rank`, `host` and what `meet` wants to know. Raises: OSError."""
        opening = asyncio.open_connection(host, port, limit=_LONGEST)
        reader, self._links[0] = self._run(asyncio.wait_for(opening, seconds))
        self.post(MEETING, hello | {"token": self.token})
        asyncio.run_coroutine_threadsafe(self._serve(0, reader), self._loop)

    def attend(self) -> None:
        """From here on the listener can tell the others, and is told."""
        if self._listener is not None:
            self._listener.before_leaving(lambda why, status: self._linger())
            self._listener.listen(lambda name: self.end(f"{name} on {self.names[self.rank]}", SAVED))

    def post(self, channel: int, value: Any) -> None:
        """Send a JSON value to rank 0, or from rank 0 to all others."""
        self._loop.call_soon_threadsafe(self._write, channel, value)

    def receive(self, channel: int, seconds: float) -> tuple[int, Any]:
        """The next message: from whom, and what. Raises: TimeoutError; ContactLost once any rank has gone."""
        try:
            link, value = self._box(channel).get(timeout=max(seconds, 0.001))
        except Empty:
            raise TimeoutError from None
        if value is _GONE:
            self._box(channel).put((link, _GONE))  # for the next who asks
            raise ContactLost(self._news[0] if self._news else f"{self.names.get(link, f'rank {link}')} has left")
        return link, value

    def end(self, why: str, status: int, *, mine: bool = False) -> None:
        """Tell all ranks why the run ends, unless another reason was first; `mine`: this rank is leaving already."""
        self._quiet |= mine
        self._loop.call_soon_threadsafe(self._learn if self.rank == 0 else self._report, why, status)

    def first(self, seconds: float) -> tuple[str, int] | None:
        """Why the run ends, and with which status, as soon as anybody has said it; None after so long."""
        self._told.wait(seconds)
        return self._news

    def close(self) -> None:
        """Part from the others; rank 0, with which the store goes, lets them go first, but not for long."""
        self._linger()
        self._run(self._part())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _linger(self) -> None:
        deadline = time.monotonic() + _LINGER
        while len(self.gone) < self.expected and time.monotonic() < deadline:
            time.sleep(0.01)

    def _box(self, channel: int) -> SimpleQueue[tuple[int, Any]]:
        box = self._boxes.setdefault(channel, SimpleQueue())
        if self.gone and box.empty():
            box.put((min(self.gone), _GONE))
        return box

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # ---- in the thread ----

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            channel, hello = json.loads(await reader.readline())
            if not secrets.compare_digest(hello.pop("token"), self.token):
                raise ValueError("a stranger")
            rank = int(hello["rank"])
            link = rank if rank not in self._links else self.size + len(self._links)
            self.names[link] = f"rank {rank} ({hello['host']})"
        except (ValueError, KeyError, TypeError, AttributeError, OSError, asyncio.CancelledError):
            writer.close()
            return
        self._links[link] = writer
        writer.writelines(self._sent.values())
        self._box(channel).put((link, hello))
        with suppress(asyncio.CancelledError):  # of which asyncio would print the traceback
            await self._serve(link, reader)

    async def _serve(self, link: int, reader: asyncio.StreamReader) -> None:
        with suppress(OSError):
            async for line in reader:
                channel, value = json.loads(line)
                if channel != _NEWS:
                    self._box(channel).put((link, value))
                elif value[0] == "ends":
                    self._learn(*value[1:])
                else:
                    self._forget(link if value[0] == "parts" else value[1])
        if link not in self.gone:
            name = self.names.get(link, f"rank {link}")
            self._learn(f"{name} has left without a word: killed, or ended outside Python", CRASHED)
            self._forget(link)

    def _report(self, why: str, status: int) -> None:
        """To rank 0, which knows what was first; without it, to oneself."""
        self._learn(why, status) if 0 in self.gone else self._write(_NEWS, ["ends", why, status])

    def _learn(self, why: str, status: int) -> None:
        if self._news is not None:
            return
        self._news = why, status
        self._told.set()
        if self.rank == 0:
            self._write(_NEWS, ["ends", why, status])
        if self._listener is not None and not self._quiet:
            threading.Thread(target=self._listener.leave, args=(why, status), daemon=True).start()

    def _forget(self, link: int) -> None:
        """Nobody waits any more for what everybody would have to send."""
        self.gone.add(link)
        for box in [*self._boxes.values()]:
            box.put((link, _GONE))
        if self.rank == 0:
            self._write(_NEWS, ["gone", link])

    def _write(self, channel: int, value: Any) -> None:
        line = json.dumps([channel, value]).encode() + b"\n"
        if channel == MEETING or (channel == _NEWS and value[0] == "ends"):
            self._sent[channel] = line
        for link in self._links.keys() - self.gone:
            self._links[link].write(line)

    async def _part(self) -> None:
        if self._door is not None:
            self._door.close()
        self._write(_NEWS, ["parts"])
        for link in self._links.values():
            with suppress(OSError, TimeoutError):
                await asyncio.wait_for(link.drain(), 1.0)
            link.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)


class StarGroup:
    """All ranks, for small values alone: they go to rank 0, and what it makes of them comes back."""

    def __init__(self, star: Star, channel: int, name: str, timeout: timedelta) -> None:
        self.name, self.rank, self.size = name, star.rank, star.size
        self._star, self._channel, self._seconds = star, channel, timeout.total_seconds()

    def gather_values(self, value: Any, summary: Callable[[list[Any]], Any] = list) -> Any:
        waiting = "rank 0"
        told = {0: json.loads(json.dumps(value))}
        deadline = time.monotonic() + self._seconds
        try:
            if self.rank:
                self._star.post(self._channel, value)
                return self._star.receive(self._channel, self._seconds)[1]
            while len(told) < self.size:
                waiting = f"rank {min(set(range(self.size)) - told.keys())}"
                link, value = self._star.receive(self._channel, deadline - time.monotonic())
                told[link] = value
        except TimeoutError:
            text = f"timed out after {self._seconds:g} s waiting for {waiting} in group {self.name}"
            raise ContactLost(text) from None
        result = json.loads(json.dumps(summary([told[rank] for rank in range(self.size)])))
        self._star.post(self._channel, result)
        return result
