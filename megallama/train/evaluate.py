"""The loss on held-out text: the first global batches of a source, or all of it, without any shuffling."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from megallama.data.loader import Loader
from megallama.data.sources import ValidData
from megallama.train.assemble import Rank
from megallama.train.metrics import ValidMetrics
from megallama.train.step import evaluate_step


def evaluate(rank: Rank, source: ValidData, step: int, consumed_tokens: int, most: int | None) -> ValidMetrics:
    """Mean loss per token over at most `most` global batches; a last batch that is not full is padded with samples
    that do not count.

    All ranks return the same numbers.
    """
    started = time.monotonic()
    config, plan = rank.plan.config, rank.plan
    size = config.batch.global_batch_size
    batches = min(most or source.num_samples, -(-source.num_samples // size))
    count = plan.batch.num_microbatches(size)

    def ids_of_step(batch: int) -> Sequence[Sequence[int]]:
        return [plan.batch.sample_ids(batch * size, size, rank.groups.dp.rank, m) for m in range(count)]

    total, tokens = 0.0, 0
    schedule = plan.forward_schedule(count)
    with Loader(source.read, ids_of_step, stop_step=batches, num_samples=source.num_samples, prefetch=0,
                device=rank.device if rank.device.type == "cuda" else None, name=source.name) as loader:  # fmt: skip
        for micro_batches in loader:
            loss, counted = evaluate_step(rank, schedule, micro_batches)
            total, tokens = total + loss, tokens + counted
    mean = total / tokens
    bits = mean / math.log(2) / source.bytes_per_token if source.bytes_per_token else None
    return ValidMetrics(step, mean, tokens, time.monotonic() - started, consumed_tokens, source.name, bits)
