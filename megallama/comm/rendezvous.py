"""How the ranks of a run find one another, stay in contact until they leave, and learn why that fails.

In torch's TCPStore rank 0 says how to reach its `Star`: one connection from every rank, which says who
it is by an `Arrival`.  Rank 0's verdict: go on, or a sentence that all raise.  Process groups do not know
who broke them; here the kernel closes a dead rank's connection, and the first reason to stop reaches all.
A message is a line of JSON, [what about, value]; a thread reads and writes them.
"""

import asyncio
import json
import os
import re
import secrets
import socket
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from megallama.comm.flight_record import LIMIT, FlightRecord
from megallama.comm.group import ContactLost
from megallama.config.errors import LaunchError, LostError, ranges

_ARRIVALS = "arrivals"  # to rank 0: who somebody is; from rank 0: its verdict
_ENDS, _LEFT = "ends", "left"  # why the run ends, and its status; a rank whose connection ends
CRASHED, _REFUSED, SAVED = 1, 2, 75  # exit statuses
_LONGEST = 1 << 30  # bytes of a message
_PATIENCE = 10.0  # seconds for the others to leave before rank 0 does
VERDICT_ROUNDS = 16  # looks, 0.05 s apart


def _line(about: str, value: Any) -> bytes:
    return json.dumps([about, value]).encode() + b"\n"


class Listener(Protocol):
    """Tells what asks this rank to stop, and leaves, in its own thread, when all do."""

    def listen(self, tell: Callable[[str], None]) -> None: ...
    def leave(self, why: str, status: int) -> None: ...
    def before_leaving(self, act: Callable[[str, int], None]) -> None: ...


class Star:
    """One rank's end of the star: rank 0 holds all connections, the others one."""

    def __init__(
        self, rank: int, size: int, host: str, listener: Listener | None = None, record: FlightRecord | None = None
    ) -> None:
        self.rank, self.size, self.record = rank, size, record or FlightRecord()
        self.token = secrets.token_hex(16)  # rank 0's is for those who connect
        self.names = {rank: f"rank {rank} ({host})"}
        self.expected = size - 1 if rank == 0 else 0  # connections that end before it leaves
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
        """The others: connect to rank 0, as this arrival. Raises: OSError."""
        opening = asyncio.open_connection(host, port, limit=_LONGEST)
        reader, writer = self._run(asyncio.wait_for(opening, seconds))
        self._links[writer] = 0
        self.post(_ARRIVALS, arrival | {"token": self.token})
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
        """The next, and from whom. Raises: TimeoutError; ContactLost once a rank has left."""
        with self._changed:
            messages = self._messages[about]
            if not self._changed.wait_for(lambda: messages or self.left, max(seconds, 0.0)):
                raise TimeoutError
            if messages:
                return messages.popleft()
        rank = self.left[0]
        raise ContactLost(self._news[0] if self._news else f"{self.names.get(rank, f'rank {rank}')} has left")

    def end(self, why: str, status: int, *, own: bool = False) -> None:
        """Tell all ranks why the run ends, if nobody has; `own`: this rank is leaving already."""
        self._quiet |= own
        self._loop.call_soon_threadsafe(self._report, why, status)

    def first(self, seconds: float) -> tuple[str, int] | None:
        """Why the run ends, and its status, once anybody has said it; None after so long."""
        with self._changed:
            self._changed.wait_for(lambda: self._news, seconds)
        return self._news

    def close(self) -> None:
        """Leave the others; rank 0, with the store, lets them go first, for a moment."""
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
        if self.full:  # of another run, which did not get this port: it must not end this one
            verdict = [self.full.format(stranger=name), _REFUSED, []]
            writer.writelines([_line(_ARRIVALS, verdict), _line(_LEFT, self.rank)])
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
            why = f"{self.names.get(rank, f'rank {rank}')} has left without a word: killed, or ended outside Python"
            self._learn(await self._verdict() or why, CRASHED)
        self._forget(rank)

    async def _verdict(self) -> str:
        """What the supervisors know of a death, which is more: they have a moment for it."""
        for _ in range(VERDICT_ROUNDS * self.record.watched):
            if verdict := self.record.told("verdict"):
                return str(verdict["text"])
            await asyncio.sleep(0.05)
        return ""

    def _keep(self, about: str, rank: int, value: Any) -> None:
        with self._changed:
            self._messages[about].append((rank, value))
            self._changed.notify_all()

    def _report(self, why: str, status: int) -> None:
        if self.rank == 0 or 0 in self.left:  # who knows what was first; else each for itself
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
        if about in (_ARRIVALS, _ENDS):
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
    """All ranks, for small values: they go to rank 0, what it makes of them comes back."""

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


