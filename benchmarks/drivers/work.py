"""The work every driver does, and how a step is timed: shapes, layouts, tokens, one JSON line.

A step is forward, backward, clipping at 1.0 and AdamW (lr 3e-4, betas 0.9 and 0.95, decay 0.1) on
fixed random tokens, without activation recomputation.

Shapes (hidden, layers, heads, ffn, vocabulary, sequence, micro-batch) and layouts:

    a  1 process x 2 threads, one micro-batch
    b  dp 2: each rank has its own micro-batch
    c  tp 2, one micro-batch
    d  pp 2, 4 micro-batches
    e  tp 2 x pp 2, 4 micro-batches

Run by `benchmarks/step.py` in one process per rank with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
and OMP_NUM_THREADS set; alone, a driver runs layout a.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One model and its micro-batch."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    vocab: int
    seq: int
    micro_batch: int


@dataclass(frozen=True)
class Layout:
    """Ranks and micro-batches per replica and step."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    microbatches: int = 1
    threads: int = 1

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.tp * self.pp * self.dp


SHAPES = {"S": Shape(256, 4, 4, 688, 4096, 256, 8), "M": Shape(768, 12, 12, 2048, 32000, 512, 2)}
LAYOUTS = {
    "a": Layout(threads=2),
    "b": Layout(dp=2),
    "c": Layout(tp=2),
    "d": Layout(pp=2, microbatches=4),
    "e": Layout(tp=2, pp=2, microbatches=4),
}
WARM_UP = 2
LR, BETAS, EPS, DECAY, CLIP = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


@dataclass(frozen=True)
class Job:
    """What this process was asked to measure."""

    shape: Shape
    layout: Layout
    dtype: str
    steps: int
    variant: str
    rank: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the whole job in one step."""
        return self.shape.micro_batch * self.shape.seq * self.layout.dp * self.layout.microbatches


def arguments(layouts: str, variants: tuple[str, ...] = ("default",)) -> Job:
    """Parse the command line of a driver that can do `layouts`, set the threads, meet the other ranks."""
    import torch
    import torch.distributed as dist

    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="S")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--layout", choices=list(layouts), default=layouts[0])
    parser.add_argument("--steps", type=int, default=7, help=f"the first {WARM_UP} are not counted")
    parser.add_argument("--variant", choices=variants, default=variants[0])
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        parser.error(f"--steps {args.steps} leaves nothing to count after {WARM_UP} warm-up steps; use 3 or more")
    layout = LAYOUTS[args.layout]
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size != layout.ranks:
        parser.error(f"layout {args.layout} needs {layout.ranks} processes; WORLD_SIZE is {size}")
    torch.set_num_threads(layout.threads)
    torch.manual_seed(0)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29588")):
        os.environ.setdefault(name, value)
    dist.init_process_group("gloo")
    return Job(SHAPES[args.shape], layout, args.dtype, args.steps, args.variant, rank)


def batch(job: Job, seed: int = 0) -> tuple[object, object]:
    """Fixed random tokens of one micro-batch and their successors, int64 [micro-batch, sequence] each."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shape = job.shape
    tokens = torch.randint(shape.vocab, (shape.micro_batch, shape.seq + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def run(job: Job, step: Callable[[], float]) -> None:
    """Time `job.steps` calls of `step` (which returns the loss) between barriers; rank 0 prints the result."""
    import torch.distributed as dist

    seconds: list[float] = []
    losses: list[float] = []
    for _ in range(job.steps):
        dist.barrier()
        start = time.perf_counter()
        loss = step()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
        losses.append(loss)
    output: list[float | None] = [None] * job.layout.ranks
    dist.all_gather_object(output, losses[-1])
    if job.rank == 0:
        # with pipelines only the last stage knows the loss: the others say 0
        print(json.dumps(result(job.tokens_per_step, seconds, max(x or 0.0 for x in output))), flush=True)
    with contextlib.suppress(RuntimeError):  # the others have left already
        dist.barrier()
    os._exit(0)  # taking down gloo under DistributedDataParallel sometimes hangs


def result(tokens_per_step: int, seconds: list[float], loss: float) -> dict[str, object]:
    """The JSON line: the rate is that of the median step after the warm-up."""
    counted = sorted(seconds[WARM_UP:])
    median = counted[len(counted) // 2]
    return {
        "tokens_per_second": round(tokens_per_step / median, 1),
        "best_tokens_per_second": round(tokens_per_step / counted[0], 1),
        "step_seconds": [round(s, 4) for s in seconds],
        "final_loss": round(loss, 4),
    }
