"""The loss on held-out text: the first global batches of a source, or all of it, in file order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

from megallama.config.errors import MegallamaError
from megallama.data.loader import Loader
from megallama.data.samples import Source
from megallama.train.assemble import Worker
from megallama.train.metrics import Record
from megallama.train.step import RankStatus, StepConsensus, ask_all, evaluate_step


class Interrupted(Exception):
    """An evaluation that all ranks ended between two batches; `failure`: of this rank's data."""

    def __init__(self, consensus: StepConsensus, failure: MegallamaError | None, done: str) -> None:
        super().__init__(done)
        self.consensus, self.failure = consensus, failure


def evaluate(
    worker: Worker,
    source: Source,
    most: int | None,
    status: Callable[[bool], RankStatus] = lambda failed: RankStatus(failed=failed),
) -> tuple[Record, StepConsensus]:
    """Loss, tokens, seconds over at most `most` global batches, and the consensus of the last one.

    A last batch that is not full is padded with samples that do not count. All ranks return the same.
    status: what this rank wants the others to know, given whether its data failed.
    Raises: Interrupted on all ranks if any of them was asked to stop, or has no data.
    """
    started = time.monotonic()
    config, plan = worker.plan.config, worker.plan
    size = config.batch.global_batch_size
    batches = min(most or source.num_sequences, -(-source.num_sequences // size))
    dp = worker.groups.dp
    count = config.batch.num_microbatches(size, dp.size)

    def ids_of_step(batch: int) -> Sequence[Sequence[int]]:
        return config.batch.sample_ids(batch * size, size, dp.size, dp.rank)

    total, tokens, known = 0.0, 0, ask_all(worker, status(False))
    schedule = plan.forward_schedule(count)
    with Loader(
        source.read, ids_of_step, stop_step=batches, num_samples=source.num_sequences, prefetch=0, device=worker.device,
        name=source.name,
    ) as loader:  # fmt: skip
        for batch in range(batches):
            if known.stop_reason:
                raise Interrupted(known, None, f"after {batch} of {batches} batches")
            micro_batches, failure = loader.next_or_zeros(count, config)
            known = evaluate_step(worker, schedule, micro_batches, partial(status, failure is not None))
            if known.failed:
                raise Interrupted(known, failure, f"in batch {batch + 1} of {batches}")
            total, tokens = total + known.sums["loss"], tokens + known.tokens
    mean = total / tokens
    bits = mean / math.log(2) / source.bytes_per_token if source.bytes_per_token else None
    return {"loss": mean, "tokens": tokens, "seconds": time.monotonic() - started, "bits_per_byte": bits}, known
