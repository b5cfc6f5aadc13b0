"""The sharded optimizer: gradients are reduced, shards computed, weights gathered (see `plan.params`).

A bucket's gradients are reduce-scattered under the backward, once all its parameters have reported theirs.  The
schedule says which contributions are the last, so collectives have one order on every rank; where replicas have other
orders, all is reduced after the backward.  Where weights are fp32 (or fp64), they are the masters.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megallama.comm.group import Groups, Handle
from megallama.config.schema import OptimizerConfig, OverlapConfig
from megallama.kernels.optimizer import AdamWStep, SumOfSquares
from megallama.layers.param import FlatBuffers, Param, Shard, digest
from megallama.plan.params import Bucket, Segment

# of this rank's range of one bucket: weights, grads, master, the rule's moments; and step
Tensors = dict[str, Tensor]


class GradSync:
    """Sums the main gradients of one stage; this rank's shards hold the result."""

    def __init__(self, buffers: FlatBuffers, groups: Groups, overlap: bool) -> None:
        self.buffers = buffers
        self._groups = groups
        self._overlap, self._early = overlap, False
        self._bucket_of = {p.spec.name: b for b in buffers.layout.buckets for p in b.params}
        self._pending: dict[int, int] = {}
        self._handles: dict[int, Handle] = {}
        self.norms: list[Tensor] = []  # of this rank's own gradients, where others add theirs
        self._padding: list[Tensor] = []  # what no element of the model lies in
        for bucket in buffers.layout.buckets:
            start, stop = self.range_of(bucket)
            edges = [start, *(at for s in self.segments(bucket) for at in (s.offset, s.offset + s.count)), stop]
            self._padding += [buffers.grads[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]

    def start_step(self, early: bool) -> None:
        """Nothing of this step is reduced yet; only if `early` may it be before `finish`."""
        self._early = early and self._overlap
        for param in self.buffers.params.values():
            param.overwrite = True
        self.norms.clear()
        self._pending = {b.index: sum(p.spec.uses for p in b.params) for b in self.buffers.layout.buckets}

    @contextmanager
    def last_microbatch(self) -> Iterator[None]:
        """Contributions in the ``with`` block are the last of their parameters."""
        for param in self.buffers.params.values():
            param.on_grad_done = self._grad_done
        yield
        for param in self.buffers.params.values():
            param.on_grad_done = None

    def finish(self) -> None:
        """Return when this rank's shards hold the sums over all ranks."""
        for bucket in self.buffers.layout.buckets:
            if bucket.index not in self._handles:
                self._reduce(bucket)
        for handle in self._handles.values():
            handle.wait()
        self._handles.clear()
        for gap in self._padding:  # a reduction may have left anything there
            gap.zero_()
        self._sum_copies()

    def range_of(self, bucket: Bucket) -> tuple[int, int]:
        """This rank's shard of a bucket, as a range of the flat buffers."""
        return bucket.shard(self._groups.dp_cp.size, self._groups.dp_cp.rank)

    def segments(self, bucket: Bucket) -> Iterator[Segment]:
        return self.buffers.layout.segments(*self.range_of(bucket))

    def _grad_done(self, param: Param) -> None:
        bucket = self._bucket_of[param.spec.name]
        self._pending[bucket.index] -= 1
        assert self._pending[bucket.index] >= 0, f"{param.spec.name} contributed after its bucket was complete"
        if self._pending[bucket.index] == 0 and self._early:
            self._reduce(bucket)

    def _reduce(self, bucket: Bucket) -> None:
        full = self.buffers.grads[bucket.start : bucket.stop]
        if self._groups.dp_cp.size > 1:
            own = [self.buffers.params[placement.spec.name].main_grad for placement in bucket.params]
            self.norms += torch._foreach_norm(own)
        shard = self.buffers.grads[slice(*self.range_of(bucket))]
        self._handles[bucket.index] = self._groups.dp_cp.reduce_scatter(shard, full)

    def _sum_copies(self) -> None:
        """All-reduce what several ranks hold, packed: it is small, and lies alike on all."""
        held = [s for bucket in self.buffers.layout.buckets for s in self.segments(bucket)]
        for over, group in (("tp", self._groups.tp), ("kv", self._groups.kv)):
            chosen = [s for s in held if s.part.sum_over == over]
            if chosen and group.size > 1:
                views = [self.buffers.grads[s.offset : s.offset + s.count] for s in chosen]
                packed = torch.cat(views)
                group.all_reduce(packed).wait()
                for view, summed in zip(views, packed.split([s.count for s in chosen]), strict=True):
                    view.copy_(summed)


class AdamW:
    """AdamW (Loshchilov & Hutter 2019) as `kernel` computes it, each element by itself."""

    def __init__(self, config: OptimizerConfig, kernel: AdamWStep, moments: Sequence[str]) -> None:
        self._config, self._kernel = config, kernel
        self.moments = moments  # state beside the masters; zero before the first step

    def __call__(self, shards: Sequence[Tensors], lr: float, scale: float, decay: bool, number: int) -> None:
        """In place: "master", moments, from "grads" times `scale`; "step" counts to `number`."""
        divisor = None if scale == 1.0 else shards[0]["grads"].new_full((), 1 / scale)
        lists = [[shard[name] for shard in shards] for name in ("master", "grads", *self.moments, "step")]
        self._kernel(lists, self._config, lr, self._config.weight_decay if decay else 0.0, divisor, number)


class Update:
    """What a rank does to its weights in a step: `reduce`, `compute`, `gather`."""

    def __init__(
        self, stages: Sequence[FlatBuffers], groups: Groups, overlap: OverlapConfig, rule: AdamW,
        sum_of_squares: SumOfSquares,
    ) -> None:  # fmt: skip
        self.syncs = [GradSync(buffers, groups, overlap.grad_reduce) for buffers in stages]
        self._groups, self._rule, self._sum_of_squares = groups, rule, sum_of_squares
        self._overlap_gather = overlap.param_gather
        self._steps = 0  # taken, known without asking the device
        buckets = ((sync, bucket) for sync in self.syncs for bucket in sync.buffers.layout.buckets)
        self._held = [(sync, bucket, self._tensors(sync, bucket)) for sync, bucket in buckets]

    def _tensors(self, sync: GradSync, bucket: Bucket) -> Tensors:
        at = slice(*sync.range_of(bucket))
        weights, grads = sync.buffers.weights[at], sync.buffers.grads[at]
        master = weights if weights.dtype == grads.dtype else torch.zeros_like(grads)
        moments = {name: torch.zeros_like(grads) for name in self._rule.moments}
        step = torch.zeros((), dtype=torch.float32, device=grads.device)
        return {"weights": weights, "grads": grads, "master": master, **moments, "step": step}

    def masters(self) -> Iterator[tuple[GradSync, Bucket, Tensor]]:
        return ((sync, bucket, tensors["master"]) for sync, bucket, tensors in self._held)

    def start_step(self, early: bool = True) -> None:
        """early: all ranks complete shared gradients in one order, so reductions may overlap."""
        for sync in self.syncs:
            sync.start_step(early)

    def reduce(self) -> Tensor:
        """Complete the gradients; the sum of squares of what this rank counts of them, float64.

        Summed over all ranks it is the squared norm of the global gradient: each element is counted by one.
        """
        for sync in self.syncs:
            sync.finish()
        copies = [tensors["grads"] for _, bucket, tensors in self._held if bucket.tied]
        for copy in copies[1:]:  # of a tied embedding, both on this rank: each gets the sum
            copies[0].add_(copy)
        for copy in copies[:1]:
            self._groups.embedding.all_reduce(copy).wait()
        for copy in copies[1:]:
            copy.copy_(copies[0])
        total = self._sum_of_squares([run for sync, bucket, _ in self._held for run in self._counted(sync, bucket)])
        return total.to(self.syncs[0].buffers.grads.device)

    def _counted(self, sync: GradSync, bucket: Bucket) -> list[Tensor]:
        ranges: list[list[int]] = []
        for segment in (segment for segment in sync.segments(bucket) if segment.part.owner):
            if not (ranges and ranges[-1][1] == segment.offset):
                ranges.append([segment.offset] * 2)
            ranges[-1][1] += segment.count
        return [sync.buffers.grads[a:b] for a, b in ranges]

    def compute(self, lr: float, multiplier: float) -> None:
        """Apply the rule to this rank's shards; `multiplier`: clipping and loss scale."""
        self.wait()  # for what no forward has read: nothing is written that is being gathered
        self._steps += 1
        for decay in (True, False):
            if shards := [tensors for _, bucket, tensors in self._held if bucket.decay is decay]:
                self._rule(shards, lr, multiplier, decay, self._steps)

    def gather(self, *, overlap: bool = True) -> None:
        """Masters -> weights on every rank that shares them, in the order in which the forward reads them.

        With overlap.param_gather and `overlap` it returns at once: who reads a weight waits for it.
        """
        for sync in self.syncs:
            for bucket, tensors in reversed([(b, t) for s, b, t in self._held if s is sync]):
                if tensors["master"] is not tensors["weights"]:
                    tensors["weights"].copy_(tensors["master"])
                full = sync.buffers.weights[bucket.start : bucket.stop]
                gather = sync.buffers.gathers[bucket.index]
                gather.handle = self._groups.dp_cp.all_gather(full, tensors["weights"])
                if not (overlap and self._overlap_gather):
                    gather.wait()

    def wait(self) -> None:
        """Return when all weights are whole."""
        for sync in self.syncs:
            for gather in sync.buffers.gathers:
                gather.wait()

    def shards(self, owned_only: bool) -> list[Shard]:
        """This rank's state as rectangles of the model's tensors.

        `owned_only` leaves out copies that another rank counts.  The tensors are views; once written call `loaded`.
        """
        out = []
        for sync, bucket, tensors in self._held:
            start, _ = sync.range_of(bucket)
            for segment in sync.segments(bucket):
                at = segment.offset - start
                for box in segment.boxes() if segment.part.owner or not owned_only else ():
                    rows = slice(at, at + box.numel)
                    out.append(Shard(box, {name: tensors[name][rows] for name in ("master", *self._rule.moments)}))
                    at += box.numel
        return out

    def loaded(self, steps: int) -> None:
        """The shards have been written; `steps` optimizer steps lie behind them."""
        self._steps = steps
        for *_, tensors in self._held:
            tensors["step"].fill_(steps)
        self.gather(overlap=False)


def wrong_copies(update: Update, groups: Groups) -> list[tuple[str, list[int]]]:
    """Tensors that differ from their copies, and the global ranks that are wrong, or of which one is.

    Over dp and cp a rank owns a shard of every bucket, and all weights there are the cast of its masters.  Norm weights
    have a master on every rank of tp, shared key/value heads on each of kv, a tied embedding two.  All ranks call it
    between updates, and get the same.  Where no master decides (weights are masters, masters copies) the majority
    does, and where there is none all are named.
    """
    update.wait()
    pieces: dict[str, list[tuple[str, Tensor]]] = {"dp_cp": [], "tp": [], "kv": [], "embedding": []}
    dp, owners, masters, tied, own, found = groups.dp_cp, list[int](), list[Tensor](), 0, False, []
    for sync, bucket, master in update.masters():
        weights, (start, _), tied = sync.buffers.weights, sync.range_of(bucket), tied + bucket.tied
        own = master.dtype == weights.dtype
        for owner in range(dp.size):
            for segment in sync.buffers.layout.segments(*bucket.shard(dp.size, owner)):
                key, a, b = segment.part.box.key, segment.offset, segment.offset + segment.count
                mine = master[a - start : b - start] if owner == dp.rank else master[:0]  # digest 0
                pieces["dp_cp"].append((key, digest(weights[a:b])))
                masters.append(digest(mine, weights.dtype))
                owners.append(owner)
                over = "embedding" if bucket.tied else "tp" if not bucket.decay else segment.part.sum_over
                if owner == dp.rank and over != "none":
                    pieces[over].append((key, digest(mine)))
    truth = torch.stack(masters) if masters else torch.zeros(1)
    dp.all_reduce(truth).wait()
    for axis, held in ((axis, held) for axis, held in pieces.items() if held):
        group, here, decides = getattr(groups, axis), tied if axis == "embedding" else 1, axis == "dp_cp" and not own
        digests = torch.stack([one for _, one in held])
        everyone = digests.new_empty(group.size * len(held))
        group.all_gather(everyone, digests).wait()
        columns = everyone.view(group.size * here, -1).T.tolist()  # by rank, `here` copies each
        for number, ((key, _), column) in enumerate(zip(held, columns, strict=False)):
            column += decides * (group.size + 1) * [int(truth[number])]
            right, count = Counter(column).most_common(1)[0]  # right: what more than half are
            wrong = [at for at, digested in enumerate(column) if digested != right or 2 * count <= len(column)]
            everybody = decides and len(wrong) == group.size  # then the master is
            ranks = {group.ranks[at // here] for at in ([owners[number]] if everybody else wrong)}
            found += [(key, sorted(ranks))] * (len(ranks) > 0)
    return list({str(one): (one[0], one[1]) for told in groups.world.gather_values(found) for one in told}.values())
