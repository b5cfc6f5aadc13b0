"""What a step costs a GPU without Transformer Engine and apex, counted at true sizes: it may only fall.

budget.toml has, for each case, kernel launches and MiB that pass over memory: of one layer, of embedding, head and
loss together, and of all else in a step, per layer (gradients, norm, vote, AdamW).  Forward and backward of one
micro-batch that is neither the first nor the last of its step.
"""

from __future__ import annotations

import tomllib
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch

from megallama.analysis.recording import FakeGroup
from megallama.comm.group import Group, Partition, Solo, build_groups
from megallama.kernels import pointwise
from megallama.plan.plan import make_plan
from megallama.train.assemble import Worker, assemble
from megallama.train.step import train_step
from tests.cuda.claimed import META, batches, claimed, kernels_on_cuda, settings
from tests.cuda.counted_triton import counted_triton
from tests.cuda.launches import Launches

BUDGET = Path(__file__).with_name("budget.toml")
HEADING = """# Kernel launches and MiB that pass over memory, as tests/cuda/test_budget.py counts them.
# A number is lowered when the code asks for less (`python -m tests.cuda.test_budget` prints the table as it would be
# now), and never raised."""
SEVEN = ("model.preset=llama-7b", "batch.micro_batch_size=2", "batch.seq_length=2048")
EIGHT = ("model.preset=llama3-8b", "batch.micro_batch_size=1", "batch.seq_length=8192")
SIXTY_FIVE = ("model.preset=llama-65b", "batch.micro_batch_size=2", "batch.seq_length=2048")


@dataclass(frozen=True)
class Case:
    """A model, how it is cut, and its micro-batch."""

    words: tuple[str, ...]
    tp: int = 1
    documents: bool = False
    triton: bool = False  # comes with torch's build for CUDA; needs a C compiler when it runs


CASES = {
    "7B": Case(SEVEN),
    "7B, nothing recomputed": Case((*SEVEN, "memory.recompute=none")),
    "7B, all recomputed": Case((*SEVEN, "memory.recompute=full")),
    "7B, fp8": Case((*SEVEN, "precision.fp8=tensorwise")),
    "7B, fp8, Triton": Case((*SEVEN, "precision.fp8=tensorwise"), triton=True),
    "7B, documents": Case(SEVEN, documents=True),
    "7B, Triton": Case(SEVEN, triton=True),
    "LLaMA-3-8B": Case(EIGHT),
    "LLaMA-3-8B, Triton": Case(EIGHT, triton=True),
    "65B over 4": Case(SIXTY_FIVE, tp=4),
    "65B over 4, Triton": Case(SIXTY_FIVE, tp=4, triton=True),
}


def worker(case: Case, layers: int) -> Worker:
    """The first rank of the case's job, with so many layers."""
    words = (*case.words, f"parallel.tp={case.tp}", f"model.num_layers={layers}", "batch.global_batch_size=12")
    config = settings(*words, ranks=case.tp, documents=case.documents)
    plan = make_plan(config, case.tp)

    def group(name: str, partition: Partition) -> Group:
        ranks = next(ranks for ranks in partition if 0 in ranks)
        return Solo(name) if len(ranks) == 1 else FakeGroup(name, ranks, 0)

    groups = build_groups(plan.topology, 0, config.model.num_kv_heads or 1, group)
    built = assemble(plan, groups, META, kernels_on_cuda(config, case.triton))
    built.optimizer.loaded(0)
    return replace(built, device=torch.device("cpu"), read=lambda t: [1.0, 1.0, *[0.0] * t.numel()][: t.numel()])


def step(case: Case, layers: int, micro_batches: int) -> Launches:
    """One step."""
    rank = worker(case, layers)
    inputs = batches(rank.plan.config, micro_batches)
    with Launches() as counted:
        train_step(rank, rank.plan.schedule_for(micro_batches), inputs, lr=1e-3, masked=case.documents)
    return counted


