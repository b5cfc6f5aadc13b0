"""Start one process per rank on this machine, wait, and say what they used.

Torch is not imported here: the peak memory the kernel reports for a process starts from that of its
parent, which must therefore be small.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


class BenchmarkError(Exception):
    """A measured program failed."""


@dataclass(frozen=True)
class Outcome:
    """What the ranks left behind."""

    stdout: str  # of rank 0
    peak_rss_mib: list[int]  # of each rank
    other_load: float  # cores kept busy by anything else meanwhile, on average


def busy_seconds() -> float:
    """CPU seconds all processes of the machine have used since it started, all cores together."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    user, nice, system, _idle, _iowait, irq, softirq = (int(x) for x in fields[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def wait_for_calm(limit: float) -> None:
    """Return when the other processes have used less than 0.15 core for 2 s, or after `limit` [s]."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        busy = busy_seconds()
        time.sleep(2)
        if busy_seconds() - busy < 0.3:
            return


WAITS = {"io": "the disk", "memory": "memory", "other": "other programs to be calm"}
WORTH_A_LINE = 3.0  # seconds


def stalled(root: Path = Path("/proc/pressure")) -> dict[str, float]:
    """Seconds since the machine started in which some process stood still for want of each; {} if nobody counts."""
    found = {}
    for name in ("io", "memory"):
        try:
            some = (root / name).read_text().splitlines()[0]
        except (OSError, IndexError):
            continue
        found[name] = int(some.rpartition("total=")[2]) / 1e6
    return found


def waits(what: str, before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """A line for every kind of wait of more than a few seconds between two looks: "WHAT: 12.3 s for the disk"."""
    grown = {name: seconds - before.get(name, seconds) for name, seconds in after.items()}
    return [f"{what}: waited {s:.1f} s for {WAITS[name]}" for name, s in grown.items() if s > WORTH_A_LINE]


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def launch(
    command: Sequence[str],
    ranks: int,
    threads: int,
    *,
    env: Mapping[str, str] | None = None,
    timeout: float = 600.0,
    done: Callable[[], bool] | None = None,
) -> Outcome:
    """Run `command` in `ranks` processes of `threads` threads until all have ended.

    `done` is asked twice a second; when it says True the ranks are killed, which is then a success.
    Raises: BenchmarkError with the end of what a rank said if one fails or `timeout` [s] passes.
    """
    base = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PMI_", "OMPI_"))}
    base |= {"OMP_NUM_THREADS": str(threads), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **(env or {})}
    start, busy = time.monotonic(), busy_seconds()
    with tempfile.TemporaryDirectory() as folder:
        output = [Path(folder) / f"{rank}.{kind}" for rank in range(ranks) for kind in ("out", "err")]
        processes = []
        for rank in range(ranks):
            with output[2 * rank].open("wb") as out, output[2 * rank + 1].open("wb") as err:
                own = base | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(subprocess.Popen(command, env=own, stdout=out, stderr=err))
        try:
            used = _wait([p.pid for p in processes], start + timeout, done)
        except BaseException:
            for process in processes:
                process.kill()
            raise
        seconds, busy = time.monotonic() - start, busy_seconds() - busy
        stopped = used is None
        texts = [path.read_text(errors="replace") for path in output]
        for process in processes:
            process.returncode = 0  # reaped by _wait
    if stopped or any(code for code, _, _ in used or ()):
        raise BenchmarkError(f"{' '.join(command)}\nfailed or ran out of time:\n{''.join(texts)[-3000:]}")
    assert used is not None
    other = max(0.0, busy - sum(cpu for _, cpu, _ in used)) / seconds
    return Outcome(texts[0], [rss // 1024 for _, _, rss in used], round(other, 2))


def _wait(pids: Sequence[int], deadline: float, done: Callable[[], bool] | None) -> list[tuple[int, float, int]] | None:
    """(exit status, CPU seconds, peak KiB) of each process; None if time ran out. A failure ends all of them."""
    ended: dict[int, tuple[int, float, int]] = {}
    killed = late = False
    while len(ended) < len(pids):
        for pid in [p for p in pids if p not in ended]:
            which, status, usage = os.wait4(pid, os.WNOHANG)
            if which:
                code = 0 if killed else os.waitstatus_to_exitcode(status)
                ended[pid] = (code, usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
        failed = any(code for code, _, _ in ended.values())
        late = late or time.monotonic() > deadline
        if failed or late or (done is not None and not killed and done()):
            killed = killed or not failed
            for pid in [p for p in pids if p not in ended]:
                os.kill(pid, signal.SIGKILL)
        if len(ended) < len(pids):
            time.sleep(0.1 if killed or failed else 0.5)
    return None if late else [ended[pid] for pid in pids]
