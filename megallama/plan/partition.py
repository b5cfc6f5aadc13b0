"""Which layers each pipeline stage holds.

All layers cost the same; the last stage also computes the head and the loss (the embedding costs nothing), so
equal counts are not always best.  The split chosen has the smallest most expensive stage, and among those the
smallest second most expensive, and so on.  Of the stages before the last, later ones take the surplus: early
ones hold more micro-batches in flight, and the first also holds the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from megallama.config.schema import Config
from megallama.plan.flops import head_forward, layer_forward
from megallama.plan.simulate import StageCost

Stages = tuple[tuple[int, ...], ...]


def partition(config: Config) -> Stages:
    """Layer numbers of each stage, in the order of the model; a stage may be without layers."""
    p, layers = config.parallel, config.model.num_layers
    forward = layer_forward(config.model, config.batch.seq_length, causal=True)
    repeats = 4 if config.memory.recompute == "full" else 3
    counts = p.stage_layers or balanced(layers, p.pp * p.chunks, repeats * forward, 3 * head_forward(config.model))
    assert len(counts) == p.pp * p.chunks and sum(counts) == layers, (counts, p, layers)
    ends = list(accumulate(counts))
    return tuple(tuple(range(end - count, end)) for count, end in zip(counts, ends, strict=True))


def balanced(layers: int, stages: int, layer_cost: float, head: float) -> tuple[int, ...]:
    """Layers per stage such that the costs, most expensive first, are lexicographically smallest."""
    if stages == 1:
        return (layers,)

    def split(last: int) -> tuple[int, ...]:
        low, surplus = divmod(layers - last, stages - 1)
        return (*(low + (s >= stages - 1 - surplus) for s in range(stages - 1)), last)

    def costs(counts: Sequence[int]) -> list[float]:
        return sorted((c * layer_cost + head * (s == stages - 1) for s, c in enumerate(counts)), reverse=True)

    return min((split(last) for last in range(layers, -1, -1)), key=costs)


def stage_costs(config: Config, stages: Stages) -> tuple[StageCost, ...]:
    """Forward, input-gradient and weight-gradient operations per token of each stage.

    Full recomputation repeats the layers' forward before the input gradient.
    """
    layer = layer_forward(config.model, config.batch.seq_length, causal=True)
    again = config.memory.recompute == "full"
    out = []
    for number, layers in enumerate(stages):
        head = head_forward(config.model) if number == len(stages) - 1 else 0
        forward = len(layers) * layer + head
        out.append(StageCost(forward, forward + again * len(layers) * layer, forward))
    return tuple(out)
