"""When gradients are reduced and weights are awaited: as early, and as late, as the schedule allows."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest

from megallama.layers.batch import MicroBatch
from megallama.layers.param import Param
from megallama.plan.params import Bucket
from megallama.train.assemble import Worker
from tests.small import body_of, on_threads, small_config, tokens, train

SCHEDULES: dict[str, tuple[int, dict[str, Any]]] = {
    "one stage": (2, {}),
    "gpipe": (4, {"pp": 2, "schedule": "gpipe"}),
    "1f1b": (4, {"pp": 2}),
    "interleaved": (4, {"pp": 2, "chunks": 2}),
    "zb-h1": (4, {"pp": 2, "schedule": "zb-h1"}),
    "zb-h2": (4, {"pp": 2, "schedule": "zb-h2"}),
    "zb-v": (4, {"pp": 2, "chunks": 2, "schedule": "zb-v"}),
    "v-half": (4, {"pp": 2, "chunks": 2, "schedule": "v-half"}),
    "dualpipe-v": (4, {"pp": 2, "chunks": 2, "schedule": "dualpipe-v"}),
    "tp": (4, {"tp": 2}),
    "alone, split": (2, {"schedule": "zb-h1"}),
}
Event = tuple[str, int, int, str]  # contribution or reduction, stage, bucket, action


def watch(rank: Worker) -> list[Event]:
    """Contributions to buckets and their reductions, in order, in the second of two steps."""
    events: list[Event] = []

    def action() -> str:
        return str(rank.runtime.observer.action)

    for stage, sync in zip(rank.stages, rank.optimizer.syncs, strict=True):
        bucket_of = {p.spec.name: b.index for b in sync.buffers.layout.buckets for p in b.params}

        def grad_done(param: Param, stage: int = stage, bucket_of: dict[str, int] = bucket_of) -> None:
            events.append(("contribution", stage, bucket_of[param.spec.name], action()))
            Param.grad_done(param)

        def reduce(bucket: Bucket, stage: int = stage, real: Any = sync._reduce) -> None:
            events.append(("reduction", stage, bucket.index, action()))
            real(bucket)

        sync._reduce = reduce  # type: ignore[method-assign]
        for param in sync.buffers.params.values():
            param.grad_done = partial(grad_done, param)  # type: ignore[method-assign]
    data = tokens(rank.plan.config, 2)
    train(rank, data[:1])
    events.clear()
    train(rank, data[1:])
    return events


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_bucket_is_reduced_with_its_last_gradient(name: str, tied: bool) -> None:
    ranks, parallel = SCHEDULES[name]
    batch = {"global_batch_size": 16}
    config = small_config(
        parallel=parallel, batch=batch, overlap={"bucket_mb": 0.01}, model={"tie_embeddings": tied, "vocab_size": 64}
    )

    def body(rank: Worker) -> tuple[list[Event], list[tuple[int, int]]]:
        buckets = [
            (stage, b.index)
            for stage, sync in zip(rank.stages, rank.optimizer.syncs, strict=True)
            for b in sync.buffers.layout.buckets
        ]
        return watch(rank), buckets

    for events, buckets in on_threads(config, ranks, body):
        assert Counter(e[1:3] for e in events if e[0] == "reduction") == Counter(buckets)
        for stage, index in buckets:
            own = [i for i, e in enumerate(events) if e[1:3] == (stage, index)]
            last, reduction = own[-2:]
            assert [events[i][0] for i in own[-2:]] == ["contribution", "reduction"]
            assert reduction == last + 1, "something else was computed first"
            assert events[reduction][3] == events[last][3] != "None"
        assert len(buckets) > 2 * len({stage for stage, _ in buckets}), "too few buckets to show anything"


def test_with_interleaving_the_first_chunks_are_reduced_while_others_compute() -> None:
    ranks, parallel = SCHEDULES["interleaved"]
    config = small_config(parallel=parallel, batch={"global_batch_size": 16}, overlap={"bucket_mb": 0.01})
    for events in on_threads(config, ranks, watch):
        stages = sorted({e[1] for e in events})
        reduced = [i for i, e in enumerate(events) if e[0] == "reduction" and e[1] == stages[1]]
        computed = [i for i, e in enumerate(events) if e[0] == "contribution" and e[1] == stages[0]]
        assert sum(i > max(reduced) for i in computed) >= 8  # of the other chunk, at least one whole micro-batch


def test_weights_are_awaited_bucket_by_bucket() -> None:
    """When the forward of the first layer runs, the gathers of later layers are still under way."""

    def body(rank: Worker) -> list[int]:
        stage, buffers = rank.stages[0], rank.buffers[0]
        train(rank, tokens(rank.plan.config, 1))
        pending: list[int] = []
        for layer in stage.layers:
            call = layer.down_proj.__class__.__call__

            def counted(x: Any, linear: Any = layer.down_proj, call: Any = call) -> Any:
                out = call(linear, x)
                pending.append(sum(g.handle is not None for g in buffers.gathers))
                return out

            layer.down_proj = counted  # type: ignore[assignment]
        batch = tokens(rank.plan.config, 1)[0]
        hidden = body_of(stage)(None, MicroBatch(batch[0, :-1], batch[0, 1:]))
        assert hidden.shape[0] == batch.shape[1] - 1
        rank.optimizer.wait()
        return pending

    for pending in on_threads(small_config(overlap={"bucket_mb": 0.01}), 2, body):
        assert len(pending) == 4 and pending == sorted(pending, reverse=True)
        assert pending[0] > pending[1] > pending[2] > pending[3], pending


def test_a_step_waits_for_gathers_that_nobody_has_read() -> None:
    """Two optimizer steps and no forward between: the second one must not write under the gathers of the first."""

    def body(rank: Worker) -> list[Any]:
        train(rank, tokens(rank.plan.config, 1))
        for sync in rank.optimizer.syncs:
            sync.buffers.grads.fill_(1e-3)
        rank.optimizer.compute(1e-3, 1.0)
        rank.optimizer.gather()
        rank.optimizer.wait()
        return [b.weights.clone() for b in rank.buffers.values()]

    for dtype in ("bf16", "fp32"):
        config = small_config(precision={"dtype": dtype})
        calm, late = (on_threads(config, 2, body, delays=seed) for seed in (None, 1))
        for own, theirs in zip(late, calm, strict=True):
            assert all(a.isfinite().all() and a.equal(b) for a, b in zip(own, theirs, strict=True))
