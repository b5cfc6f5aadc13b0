"""What copies of the state in memory take: bytes, and seconds at the rates that are known."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from megallama.config.errors import counted
from megallama.plan.plan import Plan

COPY_RATE = 10.0  # GB/s of a rank that copies its state into the host's memory: what half a PCIe 4.0 link can


def copies(plan: Plan, per_node: int, step_seconds: float) -> Iterator[tuple[str, str]]:
    """Lines about checkpoint.memory_interval: bytes of the fullest rank, and seconds at COPY_RATE."""
    interval = plan.config.checkpoint.memory_interval
    if not interval:
        return
    state = max(plan.memory(rank).state for rank in range(plan.schedule.num_ranks))
    ranks, seconds = min(per_node, plan.topology.world_size), state / (COPY_RATE * 1e9)
    host = f"{2 * state * ranks / 2**30:.3g} GiB on a node of {counted(ranks, 'rank')}"
    rank = f"{2 * state / 2**30:.3g} GiB per rank"
    yield "copies", f"in memory every {counted(interval, 'step')}, two of them: {rank}, {host}"
    share = seconds / (seconds + interval * step_seconds)
    yield "", f"each takes {seconds:.2g} s at {COPY_RATE:g} GB/s (assumed), {share:.1%} of the time"
    rate = plan.config.checkpoint.buddy_rate
    if rate and plan.topology.world_size > per_node:
        seconds = state / (rate * 1e9)
        least = max(1, ceil(seconds / step_seconds))
        far = f"each is there after {seconds:.2g} s at {rate:g} GB/s"
        text = f"{far}, for which checkpoint.memory_interval={least} leaves the time"
        yield "", f"as much again for another node's copies; {text}"
