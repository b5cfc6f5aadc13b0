"""Seconds of one training step: what every layer, stage, transfer and step costs.

Matrix products: 2MNK / (peak x gemm) x (1 + small (1/M + 1/N + 1/K)), with N and K filled up to whole tiles.
Attention: causal operations at the kernel's rate, or (unfused) full ones and passes of the scores through memory.
Elementwise work: bytes at the memory's rate.  Tensor-parallel collectives: ring volume at a share of NVLink
(of the NICs where tp leaves the node) plus a latency.  Data parallelism: ring volume through the NICs of the ring's
members in one node, plus a time per parameter and rank for rings longer than a leaf of the network.

Sources of the forms: Korthikanti et al. 2022 (arXiv:2205.05198), Narayanan et al. 2021 (arXiv:2104.04473), Qi et al.
2023 (arXiv:2401.10241), nccl-tests doc/PERFORMANCE.md (bus bandwidth).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

from megallama.plan.hardware import Machine
from megallama.plan.job import Job
from megallama.plan.simulate import StageCost

TILE = 128
OPTIMIZER_BYTES = 30.0  # read and written per parameter by AdamW: fp32 weight, two moments, gradient; bf16 weight


@dataclass(frozen=True)
class Part:
    """Seconds of one kind of work for one micro-batch: forward, input gradient, weight gradient, done again."""

    name: str
    forward: float
    input_grad: float
    weight_grad: float
    again: float = 0.0  # recomputed in the backward


class Pricer:
    """The prices of one job on one machine."""

    def __init__(self, job: Job, machine: Machine) -> None:
        self.job, self.machine, self.gpu = job, machine, machine.gpu
        self.kernel, self.stack = machine.kernels[job.kernel], machine.stacks[job.stack]
        self.peak = self.gpu.peak_tflops * 1e12
        self.memory_rate = self.gpu.memory_gb_per_s * 1e9 * self.gpu.bandwidth
        self.node_rate = self.gpu.nvlink_gb_per_s * 1e9 * self.gpu.tp_bus
        gbit = job.network_gbit or self.gpu.nic_gbit
        self.nic_rate = gbit / 8 * 1e9 * self.gpu.nic * self.stack.network

    def layer(self) -> list[Part]:
        """The work of one layer on one rank for one micro-batch."""
        job, kernel, stack = self.job, self.kernel, self.stack
        t, tokens, h, f = job.tp, job.tokens, job.hidden, job.ffn
        width, up = job.heads * job.head_dim, 2 if job.gated else 1
        shapes = ((h, (width + 2 * job.kv_width) / t), (width / t, h), (h, up * f / t), (f / t, h))
        matrices = sum(self.product(tokens, k, n) for k, n in shapes)
        full = job.recompute == "full"
        scores = 4.0 * tokens * job.seq * width / t * (0.5 if kernel.causal else 1.0)
        memory = kernel.passes * 2.0 * tokens * job.seq * job.heads / t / (self.gpu.memory_gb_per_s * 1e9)
        peak = self.peak * self.gpu.attention
        attention = scores / (peak * kernel.forward) + memory
        backward = 2.5 * scores / (peak * kernel.backward) if kernel.causal else 2 * attention
        if job.head_dim % 8:
            attention, backward = attention * kernel.unaligned, backward * kernel.unaligned
        core_again = full or (job.recompute == "selective" and not kernel.causal)
        rows = tokens / t if job.sequence_parallel else tokens
        wide, inner = stack.wide * rows * h, stack.inner * tokens * (width + job.kv_width + up * f) / t
        elementwise = (wide + inner) / self.memory_rate
        reuse = (wide + inner / 3) / self.memory_rate / 2 if job.llama_way else 0.0
        tp, launch = self.tensor_parallel(), stack.launch_us * 1e-6
        return [
            Part("matrices", matrices, matrices, matrices, full * matrices),
            Part("attention", attention, backward, 0.0, core_again * attention),
            Part("elementwise", elementwise, 1.5 * elementwise, 0.0, full * elementwise + reuse),
            Part("launch", launch, launch, launch, full * launch),
            Part("tp comm", tp, tp, 0.0, full * tp),
        ]

    def head(self) -> Part:
        """The output head and the loss for one micro-batch."""
        job = self.job
        product = self.product(job.tokens, job.hidden, job.vocab / job.tp)
        logits = (self.stack.head / job.tp + self.stack.whole) * job.tokens * job.vocab / self.memory_rate / 2
        return Part("head", product + logits, product + logits, product)

    def product(self, m: float, k: float, n: float) -> float:
        """One matrix product [m, k] x [k, n]."""
        rate = self.peak * self.gpu.gemm * self.stack.speed * (self.stack.fp8 if self.job.fp8 else 1.0)
        filled = (ceil(n / TILE) * TILE) * (ceil(k / TILE) * TILE)
        return 2.0 * m * filled / rate * (1 + self.gpu.small * (1 / m + 1 / n + 1 / k))

    def tensor_parallel(self) -> float:
        """Exposed collectives of one layer in one direction: two all-reduces, or as many bytes."""
        job = self.job
        if job.tp == 1:
            return 0.0
        rate = self.node_rate if job.tp <= self.gpu.gpus_per_node else self.nic_rate
        moved = 4 * (job.tp - 1) / job.tp * 2.0 * job.tokens * job.hidden
        return (moved / rate + 2 * self.gpu.tp_latency_us * 1e-6) * (1 - self.stack.tp_overlap * job.hide_tp)

    def hop(self) -> float:
        """One activation from stage to stage."""
        job = self.job
        if job.pp == 1:
            return 0.0
        rate = self.node_rate if job.gpus <= self.gpu.gpus_per_node else self.nic_rate
        cut = job.tp if job.sequence_parallel or self.stack.scatter_gather else 1
        return 2.0 * job.tokens * job.hidden / cut / rate + self.gpu.hop_latency_us * 1e-6

    def stages(self, *, blocking: bool = True) -> tuple[StageCost, ...]:
        """Seconds of every stage for one micro-batch, with the transfers that a rank waits for."""
        parts, head = self.layer(), self.head()
        forward, weight = sum(p.forward for p in parts), sum(p.weight_grad for p in parts)
        back = sum(p.input_grad + p.again for p in parts)
        wait = self.stack.blocking * self.hop() if blocking else 0.0
        out = [StageCost(n * forward + wait, n * back + wait, n * weight) for n in self.job.stages]
        f, i, w = out[-1]
        out[-1] = StageCost(f + head.forward, i + head.input_grad, w + head.weight_grad)
        return tuple(out)

    def data_parallel(self) -> float:
        """Communication of gradients and parameters per step, before any hiding."""
        job, stack = self.job, self.stack
        d = job.dp * job.cp
        if d == 1:
            return 0.0
        moved = stack.grad_bytes + stack.param_bytes if job.sharding != "none" else 2 * stack.grad_bytes
        leaves = max(1.0, d * job.tp / self.gpu.gpus_per_node / self.gpu.leaf_nodes)
        long = self.stack.ring_ns * 1e-9 * log2(leaves)
        return job.rank_parameters * (moved * (d - 1) / d / self._ring_rate(d) + long)

    def gathering(self) -> float:
        """Communication per micro-batch where parameters (zero3: gathered twice) or gradients are cut over dp."""
        passes = {"zero3": 3, "zero2": 1}.get(self.job.sharding, 0)
        d = self.job.dp
        return passes * 2.0 * self.job.rank_parameters * (d - 1) / d / self._ring_rate(d)

    def optimizer(self) -> float:
        """Reading and writing the optimizer state of a step."""
        shard = self.job.rank_parameters / (self.job.dp if self.job.sharding != "none" else 1)
        return shard * OPTIMIZER_BYTES / self.memory_rate

    def jitter(self) -> float:
        """Share of a step by which the slowest of many nodes delays all."""
        return self.stack.jitter * log2(max(1.0, self.job.gpus / self.gpu.gpus_per_node))

    def _ring_rate(self, ranks: int) -> float:
        members = max(1, min(ranks, self.gpu.gpus_per_node // self.job.tp))
        within = ranks * self.job.tp <= self.gpu.gpus_per_node
        return self.node_rate if within else min(self.node_rate, members * self.nic_rate)
