"""Log-probabilities of continuations, by the ranks and the layout of a training run.

Rows that begin alike are a tree: what they have in common is computed once.  The trees of a micro-batch are one sample,
a branch behind the other, in which a token sees those on the way to its root; context parallelism knows rows alone.
Micro-batches are dealt over dp.  What comes out depends on layout, batch and order by rounding only.
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
from megallama.kernels.attention import TOGETHER, Documents, sdpa
from megallama.kernels.candidate import accumulate_dtype
from megallama.layers.batch import MicroBatch
from megallama.layers.vocab import LossHead
from megallama.model.llama import Stage
from megallama.pipeline.runtime import PipelineRuntime, StageWork
from megallama.train.assemble import DTYPES, Worker

WINDOW = 4  # micro-batches in flight per pipeline rank
WORTH = 4  # a row joins a tree that has this part of it
LARGEST = 1024  # tokens of a tree of several rows: they attend under one mask
Batch = list[tuple[int, int]]  # of a micro-batch each row's number, and how many of its ids the row before has


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
        self.longest = config.batch.seq_length  # tokens that a row may have before its last id
        shares, cp = groups.tp.size if config.parallel.sequence_parallel else 1, groups.cp.size
        self._trees = cp == 1
        self._round = shares if cp == 1 else cp * lcm(2, shares)
        self._budget = -(-config.batch.micro_batch_size * self.longest // self._round) * self._round
        hidden = torch.empty(0, config.model.hidden_size, dtype=DTYPES[config.precision.dtype], device=worker.device)
        queues, record = worker.buffers, worker.runtime.observer.record
        work = {n: StageWork(self._copy(s), queues[n].queue, nullcontext) for n, s in worker.stages.items()}
        self._runtime = PipelineRuntime(work, groups.pp, hidden, record, shares=shares, longest=self._budget // cp)
        self._heads: dict[int, Any] = {}  # by the address of a micro-batch: tokens and labels, then their scores

    def _copy(self, stage: Stage) -> Stage:
        """With attention that knows trees, and scores in place of the loss."""
        stage = copy(stage)
        stage.layers = [*map(copy, stage.layers)]
        for layer in stage.layers if self._trees else ():
            layer.attend = _attend
        stage.head = cast(Any, stage.head and partial(self._score, stage.head))
        return stage

    def _score(self, head: LossHead, x: Tensor, branch: Tensor | None, batch: MicroBatch) -> Tensor:
        """In place of the loss, which is then 0."""
        self._heads[id(batch)] = head.score(x, branch, *self._heads[id(batch)])
        return x.new_zeros(())

    def __call__(self, rows: Sequence[Row]) -> list[Score]:
        """A score per row. Raises: ConfigError for a row that is empty or too long; Interrupted."""
        self._check(rows)
        batches = [*pack([row.ids[:-1] for row in rows], self._budget, self._trees)]
        size, found = WINDOW * self.worker.groups.pp.size * self.worker.groups.dp.size, [np.zeros((2, 0))]
        for a in range(0, max(1, len(batches)), size):
            if self._all_reduce(torch.tensor([float(self._stop())]))[0]:
                raise Interrupted(f"evaluation stopped after {sum(map(len, batches[:a]))} of {len(rows)} rows")
            found += [self._window(rows, batches[a : a + size])] if batches else []
        order = [i for batch in batches for i, _ in batch]
        ends = np.cumsum([len(rows[i].ids) - rows[i].first for i in order], dtype=int)
        parts = np.split(np.concatenate(found, 1), ends, 1)
        scores = {i: Score(part[0], part[1] > 0.5) for i, part in zip(order, parts, strict=False)}
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

    def _micro_batch(self, rows: Sequence[Row], batch: Batch) -> tuple[MicroBatch, Tensor]:
        """What this rank has of it, and whether it has each of the scored ids."""
        trees, ids, paths = grow([(rows[i].ids[:-1], shared) for i, shared in batch], self._round)
        asked = list[tuple[int, int]]()  # where it is seen, and which
        for (i, _), path in zip(batch, paths, strict=False):
            asked += zip(path[rows[i].first - 1 :], rows[i].ids[rows[i].first :], strict=True)
        places, labels = torch.tensor(asked, dtype=torch.int64).view(-1, 2).T
        within = trees if self._trees else Documents.of(trees.starts)
        part = MicroBatch(torch.tensor([ids]), torch.arange(len(ids))[None], documents=within).part(self.worker.share)
        own = torch.full((len(ids),), -1)
        own[part.labels[0]] = torch.arange(part.labels.numel())
        places = own[places]
        made, here = part.to(self.worker.device), places >= 0
        self._heads[id(made)] = [x[here].to(self.worker.device) for x in (places, labels)]
        return made, here

    def _window(self, rows: Sequence[Row], batches: Sequence[Batch]) -> np.ndarray:
        """Log p [nats] of the scored ids of some micro-batches, and 1 for the likeliest ones: [2, ids]."""
        dp = self.worker.groups.dp
        count = -(-len(batches) // dp.size)
        own = [*batches, *[Batch()] * (count * dp.size - len(batches))][dp.rank :: dp.size]
        inputs = [self._micro_batch(rows, batch) for batch in own]
        with torch.no_grad():
            self._runtime.run(self.worker.plan.schedule_for(count, training=False), [made for made, _ in inputs])
        sizes = [sum(len(rows[i].ids) - rows[i].first for i, _ in batch) for batch in batches]
        found = torch.zeros(2, sum(sizes), dtype=torch.float64)
        if self.worker.counts_loss:
            for part, (made, here) in zip(found.split(sizes, 1)[dp.rank :: dp.size], inputs, strict=False):
                part[:, here] = self._heads[id(made)].double().cpu()
        self._heads.clear()
        return self._all_reduce(found).numpy()

    def _all_reduce(self, values: Tensor) -> Tensor:
        """The sum over all ranks of float64 `values`; every element is of one rank."""
        moved = values.double().to(self.worker.device)
        self.worker.groups.world.all_reduce(moved).wait()
        return moved.cpu()


def _attend(q: Tensor, k: Tensor, v: Tensor, within: Documents | None) -> Tensor:
    """In fp32 on a CPU, where 16 bits are slow."""
    exact = q.dtype if q.is_cuda else accumulate_dtype(q.dtype)
    return sdpa(q.to(exact), k.to(exact), v.to(exact), within).to(q.dtype)


def pack(rows: Sequence[Sequence[int]], budget: int, trees: bool) -> Iterator[Batch]:
    """Micro-batches, with alike rows together: as many as `budget` tokens hold, at least one."""
    batch, tokens, tree, before = Batch(), 0, 0, list[int]()
    for row, number in sorted(([*row], number) for number, row in enumerate(rows)):
        alike = (i for i, (a, b) in enumerate(zip(row, before, strict=False)) if a != b)
        shared = next(alike, min(len(row), len(before)))
        fits = tree + len(row) - shared <= max(LARGEST, 2 * len(row))
        shared *= trees and fits and shared * WORTH >= len(row)
        if batch and tokens + len(row) - shared > budget:
            yield batch
            batch, tokens, shared = [], 0, 0
        batch.append((number, shared))
        new, before = len(row) - shared, row
        tree, tokens = new + (tree if shared else 0), new + tokens
    if batch:
        yield batch


def grow(rows: Sequence[tuple[Sequence[int], int]], whole: int) -> tuple[Documents, list[int], list[list[int]]]:
    """Of rows (ids, how many the row before has), with padding behind: trees, all ids, where those of each row are."""
    ids, starts, ends, path, paths = list[int](), list[int](), list[int](), list[int](), list[list[int]]()
    pieces, tokens = [(0, False)], sum(len(row) - shared for row, shared in rows)
    for row, shared in [*rows, *[([0], 0)] * (-tokens % whole if tokens else whole)]:
        at, (size, _), new = len(ids), pieces[-1], len(row) - shared
        for token in path[shared:]:
            ends[token] = at
        path = [*path[:shared], *range(at, at + new)]
        ids += row[shared:]
        starts += [at - shared] * new
        ends += [1 << 40] * new
        paths.append(path)
        if size and not shared and size + new > TOGETHER:
            pieces.append((new, False))
        else:
            pieces[-1] = size + new, size > 0
    reach = torch.tensor([ends]) - torch.arange(len(ends))
    unused = torch.empty(0)
    return Documents(torch.tensor([starts]), unused, unused, (tuple(pieces),), reach=reach), ids, paths
