"""How much there is to compute, per token, and which layers each pipeline stage holds.

A multiply-add is two operations; only matrix products count.  Attention is counted in full (Korthikanti et
al. 2022, arXiv:2205.05198) or causally.  Of stages before the last, later ones, with less in flight, take more.
"""

from collections.abc import Sequence
from itertools import accumulate

from megallama.config.schema import Config, ModelConfig
from megallama.plan.params import heads
from megallama.plan.timeline import StageCost

Stages = tuple[tuple[int, ...], ...]


def layer_forward(model: ModelConfig, seq_length: int, *, causal: bool) -> int:
    """Forward operations of one layer per token: the seven matrices and attention."""
    h, (n, k, d) = model.hidden_size, heads(model)
    matrices = h * (2 * n * d + 2 * k * d + 3 * model.ffn_hidden_size)
    attention = 2 * n * d * (seq_length + 1) if causal else 4 * n * d * seq_length
    return 2 * matrices + attention


def head_forward(model: ModelConfig) -> int:
    """Forward operations of the output head per token."""
    return 2 * model.vocab_size * model.hidden_size


def training_flops(model: ModelConfig, seq_length: int, *, causal: bool) -> int:
    """Operations of forward and backward per token: the numerator of MFU."""
    return 3 * (model.num_layers * layer_forward(model, seq_length, causal=causal) + head_forward(model))


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
    """Layers per stage with the lexicographically smallest costs, the most expensive first."""
    if stages == 1:
        return (layers,)

    def split(last: int) -> tuple[int, ...]:
        low, surplus = divmod(layers - last, stages - 1)
        return (*(low + (s >= stages - 1 - surplus) for s in range(stages - 1)), last)

    def costs(counts: Sequence[int]) -> list[float]:
        return sorted((c * layer_cost + head * (s == stages - 1) for s, c in enumerate(counts)), reverse=True)

    return min((split(last) for last in range(layers, -1, -1)), key=costs)


def stage_costs(config: Config, stages: Stages) -> tuple[StageCost, ...]:
    """Operations per token of each stage, with what full recomputation repeats."""
    layer = layer_forward(config.model, config.batch.seq_length, causal=True)
    again = config.memory.recompute == "full"
    out = []
    for number, layers in enumerate(stages):
        head = head_forward(config.model) if number == len(stages) - 1 else 0
        forward = len(layers) * layer + head
        out.append(StageCost(forward, forward + again * len(layers) * layer, forward))
    return tuple(out)
