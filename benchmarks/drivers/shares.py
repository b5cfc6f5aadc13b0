"""Where the time of a training step goes, by kind: one JSON line from rank 0.

    RANK=0 WORLD_SIZE=1 ... python shares.py KEY=VALUE ...

The settings are those of `python -m megallama.pretrain`; a few steps after the warm-up run under torch's profiler.
Kinds: the products of linear layers; attention with its softmax, rotation and copies; optimizer and gradient norm;
waiting for other ranks; what remains of operations (norms, SwiGLU, loss, copies, additions); and the rest, which is
Python and the data.  Profiling itself adds to the last two.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megallama.comm import c10d
from megallama.comm.launch import detect_launch, start
from megallama.config.load import load
from megallama.plan.plan import make_plan
from megallama.train import loop
from megallama.train.log import Logger
from megallama.train.setup import set_up
from megallama.train.signals import SignalFlag
from megallama.train.step import StepConsensus, train_step

WARM_UP, STEPS = 2, 3
WAIT = "waiting for ranks"
ATTENTION = ("_Blocked", "Rotary", "scaled_dot_product")
PRODUCTS = ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise")
OPTIMIZER = ("aten::_fused_adamw", "aten::linalg_vector_norm")
KINDS = ("products", "attention", "optimizer", WAIT, "other operations", "Python and data")


def kind_of(event: Any) -> str:
    """The kind of one profiled event, by its own name and those of the events around it."""
    names, at = [], event
    while at is not None:
        names.append(at.name)
        at = at.cpu_parent
    if any(part in name for name in names for part in ATTENTION):
        return "attention"
    if WAIT in names:
        return WAIT
    if any(name.startswith(OPTIMIZER) for name in names):
        return "optimizer"
    return "products" if event.name.startswith(PRODUCTS) else "other operations"


def shares(events: Any, seconds: float) -> dict[str, float]:
    """Share of `seconds` of wall time by kind; what no event accounts for is Python and data."""
    spent = dict.fromkeys(KINDS, 0.0)
    for event in events:
        spent[kind_of(event)] += event.self_cpu_time_total / 1e6
    spent[KINDS[-1]] = max(0.0, seconds - sum(spent.values()))
    return {kind: round(value / seconds, 4) for kind, value in spent.items()}


def mark_waits() -> None:
    """Let every wait for another rank appear among the profiled events."""
    plain = c10d.Works.wait

    def wait(self: Any) -> None:
        with record_function(WAIT):
            plain(self)

    c10d.Works.wait = wait  # type: ignore[method-assign]


class Profiled:
    """`train_step`, which profiles some calls, prints the shares and ends the process."""

    def __init__(self, rank: int) -> None:
        self.rank, self.calls, self.start = rank, 0, 0.0
        self.profiler = profile(activities=[ProfilerActivity.CPU])

    def __call__(self, *args: Any, **kwargs: Any) -> StepConsensus:
        if self.calls == WARM_UP:
            self.profiler.__enter__()
            self.start = time.perf_counter()
        result = train_step(*args, **kwargs)
        self.calls += 1
        if self.calls == WARM_UP + STEPS:
            seconds = time.perf_counter() - self.start
            self.profiler.__exit__(None, None, None)
            if self.rank == 0:
                print(json.dumps(shares(self.profiler.events(), seconds)), flush=True)
            torch.distributed.is_initialized() and torch.distributed.barrier()
            os._exit(0)
        return result


def main() -> None:
    launch = detect_launch()
    config = load(None, sys.argv[1:], ranks=launch.world_size)
    mark_waits()
    with start(launch, config.run) as world:
        loop.train_step = Profiled(world.rank)  # type: ignore[assignment]
        log = Logger(1, max(2, world.world_size))  # rank 1 of it: says nothing on standard output
        with set_up(config, make_plan(config, launch.world_size), world, log, SignalFlag()) as setup:
            loop.TrainingLoop(setup).run()


if __name__ == "__main__":
    main()