@dataclass(frozen=True)
class Arrival:
    """What a rank says about itself when it arrives."""

    rank: int
    world_size: int
    host: str
    pid: int
    torch: str
    device: str = "cpu"
    gpu: str = ""  # identity of the GPU, where two ranks must not share one
    cores: str = ""  # identity of the set of cores this process may use
    config: str = ""
    problem: str = ""
    record: list[int] = field(default_factory=list)  # its supervisor's process, and files there
    near: str = ""  # the CPUs near its GPU, of those that it may use

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.host})"


def open_store(
    host: str, port: int, port_file: Path | None, store_host: bool, rank: int, seconds: float
) -> dist.TCPStore:
    """Rank 0's store: as a client or its host, which listens on loopback alone if that is `host`.

    Into a `port_file`, of ranks on one machine, it then writes which free port it took; `port` is 0.
    Raises: LaunchError if the port is taken or rank 0 cannot be reached within `seconds`.
    """
    deadline, listener = time.monotonic() + seconds, None
    if port_file is not None and not store_host:
        port = _read_port(port_file, rank, seconds, deadline)
    left = timedelta(seconds=max(0.1, deadline - time.monotonic()))
    try:
        if store_host and host == "127.0.0.1":
            door = socket.create_server((host, port), backlog=4096)
            port, listener = door.getsockname()[1], door.detach()
        if store_host and port_file is not None:
            with tempfile.NamedTemporaryFile("w", dir=port_file.parent, prefix=port_file.name, delete=False) as file:
                file.write(str(port))
            os.replace(file.name, port_file)
        named: dict[str, Any] = {"wait_for_workers": False, "master_listen_fd": listener}
        make = partial(dist.TCPStore, host, port, None, store_host, left, **named)
        return _made_within(left + timedelta(seconds=1), make)
    except (RuntimeError, ValueError, OSError) as error:
        text = str(error).splitlines()[0]
        if port_file is not None and isinstance(error, OSError):
            raise LaunchError(f"cannot write the port of rank 0 to {port_file}: {text}; set TMPDIR") from error
        if store_host and ("in use" in text or "EADDRINUSE" in text):
            raise LaunchError(
                f"port {port} of {host} is taken, perhaps by another run; set MASTER_PORT to a free port on every rank"
            ) from error
        raise LostError(
            f"rank {rank} ({socket.gethostname()}) could not reach rank 0 at {host}:{port} within {seconds:g} s "
            f"(run.init_timeout_seconds): rank 0 never started or has given up (its output says why), or "
            f"MASTER_ADDR and MASTER_PORT differ between ranks ({text})"
        ) from error


def _made_within(limit: timedelta, make: Callable[[], dist.TCPStore]) -> dist.TCPStore:
    """What `make` returns or raises, or RuntimeError: torch waits endlessly for a greeting."""
    made = Future[dist.TCPStore]()

    def work() -> None:
        try:
            made.set_result(make())
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            made.set_exception(error)

    threading.Thread(target=work, name="store", daemon=True).start()
    try:
        return made.result(limit.total_seconds())
    except TimeoutError:
        raise RuntimeError("another program listens there, or the network loses what is sent") from None


def port_file(key: str) -> Path:
    """Where rank 0 of the run `key` publishes its port to this machine's ranks."""
    return Path(tempfile.gettempdir()) / f"megallama-{os.getuid()}-{re.sub(r'[^A-Za-z0-9.-]', '-', key)}"


def _read_port(path: Path, rank: int, seconds: float, deadline: float) -> int:
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError):
            if path.stat().st_uid == os.getuid():  # nobody else can hand us a port
                return int(path.read_text())
        time.sleep(0.02)
    raise LaunchError(
        f"rank 0 never arrived within {seconds:g} s (run.init_timeout_seconds): rank {rank} found no "
        f"{path}; look at the output of rank 0, and where a script stands between mpirun and python set MASTER_PORT"
    )