@cache
def costs(name: str) -> dict[str, tuple[int, float]]:
    """(launches, MiB) of each part of a case."""
    with claimed(), counted_triton() if CASES[name].triton else nullcontext():
        found = {(layers, m): step(CASES[name], layers, m) for layers in (1, 2) for m in (2, 3)}
    numbers = {key: torch.tensor([c.total, c.mib], dtype=torch.float64) for key, c in found.items()}
    one, two = (numbers[layers, 3] - numbers[layers, 2] for layers in (1, 2))
    layer, rest = two - one, numbers[2, 2] - 2 * two - (numbers[1, 2] - 2 * one)
    parts = {"layer": layer, "head": one - layer, "step": rest}
    return {part: (round(float(x[0])), round(float(x[1]), 1)) for part, x in parts.items()}


def test_no_kernel_is_given_what_32_bits_cannot_count() -> None:
    """The weights of 7B on one GPU are one buffer of more elements; what works on them does so by buckets."""
    with claimed():
        rank = worker(CASES["7B"], 32)
        with Launches() as counted:
            rank.optimizer.loaded(0)
        inputs = batches(rank.plan.config, 1)
        with counted:
            train_step(rank, rank.plan.schedule_for(1), inputs, lr=1e-3)
    assert rank.buffers[0].weights.numel() > 2**32
    assert counted.largest == 32000 * 4096  # of the embedding, the head, and the logits


def table() -> dict[str, dict[str, dict[str, float]]]:
    return tomllib.loads(BUDGET.read_text("utf-8"))


def problems(name: str, found: dict[str, tuple[int, float]]) -> list[str]:
    """What is not as the table has it."""
    out = []
    for part, (launches, mib) in found.items():
        allowed = table()[name][part]
        for what, now, most in (("launches", launches, allowed["launches"]), ("MiB", mib, allowed["mib"])):
            if now > most:
                out.append(f"{part}: {now} {what}, more than the {most} in budget.toml")
            elif now < most:
                out.append(f"{part}: {now} {what}, fewer than in budget.toml: lower {most} there")
    return out


@pytest.mark.parametrize("name", CASES)
def test_costs_only_fall(name: str) -> None:
    assert problems(name, costs(name)) == []


def test_the_head_stays_small() -> None:
    """It is one stage's alone: launches are its pipeline's idle time."""
    assert set(table()) == set(CASES)
    assert all(parts["head"]["launches"] <= 60 for name, parts in table().items() if name != "LLaMA-3-8B")
    assert table()["LLaMA-3-8B"]["head"]["launches"] <= 108  # four chunks of 2048 tokens


def test_a_layer_is_at_most_thirty_launches_and_passes_over_little_memory() -> None:
    """Without Transformer Engine; with nothing recomputed but what a pass of the backward makes along the way."""
    layers = {name: parts["layer"] for name, parts in table().items() if CASES[name].triton}
    assert all(layer["launches"] <= 30 for name, layer in layers.items() if "fp8" not in name)
    assert layers["7B, fp8, Triton"]["launches"] <= 54  # two for each operand but the weights, one sum for each weight
    assert layers["7B, Triton"]["mib"] / 4096 * 1.048576 <= 0.43  # MB a token


def test_one_more_pass_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    (forward, backward), (launches, mib) = pointwise.SWIGLUS, costs("65B over 4")["layer"]
    monkeypatch.setattr(pointwise, "SWIGLUS", (lambda packed: forward(packed).clone(), backward))
    more = 2 * 2 * 4096 * (22016 // 4) * 2 / 2**20  # forward and again: read and written, of 4096 tokens
    assert problems("65B over 4", costs.__wrapped__("65B over 4")) == [
        f"layer: {launches + 2} launches, more than the {launches} in budget.toml",
        f"layer: {mib + more} MiB, more than the {mib} in budget.toml",
    ]


if __name__ == "__main__":  # the table as it would be now
    print(f"{HEADING}\n")
    for title in CASES:
        print(f'["{title}"]')
        for part, (launches, mib) in costs(title).items():
            print(f"{part} = {{launches = {launches}, mib = {mib}}}")
        print()
