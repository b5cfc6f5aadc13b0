"""Find slow GPUs, nodes and links before a large run: `srun megallama preflight` (or torchrun, mpirun, alone).

Every rank times products, copies in memory and, with a GPU, between host and device; the ranks of a node an all-reduce;
pairs of nodes messages there and back, every node with two others or, of 8 at most, with all; all at the same time. A
rate is the median of an odd number of rounds; slow is what is more than --percent below the median of all of its kind,
of links the node whose best one is. Exit status: 0; 1 with a line --exclude=HOSTS for srun; 2 where measuring fails.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median, median_high
from typing import Any, NamedTuple

import torch

from megallama.comm.group import Group, Partition
from megallama.comm.launch import detect_launch, start
from megallama.config.errors import LaunchError
from megallama.config.schema import RunConfig

OPTIONS: dict[str, dict[str, Any]] = {
    "--seconds": {"type": float, "default": 60.0, "help": "about how long to measure; default 60"},
    "--percent": {"type": float, "default": 10.0, "help": "how far below the median an outlier is; default 10"},
    "--device": {"choices": ("auto", "cpu", "cuda"), "default": "auto", "help": "default auto"},
    "-o": {"dest": "output", "metavar": "FILE", "help": "write all rates to FILE, as JSON"},
}
ALL_PAIRS, LINK = 8, "between two nodes"  # up to so many nodes every pair is measured
Split = Callable[[str, Partition], Group]  # name, partition -> this rank's group


class Rate(NamedTuple):
    """So much per second, of a part of the machine; before it is measured, so much per round."""

    kind: str
    unit: str
    value: float
    where: str
    hosts: tuple[str, ...]


def preflight(say: Callable[[str], Any], seconds: float, percent: float, device: str, output: str | None) -> int:
    """Measure on all ranks, say the table on rank 0; the exit status. Raises: LaunchError; OSError."""
    run = RunConfig.model_validate({"device": device})
    with start(detect_launch(), run, f"{seconds:g} {percent:g}") as world:
        world.bound(min(1e6, max(60.0, seconds)))  # one kind takes a fraction of `seconds`
        try:
            rates = measure(world.group, world.hosts, world.device, world.open_group, seconds)
        except RuntimeError as error:
            why = [first[0]] if (first := world.failed(error)) else [str(error), *getattr(error, "__notes__", [])]
            raise LaunchError(f"rank {world.rank} broke off: {' '.join(why)}; exclude the stuck host") from error
    lines, slow = judged(rates, percent)
    hosts = sorted({host.partition(".")[0] for rate in slow for host in rate.hosts})  # as Slurm calls them
    lines += ["one rank alone: compare several, under srun, torchrun or mpirun"] * (world.world_size == 1)
    if world.rank == 0:
        say("\n".join([*lines, f"--exclude={','.join(hosts)}" if slow else f"no outlier of {percent:g} % or more"]))
        if output:
            Path(output).write_text(json.dumps({"keys": Rate._fields, "rates": rates, "slow": slow, "exclude": hosts}))
    return 1 if slow else 0


def timed(what: Rate, work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of `work`; a GPU is waited for."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def measure(group: Group, hosts: Sequence[str], device: torch.device, split: Split, seconds: float) -> list[Rate]:
    """All rates, on every rank, in about `seconds`; of what several ranks measure together the lowest."""
    steps, rates = [*alone(device, group.rank, hosts[group.rank]), *together(group, hosts, device, split)], []
    for what, work in steps:
        once = partial(timed, what, work or (lambda: None), device)
        once()  # opens connections, warms up
        slowest = group.gather_values(once(), max)
        rounds = int(min(31, max(3, seconds / len(steps) / max(slowest, 1e-9)))) | 1  # equal on all ranks
        value = what.value / median(once() for _ in range(rounds))
        found = group.gather_values([value, what.where, what.hosts] if work else None)
        lowest = {where: (value, tuple(own)) for value, where, own in sorted(filter(None, found), reverse=True)}
        rates += [Rate(what.kind, what.unit, value, where, own) for where, (value, own) in sorted(lowest.items())]
    return rates


def alone(device: torch.device, rank: int, host: str) -> Iterator[tuple[Rate, Any]]:
    """What a rank does by itself: products of matrices, copies."""
    gpu, here = device.type == "cuda", (f"rank {rank} on {host}", (host,))
    for n, dtype in ((8192, "bfloat16"), (4096, "float32"), (2048, "float32")):
        a = torch.rand(2, n if gpu else n // 8, n if gpu else n // 8, device=device).to(getattr(torch, dtype))
        yield Rate(f"product {dtype} {len(a[0])}", "TFLOP/s", 2 * len(a[0]) ** 3 / 1e12, *here), partial(torch.mm, *a)
    x, y = torch.rand(2, 1 << (28 if gpu else 24), device=device)
    yield Rate("copy", "GB/s", 2 * x.nbytes / 1e9, *here), partial(y.copy_, x)
    if gpu:
        pinned, part = torch.empty(1 << 26, pin_memory=True), x[: 1 << 26]
        yield Rate("host to device", "GB/s", part.nbytes / 1e9, *here), partial(part.copy_, pinned)
        yield Rate("device to host", "GB/s", part.nbytes / 1e9, *here), partial(pinned.copy_, part)


def together(group: Group, hosts: Sequence[str], device: torch.device, split: Split) -> Iterator[tuple[Rate, Any]]:
    """What the ranks of one node and of two do; without work where this rank looks on."""
    names, here = list(dict.fromkeys(hosts)), hosts[group.rank]
    members = [tuple(rank for rank, host in enumerate(hosts) if host == name) for name in names]
    node, data = split("node", members), torch.rand(1 << (26 if device.type == "cuda" else 20), device=device)
    sent = 2 * (node.size - 1) / node.size * data.nbytes / 1e9  # by a rank, in a ring
    reduce = (lambda: node.all_reduce(data, "max").wait()) if node.size > 1 else None
    yield Rate("all-reduce in a node", "GB/s", sent, here, (here,)), reduce
    own = names.index(here)
    for pairs in pairings(len(names)):
        first, second = next((pair for pair in pairs if own in pair), (own, own))
        others, place = members[first + second - own], members[own].index(group.rank)
        ends, rests = (names[first], names[second]), first == second or place >= len(others)
        work = None if rests else partial(_there_and_back, group, data, others[place], own == first)
        yield Rate(LINK, "GB/s", 2 * data.nbytes / 1e9, " - ".join(ends), ends), work


def _there_and_back(group: Group, data: torch.Tensor, peer: int, first: bool) -> None:
    for sends in (first, not first):  # in one order on both ends: NCCL has one queue per pair
        (group.send if sends else group.recv)(data, peer).wait()


def pairings(nodes: int) -> list[list[tuple[int, int]]]:
    """Rounds of pairs in which no node is twice, as in a tournament: one seat stays, the others move on by one."""
    seats, out = nodes + nodes % 2, []  # of an odd number one rests
    for turn in range(seats - 1 if nodes <= ALL_PAIRS else 2 + nodes % 2):
        at = [*((i + turn) % (seats - 1) for i in range(seats - 1)), seats - 1]
        pairs = ((min(at[i], at[-1 - i]), max(at[i], at[-1 - i])) for i in range(seats // 2))
        out.append([pair for pair in pairs if pair[1] < nodes])
    return out if nodes > 1 else []


def judged(rates: Sequence[Rate], percent: float) -> tuple[list[str], list[Rate]]:
    """A line per kind and per outlier; the outliers."""
    lines, slow = list[str](), list[Rate]()
    for kind in dict.fromkeys(rate.kind for rate in rates):
        of = sorted(rate for rate in rates if rate.kind == kind)
        if kind == LINK:
            best = {host: rate for rate in of for host in rate.hosts}
            of = sorted(rate._replace(where=f"links of {host}", hosts=(host,)) for host, rate in best.items())
        usual, low = median_high(rate.value for rate in of), of[0]  # the high one: few slow ones do not shift it
        lines.append(f"{kind:<22}{len(of):>5} x median {usual:.4g} {low.unit}, lowest {low.value:.4g}: {low.where}")
        for rate in (rate for rate in of if rate.value < (1 - percent / 100) * usual):
            slow.append(rate)
            lines.append(f"  slow: {rate.where}, {rate.value:.4g} {rate.unit}, {1 - rate.value / usual:.0%} below")
    return lines, slow
