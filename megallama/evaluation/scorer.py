"""Log-probabilities of continuations, by the ranks and the layout of a training run.

Rows that begin alike are a tree: what they have in common is computed once.  The trees of a micro-batch are one sample,
a branch behind the other, in which a token sees those on the way to its root; context parallelism knows rows alone.
Micro-batches are dealt over dp.  What comes out depends on layout, batch and order by rounding only.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from copy import copy
from functools import partial
from itertools import islice
from os.path import commonprefix
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from megallama.config.errors import ConfigError, DataError, MegallamaError
from megallama.kernels.attention import TOGETHER, Documents, sdpa, sdpa_in_fp32
from megallama.layers.batch import MicroBatch
from megallama.layers.vocab import LossHead
from megallama.pipeline.runtime import PipelineRuntime, StageWork
from megallama.train.assemble import DTYPES, Worker
from megallama.train.step import by_position

WINDOW = 4  # micro-batches in flight per pipeline rank
WORTH = 4  # a row joins a tree that has this part of it
LARGEST = 1024  # tokens of a tree of several rows: they attend under one mask
AT_A_TIME = 512  # windows, so that memory does not grow with a text
Text = tuple[str, Any, float]  # source, ids (or what is made of a text), bytes
Batch = list[tuple[int, int]]  # each row's number, and what the row before has of it


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
    """Of rows, on all ranks of `worker` alike, unless one of them is asked to `stop`."""

    def __init__(self, worker: Worker, stop: Callable[[], bool] = lambda: False) -> None:
        config, groups = worker.plan.config, worker.groups
        self.worker, self._stop = worker, stop
        self.longest = config.batch.seq_length  # tokens that a row may have before its last id
        shares, cp = groups.tp.size if config.parallel.sequence_parallel else 1, groups.cp.size
        self._trees = cp == 1
        self._round = shares if cp == 1 else cp * math.lcm(2, shares)
        self._budget = -(-config.batch.micro_batch_size * self.longest // self._round) * self._round
        hidden = torch.empty(0, config.model.hidden_size, dtype=DTYPES[config.precision.dtype], device=worker.device)
        queues, record = worker.buffers, worker.runtime.observer.record
        slow = hidden.element_size() == 2 and hidden.device.type == "cpu"
        work = dict[int, StageWork]()
        for number, stage in worker.stages.items():  # with trees, and scores as the loss
            stage = copy(stage)
            stage.layers = [*map(copy, stage.layers)]
            for layer in stage.layers if self._trees else ():
                layer.attend = sdpa_in_fp32 if slow else sdpa
            stage.head = cast(Any, stage.head and partial(self._score, stage.head))
            work[number] = StageWork(stage, queues[number].queue, nullcontext)
        self._runtime = PipelineRuntime(work, groups.pp, hidden, record, shares=shares, longest=self._budget // cp)
        self._heads: dict[int, Any] = {}  # of a micro-batch: places and labels, then scores

    def _score(self, head: LossHead, x: Tensor, branch: Tensor | None, batch: MicroBatch) -> Tensor:
        """In place of the loss, which is then 0."""
        self._heads[id(batch)] = head.score(x, branch, *self._heads[id(batch)])
        return x.new_zeros(())

    def __call__(self, rows: Sequence[Row]) -> list[Score]:
        """A score per row. Raises: ConfigError for a row that is empty or too long; Interrupted."""
        vocab = self.worker.plan.config.model.vocab_size
        for number, row in enumerate(rows):
            low, high, size = min(row.ids, default=-1), max(row.ids, default=-1), len(row.ids)
            if not 0 < row.first < size <= self.longest + 1 or low < 0 or high >= vocab:
                what = f"row {number} has {size} ids, from {low} to {high}, and scores those from {row.first} on"
                raise ConfigError(f"{what}; the model has 0 to {vocab - 1}, and {self.longest} fit before the last")
        batches = [*pack([row.ids[:-1] for row in rows], self._budget, self._trees)]
        size, scores = WINDOW * self.worker.groups.pp.size * self.worker.groups.dp.size, dict[int, Score]()
        for a in range(0, max(1, len(batches)), size):
            if self._all_reduce(torch.tensor([float(self._stop())]))[0]:
                raise Interrupted(f"evaluation stopped after {len(scores)} of {len(rows)} rows")
            scores |= self._window(rows, batches[a : a + size]) if batches else {}
        return [scores[i] for i in range(len(rows))]

    def _window(self, rows: Sequence[Row], batches: Sequence[Batch]) -> dict[int, Score]:
        """Of the rows of some micro-batches, by number."""
        dp, inputs = self.worker.groups.dp, list[tuple[MicroBatch, Tensor]]()  # and which scored ids this rank has
        count = -(-len(batches) // dp.size)
        for batch in [*batches, *[Batch()] * (count * dp.size - len(batches))][dp.rank :: dp.size]:
            trees, ids, paths = grow([(rows[i].ids[:-1], shared) for i, shared in batch], self._round)
            asked = list[tuple[int, int]]()  # where it is seen, and which
            for (i, _), path in zip(batch, paths, strict=False):
                asked += zip(path[rows[i].first - 1 :], rows[i].ids[rows[i].first :], strict=True)
            places, labels = torch.tensor(asked, dtype=torch.int64).view(-1, 2).T
            within = trees if self._trees else Documents.of(trees.starts)
            whole = MicroBatch(torch.tensor([ids]), torch.arange(len(ids))[None], documents=within)
            part, own = whole.part(self.worker.share), torch.full((len(ids),), -1)
            own[part.labels[0]] = torch.arange(part.labels.numel())
            places = own[places]
            made, here = part.to(self.worker.device), places >= 0
            self._heads[id(made)] = [x[here].to(self.worker.device) for x in (places, labels)]
            inputs.append((made, here))
        with torch.no_grad():
            self._runtime.run(self.worker.plan.schedule_for(count, training=False), [made for made, _ in inputs])
        lengths = {i: len(rows[i].ids) - rows[i].first for batch in batches for i, _ in batch}
        sizes = [sum(lengths[i] for i, _ in batch) for batch in batches]
        found = torch.zeros(2, sum(sizes), dtype=torch.float64)
        if self.worker.counts_loss:
            for part, (made, here) in zip(found.split(sizes, 1)[dp.rank :: dp.size], inputs, strict=False):
                part[:, here] = self._heads[id(made)].double().cpu()
        self._heads.clear()
        parts = zip(lengths, self._all_reduce(found).split([*lengths.values()], 1), strict=True)
        return {i: Score(part[0].numpy(), part[1].numpy() > 0.5) for i, part in parts}

    def _all_reduce(self, values: Tensor) -> Tensor:
        """The sum over all ranks of float64 `values`; every element is of one rank."""
        moved = values.double().to(self.worker.device)
        self.worker.groups.world.all_reduce(moved).wait()
        return moved.cpu()


def pack(rows: Sequence[Sequence[int]], budget: int, trees: bool) -> Iterator[Batch]:
    """Micro-batches, with alike rows together: as many as `budget` tokens hold, at least one."""
    batch, tokens, tree, before = Batch(), 0, 0, list[int]()
    for row, number in sorted(([*row], number) for number, row in enumerate(rows)):
        shared = len(commonprefix([row, before]))
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
    """Of rows (ids, how many the row before has): trees, all ids, padded, and where each row's are."""
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