def rendezvous(star: Star, store: dist.Store, own: Arrival, address: str, seconds: float) -> list[Arrival]:
    """Connect this rank to the others and wait for all; their arrivals in rank order.

    Raises: LaunchError if rank 0 cannot be reached; on all who arrived, with what rank 0 found wrong.
    """
    loopback, port = address in ("127.0.0.1", "localhost", "::1"), 0
    try:
        if own.rank == 0:
            store.set("star", json.dumps([star.open(loopback), star.token]))
        else:
            store.wait(["star"], timedelta(seconds=seconds))
            port, star.token = json.loads(store.get("star"))
            star.record.words[LIMIT] = int(1e9 * seconds)  # now its end is told to the others
            star.connect("127.0.0.1" if loopback else address, port, asdict(own), seconds)
    except (RuntimeError, OSError) as error:
        raise LostError(
            f"{own.name} could not reach rank 0 at {address}:{port} within {seconds:g} s "
            f"(run.init_timeout_seconds): it has given up (its output says why), or the network between the nodes "
            f"lets only some ports through ({str(error).partition(chr(10))[0] or type(error).__name__})"
        ) from error
    star.attend()
    try:
        if own.rank == 0:
            verdict = _collect(star, own, seconds)
            if not verdict[0]:
                star.full = (
                    f"{{stranger}} came to {address}, where all {own.world_size} ranks of a run have arrived already; "
                    f"two runs share one address: give each run its own MASTER_PORT"
                )
            star.post(_ARRIVALS, verdict)
        else:
            verdict = star.receive(_ARRIVALS, seconds + 30)[1]
    except (TimeoutError, ContactLost) as error:
        raise LostError(f"{own.name} lost rank 0 while the ranks were gathering: {error}") from error
    problem, status, everyone = verdict
    if problem:
        refused = LaunchError(problem)
        refused.shared, refused.status = bool(everyone), status  # a stranger says it itself
        raise refused
    arrivals = [Arrival(**arrival) for arrival in everyone]
    star.names = {arrival.rank: arrival.name for arrival in arrivals}
    return arrivals


def _collect(star: Star, own: Arrival, seconds: float) -> tuple[str, int, list[dict[str, Any]]]:
    """Rank 0's verdict: what is wrong with those who came, its status, and who they are."""
    arrived, problem, status = {0: own}, own.problem, LaunchError.status
    deadline = time.monotonic() + seconds
    while not problem and len(arrived) < own.world_size:
        try:
            other = Arrival(**star.receive(_ARRIVALS, deadline - time.monotonic())[1])
            problem = _compare(arrived, other)
            arrived.setdefault(other.rank, other)
        except TimeoutError:
            star.expected = len(arrived) - 1  # the others are not waited for any more
            problem = _missing(arrived, own.world_size, seconds)
        except ContactLost as error:
            problem, status = str(error), CRASHED
    return problem, status, [asdict(arrived[rank]) for rank in sorted(arrived)]


_SAME = {  # what must be the same on every rank; what is said where rank 0 has a and another b
    "world_size": "{first} was started as one of {a} ranks, {new} as one of {b}; "
    "start every process with the same number of ranks",
    "torch": "{first} has torch {a}, {new} has {b}; use the same environment on every node",
    "device": "{first} runs on {a}, {new} on {b}; set run.device=cpu, or give every rank a GPU",
    "config": "{first} and {new} have different configurations ({a} and {b}); "
    "start every rank with the same file and overrides",
}


def _compare(arrived: dict[int, Arrival], new: Arrival) -> str:
    """What is wrong about a new arrival among those before it; empty if nothing."""
    first, old = arrived[0], arrived.get(new.rank)
    if new.problem:
        return new.problem
    if old is not None:
        return (
            f"two processes are rank {new.rank}: {old.host} pid {old.pid} and {new.host} pid {new.pid}; either a rank "
            f"was started twice or two runs share one address: give each run its own MASTER_PORT"
        )
    for name, text in _SAME.items():
        if (a := getattr(first, name)) != (b := getattr(new, name)):
            return text.format(first=first.name, new=new.name, a=a, b=b)
    if same := [other.rank for other in arrived.values() if new.gpu and other.gpu == new.gpu]:
        use = "start one process per GPU, or run with run.device=cpu"
        return f"ranks {same[0]} and {new.rank} ({new.host}) use the same GPU; {use}"
    return ""


def _missing(arrived: dict[int, Arrival], world_size: int, seconds: float) -> str:
    hosts = list(dict.fromkeys(arrived[rank].host for rank in sorted(arrived)))
    by_host = ((host, [rank for rank in sorted(arrived) if arrived[rank].host == host]) for host in hosts[:16])
    here = ", ".join(f"{ranges(ranks)} ({host})" for host, ranks in by_host) + " ..." * (len(hosts) > 16)
    missing = [rank for rank in range(world_size) if rank not in arrived]
    return (
        f"{'rank' if len(missing) == 1 else 'ranks'} {ranges(missing)} never arrived within {seconds:g} s "
        f"(run.init_timeout_seconds); arrived: {here}; look at the output of the missing ranks"
    )
