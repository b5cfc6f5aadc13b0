"""The loss on held-out text: the first global batches of a source, or all of it, without any shuffling."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

from megallama.config.errors import MegallamaError
from megallama.data.loader import Loader
from megallama.data.sources import ValidData
from megallama.train.assemble import Rank
from megallama.train.health import Said, Vote
from megallama.train.metrics import ValidMetrics
from megallama.train.step import ask_all, evaluate_step


class Interrupted(Exception):
    """An evaluation that all ranks ended between two batches; `failure` of this rank's data, if it has one."""

    def __init__(self, vote: Vote, failure: MegallamaError | None, done: str) -> None:
        super().__init__(done)
        self.vote, self.failure = vote, failure


def evaluate(
    rank: Rank,
    source: ValidData,
    step: int,
    consumed_tokens: int,
    most: int | None,
    said: Callable[[bool], Said] = lambda failed: Said(failed=failed),
) -> tuple[ValidMetrics, Vote]:
    """Mean loss per token over at most `most` global batches; a last batch that is not full is padded with samples
    that do not count.

    All ranks return the same numbers, and the vote of the last batch.
    said: what this rank wants the others to know, given whether its data failed.
    Raises: Interrupted on all ranks if any of them was asked to stop, or has no data.
    """
    started = time.monotonic()
    config, plan = rank.plan.config, rank.plan
    size = config.batch.global_batch_size
    batches = min(most or source.num_samples, -(-source.num_samples // size))
    count = plan.batch.num_microbatches(size)

    def ids_of_step(batch: int) -> Sequence[Sequence[int]]:
        return [plan.batch.sample_ids(batch * size, size, rank.groups.dp.rank, m) for m in range(count)]

    total, tokens, vote = 0.0, 0, ask_all(rank, said(False))
    schedule = plan.forward_schedule(count)
    with Loader(source.read, ids_of_step, stop_step=batches, num_samples=source.num_samples, prefetch=0,
                device=rank.device if rank.device.type == "cuda" else None, name=source.name) as loader:  # fmt: skip
        for batch in range(batches):
            if vote.stop_reason:
                raise Interrupted(vote, None, f"after {batch} of {batches} batches")
            micro_batches, failure = loader.next_or_zeros(count, config)
            vote, counted = evaluate_step(rank, schedule, micro_batches, partial(said, failure is not None))
            if vote.failed_ranks:
                raise Interrupted(vote, failure, f"in batch {batch + 1} of {batches}")
            total, tokens = total + vote.loss, tokens + counted
    mean = total / tokens
    bits = mean / math.log(2) / source.bytes_per_token if source.bytes_per_token else None
    metrics = ValidMetrics(step, mean, tokens, time.monotonic() - started, consumed_tokens, source.name, bits)
    return metrics, vote
