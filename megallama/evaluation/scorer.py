"""Log-probabilities of continuations, by the ranks and the layout of a training run.

Rows of like length make a micro-batch, padded behind, where causal attention does not look; the micro-batches are dealt
over dp.  What comes out depends on layout, batch and order by rounding only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from copy import copy
from functools import partial
from math import lcm
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from megallama.config.errors import ConfigError, MegallamaError
from megallama.layers.batch import MicroBatch, spread
from megallama.layers.vocab import LossHead
from megallama.pipeline.runtime import PipelineRuntime, StageWork
from megallama.train.assemble import DTYPES, Worker

WINDOW = 4  # micro-batches in flight per pipeline rank


class Interrupted(MegallamaError):
    """A rank was asked to stop in the middle of an evaluation; all ranks leave it."""


class Row(NamedTuple):
    """Ids, of which those from `first` on are scored, each by all before it. 0 < first < len(ids)."""

    ids: Sequence[int]
    first: int


class Score(NamedTuple):
    """Of the scored ids of a row: log p [nats] of each, and whether each was the likeliest."""

    token_log_probs: np.ndarray  # float64 [tokens]
    token_greedy: np.ndarray  # bool [tokens]

    @property
    def log_prob(self) -> float:
        return float(self.token_log_probs.sum())

    @property
    def greedy(self) -> bool:
        return bool(self.token_greedy.all())


class Scorer:
    """Scores rows on all ranks of `worker`, which call it alike and have the same answer, or are asked to `stop`."""

    def __init__(self, worker: Worker, stop: Callable[[], bool] = lambda: False) -> None:
        config, groups = worker.plan.config, worker.groups
        self.worker, self._stop = worker, stop
        self.longest = longest = config.batch.seq_length  # tokens that a row may have before its last id
        self._budget = config.batch.micro_batch_size * self.longest
        shares, cp = groups.tp.size if config.parallel.sequence_parallel else 1, groups.cp.size
        self._round = shares if cp == 1 else cp * lcm(2, shares)
        hidden = torch.empty(0, config.model.hidden_size, dtype=DTYPES[config.precision.dtype], device=worker.device)
        stages = {number: copy(stage) for number, stage in worker.stages.items()}
        for stage in stages.values():
            stage.head = cast(Any, stage.head and partial(self._score, stage.head))
        work = {n: StageWork(stage, worker.buffers[n].queue, nullcontext) for n, stage in stages.items()}
        record = worker.runtime.observer.record
        self._runtime = PipelineRuntime(work, groups.pp, hidden, record, shares=shares, longest=longest // cp)
        self._found: dict[int, Tensor] = {}  # by the address of a micro-batch

    def _score(self, head: LossHead, x: Tensor, branch: Tensor | None, batch: MicroBatch) -> Tensor:
        """In place of the loss, which is then 0."""
        self._found[id(batch)] = head.score(x, branch, batch.labels.reshape(-1))
        return x.new_zeros(())

    def __call__(self, rows: Sequence[Row]) -> list[Score]:
        """A score per row. Raises: ConfigError for a row that is empty or too long; Interrupted."""
        self._check(rows)
        order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i))
        scores: dict[int, Score] = {}
        batches = list(self._pack(rows, order))
        size = WINDOW * self.worker.groups.pp.size * self.worker.groups.dp.size
        for a in range(0, max(1, len(batches)), size):
            if self._all_reduce(torch.tensor([float(self._stop())]))[0]:
                raise Interrupted(f"evaluation stopped after {len(scores)} of {len(rows)} rows")
            scores.update(self._window(rows, batches[a : a + size]) if batches else {})
        return [scores[i] for i in range(len(rows))]

    def _check(self, rows: Sequence[Row]) -> None:
        vocab = self.worker.plan.config.model.vocab_size
        for number, row in enumerate(rows):
            what = f"row {number} has {len(row.ids)} ids"
            if not 0 < row.first < len(row.ids):
                raise ConfigError(f"{what} and scores those from {row.first} on; write at least 1, and fewer than all")
            if len(row.ids) > self.longest + 1:
                raise ConfigError(f"{what}; at most {self.longest + 1} fit the context")
            if min(row.ids) < 0 or max(row.ids) >= vocab:
                raise ConfigError(f"{what}, from {min(row.ids)} to {max(row.ids)}; the model has 0 to {vocab - 1}")

    def _pack(self, rows: Sequence[Row], order: Sequence[int]) -> Iterator[list[int]]:
        """Rows of each micro-batch, the longest first: as many as the tokens of a training micro-batch hold."""
        batch: list[int] = []
        for i in order:
            if batch and (len(batch) + 1) * self._length(rows[batch[0]]) > self._budget:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _length(self, row: Row) -> int:
        """Tokens [s] that a micro-batch needs for it."""
        return -(-(len(row.ids) - 1) // self._round) * self._round

    def _micro_batch(self, rows: Sequence[Row]) -> MicroBatch:
        length = self._length(rows[0]) if rows else self._round
        ids = np.zeros((max(1, len(rows)), length + 1), np.int64)
        for place, row in zip(ids, rows, strict=False):
            place[: len(row.ids)] = row.ids
        return MicroBatch.of(ids, None).part(self.worker.share).to(self.worker.device)

    def _window(self, rows: Sequence[Row], batches: Sequence[list[int]]) -> dict[int, Score]:
        """Scores of the rows of some micro-batches, by number."""
        dp, places, end = self.worker.groups.dp, dict[int, slice](), 0
        for i in (i for batch in batches for i in batch):
            start, end = end, end + len(rows[i].ids) - rows[i].first
            places[i] = slice(start, end)
        count = -(-len(batches) // dp.size)
        own = [*batches, *[[]] * (count * dp.size - len(batches))][dp.rank :: dp.size]
        inputs = [self._micro_batch([rows[i] for i in batch]) for batch in own]
        with torch.no_grad():
            self._runtime.run(self.worker.plan.schedule_for(count, training=False), inputs)
        flat = torch.zeros(2, end, dtype=torch.float64)
        if self.worker.counts_loss:
            for batch, micro_batch in zip(own, inputs, strict=True):
                found = self._found[id(micro_batch)].double().cpu().view(2, *micro_batch.labels.shape)
                found = spread(found, self.worker.share)
                for place, i in enumerate(batch):
                    flat[:, places[i]] = found[:, place, rows[i].first - 1 : len(rows[i].ids) - 1]
        self._found.clear()
        log_probs, greedy = self._all_reduce(flat).numpy()
        return {i: Score(log_probs[place], greedy[place] > 0.5) for i, place in places.items()}

    def _all_reduce(self, values: Tensor) -> Tensor:
        """The sum over all ranks of float64 `values`; every element is of one rank."""
        moved = values.double().to(self.worker.device)
        self.worker.groups.world.all_reduce(moved).wait()
        return moved.cpu()
