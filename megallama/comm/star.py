"""The star: one connection from every rank to rank 0, from before the ranks have met until they leave.

Process groups do not know who broke them.  Here the kernel closes a dead rank's connection and
everybody is told; the first reason to stop, of whichever rank, reaches all; and small values are
gathered on rank 0 without a connection between every two ranks.  A message is a line of JSON,
[what about, value]; a thread reads and writes them.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol

from megallama.comm.group import ContactLost

ARRIVALS = "arrivals"  # to rank 0: who somebody is; from rank 0: its verdict
_ENDS, _LEFT = "ends", "left"  # why the run ends, and its status; a rank whose connection ends
CRASHED, REFUSED, SAVED = 1, 2, 75  # exit statuses
_LONGEST = 1 << 30  # bytes of a message
_PATIENCE = 10.0  # seconds for the others to leave before rank 0 does


def _line(about: str, value: Any) -> bytes:
    return json.dumps([about, value]).encode() + b"\n"


class Listener(Protocol):
    """Tells what asks this rank to stop, and leaves, in a thread of its own, when all do: why, exit status."""

    def listen(self, tell: Callable[[str], None]) -> None: ...
    def leave(self, why: str, status: int) -> None: ...
    def before_leaving(self, act: Callable[[str, int], None]) -> None: ...


class Star:
    """One rank's end of the star: rank 0 holds all connections, the others one."""

    def __init__(self, rank: int, size: int, host: str, listener: Listener | None = None) -> None:
        self.rank, self.size = rank, size
        self.token = secrets.token_hex(16)  # rank 0's is for those who connect
        self.names = {rank: f"rank {rank} ({host})"}
        self.expected = size - 1 if rank == 0 else 0  # connections that end before this rank leaves
        self.left: list[int] = []  # ranks whose connections have ended, or are about to
        self._news: tuple[str, int] | None = None
        self._listener, self._quiet = listener, False
        self.full = ""  # once all ranks are there: what {stranger} is told, who comes after them
        self._links: dict[asyncio.StreamWriter, int] = {}  # of a rank started twice there are two
        self._changed = threading.Condition()  # of messages, news, who left
        self._messages: defaultdict[str, deque[tuple[int, Any]]] = defaultdict(deque)
        self._sent: dict[str, bytes] = {}  # by rank 0, for those as well who come late
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

    def connect(self, host: str, port: int, arrival: dict[str, Any], seconds: float) -> None:
        """The others: connect to rank 0, with `rank`, `host` and what it asks. Raises: OSError."""
        opening = asyncio.open_connection(host, port, limit=_LONGEST)
        reader, writer = self._run(asyncio.wait_for(opening, seconds))
        self._links[writer] = 0
        self.post(ARRIVALS, arrival | {"token": self.token})
        asyncio.run_coroutine_threadsafe(self._serve(0, reader, writer), self._loop)

    def attend(self) -> None:
        """From here on the listener can tell the others, and is told."""
        if self._listener is not None:
            self._listener.before_leaving(lambda why, status: self._wait())
            self._listener.listen(lambda name: self.end(f"{name} on {self.names[self.rank]}", SAVED))

    def post(self, about: str, value: Any) -> None:
        """Send a JSON value to rank 0, or from rank 0 to all others."""
        self._loop.call_soon_threadsafe(self._write, about, value)

    def receive(self, about: str, seconds: float) -> tuple[int, Any]:
        """The next one: from whom, and what. Raises: TimeoutError; ContactLost once any rank has left."""
        with self._changed:
            messages = self._messages[about]
            if not self._changed.wait_for(lambda: messages or self.left, max(seconds, 0.0)):
                raise TimeoutError
            if messages:
                return messages.popleft()
        rank = self.left[0]
        raise ContactLost(self._news[0] if self._news else f"{self.names.get(rank, f'rank {rank}')} has left")

    def end(self, why: str, status: int, *, own: bool = False) -> None:
        """Tell all ranks why the run ends, if nobody has before; `own`: this rank is leaving already."""
        self._quiet |= own
        self._loop.call_soon_threadsafe(self._report, why, status)

    def first(self, seconds: float) -> tuple[str, int] | None:
        """Why the run ends, and with which status, as soon as anybody has said it; None after so long."""
        with self._changed:
            self._changed.wait_for(lambda: self._news, seconds)
        return self._news

    def close(self) -> None:
        """Leave the others; rank 0, with which the store goes, lets them go first, but not for long."""
        self._wait()
        self._run(self._leave())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: len(self.left) >= self.expected, _PATIENCE)

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # ---- in the thread ----

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            about, arrival = json.loads(await reader.readline())
            if not secrets.compare_digest(arrival.pop("token"), self.token):
                raise ValueError("a stranger")
            rank, name = int(arrival["rank"]), f"rank {arrival['rank']} ({arrival['host']})"
        except (ValueError, KeyError, TypeError, AttributeError, OSError, asyncio.CancelledError):
            writer.close()
            return
        if self.full:  # of another run, whose rank 0 did not get this port: it must not end this one when it leaves
            verdict = [self.full.format(stranger=name), REFUSED, []]
            writer.writelines([_line(ARRIVALS, verdict), _line(_LEFT, self.rank)])
            writer.close()
            return
        self.names.setdefault(rank, name)
        self._links[writer] = rank
        writer.writelines(self._sent.values())
        self._keep(about, rank, arrival)
        with suppress(asyncio.CancelledError):  # of which asyncio would print the traceback
            await self._serve(rank, reader, writer)

    async def _serve(self, rank: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read what comes from `rank` until its connection ends, as announced or not."""
        announced = False
        with suppress(OSError):
            async for line in reader:
                about, value = json.loads(line)
                if announced := about == _LEFT and value == rank:
                    break
                elif about == _LEFT:
                    self._forget(value)
                elif about == _ENDS:
                    self._learn(*value)
                else:
                    self._keep(about, rank, value)
        self._links.pop(writer)
        writer.close()
        if not announced:
            name = self.names.get(rank, f"rank {rank}")
            self._learn(f"{name} has left without a word: killed, or ended outside Python", CRASHED)
        self._forget(rank)

    def _keep(self, about: str, rank: int, value: Any) -> None:
        with self._changed:
            self._messages[about].append((rank, value))
            self._changed.notify_all()

    def _report(self, why: str, status: int) -> None:
        if self.rank == 0 or 0 in self.left:  # who knows what was first; without it everybody for themselves
            self._learn(why, status)
        else:
            self._write(_ENDS, [why, status])

    def _learn(self, why: str, status: int) -> None:
        if self._news is not None:
            return
        with self._changed:
            self._news = why, status
            self._changed.notify_all()
        if self.rank == 0:
            self._write(_ENDS, [why, status])
        if self._listener is not None and not self._quiet:
            threading.Thread(target=self._listener.leave, args=(why, status), daemon=True).start()

    def _forget(self, rank: int) -> None:
        """Nobody waits any more for what everybody would have to send."""
        with self._changed:
            self.left.append(rank)
            self._changed.notify_all()
        if self.rank == 0:
            self._write(_LEFT, rank)

    def _write(self, about: str, value: Any) -> None:
        line = _line(about, value)
        if about in (ARRIVALS, _ENDS):
            self._sent[about] = line
        for writer in self._links:
            writer.write(line)

    async def _leave(self) -> None:
        self._listener = None  # who leaves need not hear that the others close their ends
        if self._door is not None:
            self._door.close()
        self._write(_LEFT, self.rank)
        for writer in [*self._links]:
            with suppress(OSError, TimeoutError):
                await asyncio.wait_for(writer.drain(), 1.0)
            writer.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)


class StarGroup:
    """All ranks, for small values alone: they go to rank 0, and what it makes of them comes back."""

    def __init__(self, star: Star, name: str, timeout: timedelta) -> None:
        self.name, self.rank, self.size = name, star.rank, star.size
        self._star, self._about, self._seconds = star, f"group {name}", timeout.total_seconds()

    def gather_values(self, value: Any, summary: Callable[[list[Any]], Any] = list) -> Any:
        deadline, waiting = time.monotonic() + self._seconds, "rank 0"
        values = {0: json.loads(json.dumps(value))}
        try:
            if self.rank:
                self._star.post(self._about, value)
                return self._star.receive(self._about, self._seconds)[1]
            while len(values) < self.size:
                waiting = f"rank {min(set(range(self.size)) - values.keys())}"
                rank, value = self._star.receive(self._about, deadline - time.monotonic())
                values[rank] = value
        except TimeoutError:
            text = f"timed out after {self._seconds:g} s waiting for {waiting} in group {self.name}"
            raise ContactLost(text) from None
        result = json.loads(json.dumps(summary([values[rank] for rank in range(self.size)])))
        self._star.post(self._about, result)
        return result