def windows(ids: Sequence[int], prefix: int, context: int) -> list[Row]:
    """Rows that score every id once, the first after `prefix`, the others in full windows."""
    everything = [prefix, *ids]
    out = [Row(everything[a : a + context + 1], 1) for a in range(0, len(ids), context)]
    if len(out) > 1 and (rest := len(out[-1].ids) - 1) < context:
        out[-1] = Row(everything[-context - 1 :], context + 1 - rest)
    return out


def score_texts(scorer: Scorer, texts: Iterable[Text], prefix: int | None) -> dict[str, dict[str, Any]]:
    """Of the same texts on every rank, by source: loss [nats per token] and what is made of it.

    Without a `prefix` the first id of each is not scored.
    """
    sizes = defaultdict[str, np.ndarray](lambda: np.zeros(2))  # bytes, documents
    sums = defaultdict[str, np.ndarray](lambda: np.zeros((2, 40)))  # -log p [nats], tokens, by log2 of those before

    def rows() -> Iterator[tuple[str, Row]]:
        for source, ids, size in texts:
            start, rest = (ids[0], ids[1:]) if ids and prefix in (None, ids[0]) else (prefix, ids)
            if start is not None and rest:
                sizes[source] += size, 1
                yield from ((source, row) for row in windows(rest, start, scorer.longest))

    waiting = rows()
    while chunk := list(islice(waiting, AT_A_TIME)):
        for (source, row), score in zip(chunk, scorer([row for _, row in chunk]), strict=True):
            at = np.log2(np.arange(row.first, len(row.ids))).astype(int)
            np.add.at(sums[source][0], at, -score.token_log_probs)
            np.add.at(sums[source][1], at, 1)
    if not sums:
        raise DataError("the texts hold no token to score; give files with text in them")
    out = {}
    for source, own in sums.items():
        (total, tokens), (size, documents) = own.sum(1).tolist(), sizes[source].tolist()
        loss, bits = total / tokens, total / math.log(2) / size if size > 0 else None
        numbers = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": bits}
        numbers |= {"tokens": int(tokens), "documents": int(documents)}
        out[source] = numbers | {"loss_by_position": by_position(*own.tolist())}
    return out
