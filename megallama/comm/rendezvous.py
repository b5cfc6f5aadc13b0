"""How the ranks of a run find one another, and what they learn when that fails.

In a key-value store (torch's TCPStore) rank 0 says how to reach its `Star`.  Every rank connects there
with an `Arrival`.  Rank 0 compares them and sends a verdict: go on, or one sentence that names the
ranks concerned, which then every rank raises.  Only after that are process groups made.
"""

from __future__ import annotations

import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megallama.comm.group import ContactLost
from megallama.comm.star import ARRIVALS, CRASHED, Star
from megallama.config.errors import LaunchError


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

    @property
    def name(self) -> str:
        """As messages call it."""
        return f"rank {self.rank} ({self.host})"


def open_store(
    host: str, port: int, port_file: Path | None, store_host: bool, rank: int, seconds: float
) -> dist.TCPStore:
    """Rank 0's store: as its host or as a client.

    Into a `port_file`, of ranks on one machine, the host writes which free port of the loopback interface it took.
    Raises: LaunchError if the port is taken or rank 0 cannot be reached within `seconds`.
    """
    deadline, listener = time.monotonic() + seconds, None
    if port_file is not None and store_host:
        door = socket.create_server(("127.0.0.1", 0))
        port, listener = door.getsockname()[1], door.detach()
        with tempfile.NamedTemporaryFile("w", dir=port_file.parent, prefix=port_file.name, delete=False) as file:
            file.write(str(port))
        os.replace(file.name, port_file)
    elif port_file is not None:
        port = _read_port(port_file, rank, seconds, deadline)
    left = timedelta(seconds=max(0.1, deadline - time.monotonic()))
    try:
        return dist.TCPStore(host, port, None, store_host, left, wait_for_workers=False, master_listen_fd=listener)
    except (RuntimeError, ValueError) as error:
        text = str(error).splitlines()[0]
        if store_host and ("in use" in text or "EADDRINUSE" in text):
            raise LaunchError(
                f"port {port} of {host} is taken, perhaps by another run; set MASTER_PORT to a free port on every rank"
            ) from error
        raise LaunchError(
            f"rank {rank} ({socket.gethostname()}) could not reach rank 0 at {host}:{port} within {seconds:g} s "
            f"(run.init_timeout_seconds): rank 0 never started or has given up (its output says why), or "
            f"MASTER_ADDR and MASTER_PORT differ between ranks ({text})"
        ) from error


def port_file(key: str) -> Path:
    """Where rank 0 of the run `key` publishes its port to the other ranks of this machine."""
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
            star.connect("127.0.0.1" if loopback else address, port, asdict(own), seconds)
    except (RuntimeError, OSError) as error:
        raise LaunchError(
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
            star.post(ARRIVALS, verdict)
        else:
            verdict = star.receive(ARRIVALS, seconds + 30)[1]
    except (TimeoutError, ContactLost) as error:
        raise LaunchError(f"{own.name} lost rank 0 while the ranks were gathering: {error}") from error
    problem, status, everyone = verdict
    if problem:
        refused = LaunchError(problem)
        refused.shared, refused.status = bool(everyone), status  # a stranger says it itself: rank 0 is not its own
        raise refused
    arrivals = [Arrival(**arrival) for arrival in everyone]
    star.names = {arrival.rank: arrival.name for arrival in arrivals}
    return arrivals


def _collect(star: Star, own: Arrival, seconds: float) -> tuple[str, int, list[dict[str, Any]]]:
    """Rank 0's verdict: what is wrong with those who came, the status it means, and who they are."""
    arrived, problem, status = {0: own}, own.problem, LaunchError.status
    deadline = time.monotonic() + seconds
    while not problem and len(arrived) < own.world_size:
        try:
            other = Arrival(**star.receive(ARRIVALS, deadline - time.monotonic())[1])
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
    for other in arrived.values():
        if new.gpu and other.gpu == new.gpu:
            return (
                f"ranks {other.rank} and {new.rank} ({new.host}) use the same GPU; "
                f"start one process per GPU, or run with run.device=cpu"
            )
    return ""


def _missing(arrived: dict[int, Arrival], world_size: int, seconds: float) -> str:
    by_host: dict[str, list[int]] = {}
    for rank in sorted(arrived):
        by_host.setdefault(arrived[rank].host, []).append(rank)
    here = ", ".join(f"{ranges(ranks)} ({host})" for host, ranks in list(by_host.items())[:16])
    missing = [rank for rank in range(world_size) if rank not in arrived]
    return (
        f"{'rank' if len(missing) == 1 else 'ranks'} {ranges(missing)} never arrived within {seconds:g} s "
        f"(run.init_timeout_seconds); arrived: {here}{' ...' if len(by_host) > 16 else ''}; "
        f"look at the output of the missing ranks"
    )


def ranges(ranks: Sequence[int]) -> str:
    """Sorted numbers, runs of three or more shortened: 0-3, 7, 8."""
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ranks), lambda at: at[1] - at[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
