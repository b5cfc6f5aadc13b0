"""Real parts of one rank in one process, for measurements on one device: building, filling, timing, pretending.

Everything goes through the program's own assembly: a benchmark adds random weights, random tokens, and groups of
ranks that are not there.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megallama.analysis.recording import FakeGroup  # noqa: E402
from megallama.comm.group import Done, Group, Handle, Op, Partition, Solo, build_groups  # noqa: E402
from megallama.config.load import load  # noqa: E402
from megallama.config.schema import Config  # noqa: E402
from megallama.layers.batch import MicroBatch  # noqa: E402
from megallama.plan.plan import Plan, make_plan  # noqa: E402
from megallama.train.assemble import Worker, assemble, kernels_of  # noqa: E402

NO_GPU = f"error: torch {torch.__version__} finds no GPU; --cpu-check runs all of it on a tiny model, on the CPU"
QUIET = ("lr_schedule.kind=constant", "lr_schedule.warmup_steps=0", "data.synthetic=true")


def measure_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Best FLOP/s of repeated n x n products in about `seconds` (at least two after one to warm up)."""
    n = 8192 if device.type == "cuda" else 768
    generator = torch.Generator(device).manual_seed(0)  # random operands: constant ones let a GPU clock higher
    a = torch.rand(n, n, device=device, generator=generator).to(dtype)
    out = torch.empty_like(a)
    best, runs, begin = float("inf"), 0, time.perf_counter()
    while runs < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed = time.perf_counter() - start
        best, runs = min(best, elapsed) if runs else best, runs + 1
    return 2 * n**3 / best


def config_of(overrides: Sequence[str], ranks: int = 1) -> Config:
    """A checked configuration. Raises: ConfigError."""
    return load(None, [*QUIET, *overrides], ranks=ranks)


def build(config: Config, device: torch.device, ranks: int = 1, rank: int = 0) -> tuple[Worker, tuple[str, ...]]:
    """Rank `rank` of a job of `ranks` on `device`, with random weights; and which kernels were chosen."""
    plan = make_plan(config, ranks)

    def make(name: str, partition: Partition) -> Group:
        members = next(ranks for ranks in partition if rank in ranks)
        return Solo(name, rank) if len(members) == 1 else Pretending(name, members, rank)

    groups = build_groups(plan.topology, rank, config.model.num_kv_heads or 1, make)
    kernels = kernels_of(config, device)
    built = assemble(plan, groups, device, kernels)
    for shard in built.optimizer.shards(owned_only=False):
        master = shard.state["master"]
        master.fill_(1.0) if "norm" in shard.box.key else master.normal_(std=0.02)
    built.optimizer.loaded(0)
    for buffers in built.buffers.values():
        if ranks > 1:  # what other ranks would have sent
            buffers.weights.normal_(std=0.02)
    return built, tuple(f"{c.operation}: {c.selected}" for c in kernels.choices)


class Pretending(FakeGroup):
    """A group whose other members are not there: what they would send is made of what this rank has.

    So every byte of a result is written on the device, by a copy of the right size, but nothing is awaited and
    sums are wrong.
    """

    def all_gather(self, output: Tensor, shard: Tensor) -> Handle:
        with torch.no_grad():  # one kernel, as a collective is one
            own = output.view(self.size, -1)[self.rank]
            source = shard.clone() if own.data_ptr() == shard.data_ptr() else shard
            output.view(self.size, -1).copy_(source.view(1, -1).expand(self.size, -1))
        return Done()

    def reduce_scatter(self, output: Tensor, full: Tensor) -> Handle:
        with torch.no_grad():
            own = full.view(self.size, -1)[self.rank]
            if own.data_ptr() != output.data_ptr():
                output.view(-1).copy_(own)
        return Done()

    def all_reduce(self, tensor: Tensor, op: Op = "sum") -> Handle:
        return Done()

    def recv(self, tensor: Tensor, source: int) -> Handle:
        with torch.no_grad():
            tensor.normal_()
        return Done()


def random_batches(plan: Plan, device: torch.device, seed: int = 0) -> list[MicroBatch]:
    """The micro-batches of one step of one replica, of random tokens, on the device."""
    b, v = plan.config.batch, plan.config.model.vocab_size
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(b.deal(b.global_batch_size, plan.topology.dp)[0]):
        tokens = torch.randint(v, (b.micro_batch_size, b.seq_length + 1), generator=generator)
        out.append(MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).to(device))
    return out


def installed(name: str) -> bool:
    """Whether a package can be found."""
    return importlib.util.find_spec(name) is not None


def synchronize(device: torch.device) -> None:
    """Return when the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(work: Callable[[], Any], device: torch.device, least: float = 0.02, calls: int = 3) -> float:
    """Mean time of `work` on the device, repeated for about `least` seconds after a warm-up."""
    for _ in range(2):
        work()
    synchronize(device)
    start, done = time.perf_counter(), 0
    while done < calls or time.perf_counter() - start < least:
        work()
        done += 1
        if done % 8 == 0:
            synchronize(device)
    synchronize(device)
    return (time.perf_counter() - start) / done


def free(device: torch.device) -> None:
    """Give back what nothing refers to, and begin to count the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Most bytes allocated since `free` (0 on a CPU, where nobody counts)."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def capacity_bytes(device: torch.device) -> int:
    """Memory of the device."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 8 << 30


def describe(device: torch.device) -> dict[str, str]:
    """The device and the versions that matter, for a result file."""
    words = {"device": "CPU", "torch": torch.__version__}
    if device.type == "cuda":
        words |= {"device": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
        words |= {"cudnn": str(torch.backends.cudnn.version())}
    for name in ("transformer_engine", "transformers"):
        if installed(name):
            from importlib.metadata import PackageNotFoundError, version

            try:
                words[name] = version(name.replace("_", "-"))
            except PackageNotFoundError:
                words[name] = "of unknown version"
    return words


def say(**fields: Any) -> None:
    """One JSON line on standard output, at once."""
    print(json.dumps(fields), flush=True)
