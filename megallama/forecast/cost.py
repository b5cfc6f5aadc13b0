"""Seconds of the pieces of one training step: layers, head, stages, transfers, gradients, optimizer; and the pipeline.

Context parallelism has its formulas in docs/planner.md.

1F1B with unequal stages T_i and transfers that take `hop` without occupying anybody: stage i holds
one micro-batch more than stage i+1, so of a run of k neighbouring stages k micro-batches make the
round trip in each period,

    period = max over i <= j of (T_i + ... + T_j + 2 (j-i) hop) / (j-i+1),
    time   = (m-1) period + sum_i T_i + 2 (p-1) hop.

Korthikanti et al. 2022 (arXiv:2205.05198); Narayanan et al. 2021 (arXiv:2104.04473); Qi et al. 2023
(arXiv:2401.10241, table 2); bus bandwidth: nccl-tests, doc/PERFORMANCE.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import ceil, log2
from typing import NamedTuple

from megallama.forecast.hardware import Hardware
from megallama.forecast.job import Job, built
from megallama.plan.timeline import StageCost, simulate

TILE, WAVE = 128, 128  # rows of a tile; tiles of attention that a GPU does at a time
OPTIMIZER_BYTES = 30.0  # read and written per parameter: fp32 weight, two moments and gradient, bf16 weight
EVENTS = 40_000  # of a schedule that is run whole; of a longer one as many micro-batches, continued at their pace


class CostItem(NamedTuple):
    """Seconds of a kind of work for a micro-batch: forward, input gradient, weight gradient, again."""

    name: str
    forward: float
    input_grad: float
    weight_grad: float
    again: float = 0.0


class Pricer:
    """The prices of one job on one kind of hardware."""

    def __init__(self, job: Job, hardware: Hardware) -> None:
        self.job, self.gpu = job, hardware.gpu
        self.kernel, self.stack = hardware.kernels[job.kernel], hardware.stacks[job.stack]
        self.peak = self.gpu.peak_tflops * 1e12
        self.memory_rate = self.gpu.memory_gb_per_s * 1e9 * self.gpu.bandwidth
        self.add_up = self.stack.accumulate / job.tp / self.memory_rate  # a parameter's gradient to those before
        self.node_rate = self.gpu.nvlink_gb_per_s * 1e9 * self.gpu.tp_bus
        self.nic_rate = (job.network_gbit or self.gpu.nic_gbit) / 8 * 1e9 * self.gpu.nic * self.stack.network

    def layer(self) -> list[CostItem]:
        """The work of one layer on one rank for one micro-batch."""
        job, kernel, stack, full = self.job, self.kernel, self.stack, self.job.recompute == "full"
        t, tokens, h, f, up = job.tp, job.tokens, job.hidden, job.ffn, 2 if job.gated else 1
        shapes = ((h, (job.width + 2 * job.kv_width) / t), (job.width / t, h), (h, up * f / t), (f / t, h))
        matrices = sum(self.product(tokens, k, n) for k, n in shapes)
        peak, scores = self.peak * self.gpu.attention, 4.0 * tokens * job.seq * job.width / t
        if kernel.causal:
            attention, backward = scores / 2 / (peak * kernel.forward), 2.5 * scores / 2 / (peak * kernel.backward)
        else:
            memory = kernel.passes * 2.0 * tokens * job.seq * job.heads / t / (self.gpu.memory_gb_per_s * 1e9)
            attention = scores / (peak * kernel.forward) + memory
            backward = 2 * (scores / (peak * kernel.backward) + memory)
        slow = (kernel.unaligned if job.width // job.heads % 8 else 1.0) * self.chunked()
        core_again = full or (job.recompute == "selective" and not kernel.causal)
        residual = stack.residual * tokens * h / (t if job.sequence_parallel else 1) / self.memory_rate
        inner = stack.inner * tokens * (job.width + job.kv_width + up * f) / t / self.memory_rate
        reuse = job.llama_way * (residual + inner / 3) / 2
        tp, launch = self.tensor_parallel(), stack.launch_us * 1e-6
        cp = self.context_parallel(slow * attention, slow * backward)
        return [
            CostItem("matrices", matrices, matrices, matrices, full * matrices),
            CostItem("attention", slow * attention, slow * backward, 0.0, core_again * slow * attention),
            CostItem("elementwise", residual + inner, 1.5 * (residual + inner), 0.0, full * (residual + inner) + reuse),
            CostItem("gradient sums", 0.0, 0.0, job.layer_matrix * self.add_up),
            CostItem("launch", launch, launch, launch, full * launch),
            CostItem("tp comm", tp, tp, 0.0, full * tp),
            *[CostItem("cp comm", *cp[:2], 0.0, full * cp[0])][: job.cp > 1],
        ]

    def head(self) -> CostItem:
        """The output head and the loss for one micro-batch."""
        job = self.job
        gemm = self.product(job.tokens, job.hidden, job.vocab / job.tp)
        logits = (self.stack.head / job.tp + self.stack.whole) * job.tokens * job.vocab / self.memory_rate / 2
        return CostItem("head and loss", gemm + logits, gemm + logits, gemm + job.vocab * job.hidden * self.add_up)

    def product(self, m: float, k: float, n: float) -> float:
        """One matrix product [m, k] x [k, n]."""
        rate = self.peak * self.gpu.gemm * self.stack.speed * (self.stack.fp8 if self.job.fp8 else 1.0)
        filled = (ceil(n / TILE) * TILE) * (ceil(k / TILE) * TILE)
        return 2.0 * m * filled / rate * (1 + self.gpu.small * (1 / m + 1 / n + 1 / k))

    def tensor_parallel(self) -> float:
        """Exposed collectives of a layer in one direction: two all-reduces, or their bytes."""
        job = self.job
        rate = self.node_rate if job.tp <= self.gpu.gpus_per_node else self.nic_rate
        moved = 4 * (job.tp - 1) / job.tp * 2.0 * job.tokens * job.hidden
        return (job.tp > 1) * (1 - self.stack.tp_overlap * job.hide_tp) * (moved / rate + 2e-6 * self.gpu.tp_latency_us)

    def context_parallel(self, forward: float, backward: float) -> tuple[float, float]:
        """Exposed exchange of one layer, in its forward and its backward; it may hide under their attention [s]."""
        job, by_heads, share = self.job, self.job.exchange == "heads", self.stack.cp_overlap
        pieces = 1 if by_heads else job.cp_pieces
        once = pieces * self.over_cp(2.0 * job.exchanged / pieces)
        again, first = (not (by_heads or job.keep_kv)) * once, (1 + by_heads) * once
        back, later = first + again, 1 - 1 / pieces  # gradients are summed without a piece to hide under
        return first - min(max(share, later) * first, forward), back - min(max(share * back, later * again), backward)

    def over_cp(self, nbytes: float) -> float:
        """One collective over cp of a tensor of so many bytes: gathered, or what a rank has for others."""
        c, stride, latency = self.job.cp, self.job.stride or self.job.tp, self.gpu.tp_latency_us * 1e-6
        members = max(1, self.gpu.gpus_per_node // stride)
        if self.job.exchange == "heads" and c > members:
            return nbytes * (c - members) / c / self.nic_rate + latency
        return nbytes * (c - 1) / c / self._ring_rate(c, stride) + latency

    def chunked(self) -> float:
        """How much longer than of whole sequences attention takes: a GPU idles for a quarter of a wave."""
        job, ends = self.job, 2 if self.job.exchange == "gather" else 1
        waves = job.tokens * job.heads / job.tp / TILE / WAVE  # of tiles of all of a rank's queries
        return (1 + ends / 4 / waves) / (1 + 1 / 4 / (waves * job.cp)) if job.cp > 1 else 1.0

    def hop(self) -> float:
        """One activation from stage to stage."""
        job = self.job
        rate = self.node_rate if job.gpus <= self.gpu.gpus_per_node else self.nic_rate
        cut = job.tp if job.sequence_parallel or self.stack.scatter_gather else 1
        return (job.pp > 1) * (2.0 * job.tokens * job.hidden / cut / rate + self.gpu.hop_latency_us * 1e-6)

    def stages(self, *, blocking: bool = True) -> tuple[StageCost, ...]:
        """Seconds of every stage for one micro-batch, with the transfers that a rank waits for."""
        parts, head = self.layer(), self.head()
        forward, weight = sum(p.forward for p in parts), sum(p.weight_grad for p in parts)
        back = sum(p.input_grad + p.again for p in parts)
        wait = blocking * self.stack.blocking * self.hop()
        out = [StageCost(n * forward + wait, n * back + wait, n * weight) for n in self.job.stages]
        out[-1] = StageCost(*(a + b for a, b in zip(out[-1], head[1:4], strict=True)))
        return tuple(out)

    def data_parallel(self) -> float:
        """Communication of gradients and parameters per step, before any hiding."""
        job, stack, d = self.job, self.stack, self.job.dp * self.job.cp
        moved = stack.grad_bytes + stack.param_bytes if job.sharding != "none" else 2 * stack.grad_bytes
        leaves = max(1.0, d * job.tp / self.gpu.gpus_per_node / self.gpu.leaf_nodes)
        each = moved * (d - 1) / d / self._ring_rate(d, job.tp) + stack.ring_ns * 1e-9 * log2(leaves)
        return (d > 1) * job.rank_parameters * each

    def gathering(self) -> float:
        """Communication per micro-batch where parameters (zero3: twice) or gradients are cut over dp."""
        passes, d = {"zero3": 3, "zero2": 1}.get(self.job.sharding, 0), self.job.dp * self.job.cp
        return passes * 2.0 * self.job.rank_parameters * (d - 1) / d / self._ring_rate(d, self.job.tp)

    def optimizer(self) -> float:
        """Reading and writing the optimizer state of a step."""
        cut = self.job.dp * self.job.cp if self.job.sharding != "none" else 1
        return self.job.rank_parameters / cut * OPTIMIZER_BYTES / self.memory_rate

    def _ring_rate(self, ranks: int, stride: int) -> float:
        members = max(1, self.gpu.gpus_per_node // stride)  # that a node has room for
        return self.node_rate if ranks <= members else min(self.node_rate, members * self.nic_rate)


def closed_form(job: Job, costs: Sequence[StageCost], hop: float) -> float:
    """Seconds of all micro-batches of a step."""
    p, m, name = job.pp, job.num_microbatches, job.schedule
    ranks = [sum(sum(costs[s]) for s in job.owned[r]) for r in range(p)]
    busiest, mean = max(ranks), sum(ranks) / p
    f, i, w = (sum(c[k] for c in costs) / p for k in range(3))
    idle = {
        "zb-h1": f + i - w, "zb-1p": f + i - w, "zb-h2": f + i - 2 * w, "zb-2p": 0.0, "zb-v": (f + i - 2 * w) / 2,
        "dualpipe-v": (f + i - 2 * w) / 2, "v-half": (f + i + w) / 2,
    }.get(name)  # fmt: skip
    if idle is not None:
        return m * busiest + (p - 1) * (max(0.0, idle) + (4 if name in ("zb-h1", "zb-1p") else 2) * hop)
    if job.chunks > 1:
        return m * busiest + (p - 1) * (mean / job.chunks + 2 * hop) + 2 * (job.chunks - 1) * p * hop
    sums = [0.0, *accumulate(ranks)]
    runs = ((i, j) for j in range(p) for i in range(max(0, j + 1 - m), j + 1))
    period = max((sums[j + 1] - sums[i] + 2 * (j - i) * hop) / (j - i + 1) for i, j in runs) if hop else busiest
    return (m - 1) * period + sum(ranks) + 2 * (p - 1) * hop


def simulated(job: Job, costs: Sequence[StageCost], hop: float) -> float:
    """The same from events, for the schedules that we build; the closed form for others."""
    p, m = job.pp, job.num_microbatches
    rounds = max(3, EVENTS // (3 * p * p * job.chunks))
    counts = (m,) if m <= rounds * p else ((rounds - 1) * p + m % p, rounds * p + m % p)
    schedules = [s for s in (built(p, job.chunks, job.schedule, n) for n in counts) if p > 1 and s]
    if len(schedules) < len(counts):
        return closed_form(job, costs, hop)
    spans = [simulate(s, costs, hop).makespan for s in schedules]
    return spans[-1] + (m - counts[-1]) / p * (spans[-1] - spans[0])
