"""Batch arithmetic: how large a step is, and which samples of it each rank reads.

A step takes the next `global_batch` samples.  Micro-batch m of data-parallel rank r holds the samples
``first + (m * dp + r) * micro_batch_size + [0 .. micro_batch_size)``; so which samples make up a step depends
on the number of samples consumed alone, and never on the layout.
"""

from __future__ import annotations

from dataclasses import dataclass

from megallama.config.schema import BatchConfig


@dataclass(frozen=True)
class BatchPlan:
    """The batch settings for a data-parallel size."""

    batch: BatchConfig
    dp: int

    def num_microbatches(self, global_batch: int) -> int:
        """Micro-batches of each model replica in a step of `global_batch` samples."""
        count, rest = divmod(global_batch, self.batch.micro_batch_size * self.dp)
        assert not rest and count, (global_batch, self)
        return count

    def sample_ids(self, first_sample: int, global_batch: int, dp_rank: int, microbatch: int) -> range:
        """The samples of one micro-batch of one rank, in a step that begins with `first_sample`."""
        size = self.batch.micro_batch_size
        assert 0 <= dp_rank < self.dp and 0 <= microbatch < self.num_microbatches(global_batch), (dp_rank, microbatch)
        first = first_sample + (microbatch * self.dp + dp_rank) * size
        return range(first, first + size)

    def samples_after(self, steps: int, done: int = 0, consumed: int = 0) -> int:
        """Samples consumed by the first `steps` steps, of which `done` consumed `consumed`."""
        while done < steps:
            if (size := self.batch.size_after(consumed)) == self.batch.global_batch_size:
                return consumed + (steps - done) * size
            consumed, done = consumed + size, done + 1
        return consumed
