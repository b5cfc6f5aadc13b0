"""The sharded optimizer: the global norm under every replication, clipping, decay, overlap that changes no bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from megallama.kernels.optimizer import sum_of_squares
from megallama.optim.update import Update
from megallama.plan.box import Box
from megallama.plan.params import global_shapes
from megallama.train.assemble import Worker
from tests.small import micro_batches, on_threads, small_config, solo_rank, tokens, train

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {"tp": 2}),
    (4, {"tp": 4}),
    (4, {"tp": 4, "sequence_parallel": False}),
    (2, {}),
    (3, {}),
    (4, {"pp": 2}),
    (8, {"tp": 4, "pp": 2}),
]
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared heads, tied, padded": {"num_kv_heads": 2, "tie_embeddings": True, "vocab_size": 59},
}


def gradients(rank: Worker) -> tuple[float, dict[str, torch.Tensor]]:
    """The squared norm as counted, and this rank's counted gradients placed into whole tensors."""
    config = rank.plan.config
    batches = micro_batches(rank, tokens(config, 1)[0])
    rank.optimizer.start_step()
    rank.runtime.run(rank.plan.schedule_for(len(batches)), [replace(b, grad_scale=1e-3) for b in batches])
    squares = rank.optimizer.reduce().reshape(1)
    rank.groups.world.all_reduce(squares).wait()
    whole = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in global_shapes(config.model).items()}
    for sync in rank.optimizer.syncs:
        for bucket in sync.buffers.layout.buckets:
            for segment in sync.segments(bucket):
                if segment.part.owner:
                    at = segment.offset
                    for box in segment.boxes():
                        values = sync.buffers.grads[at : at + box.numel].view(box.shape)
                        whole[box.key][tuple(map(slice, box.start, box.stop))] += values
                        at += box.numel
    return float(squares), whole


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("ranks", "parallel"), LAYOUTS, ids=str)
def test_gradients_and_their_norm_are_those_of_one_rank(ranks: int, parallel: dict[str, Any], model: str) -> None:
    batch = {"global_batch_size": 24, "micro_batch_size": 2}
    want, reference = gradients(solo_rank(small_config(model=MODELS[model], batch=batch)))
    results = on_threads(small_config(model=MODELS[model], batch=batch, parallel=parallel), ranks, gradients)
    for name, tensor in reference.items():
        own = torch.stack([whole[name] for _, whole in results]).sum(0)
        assert torch.allclose(own, tensor, rtol=1e-9, atol=1e-12), name
    assert abs(want - sum(float(t.square().sum()) for t in reference.values())) <= 1e-12 * want
    for squares, _ in results:
        assert abs(squares - want) <= 1e-11 * want


def test_both_copies_of_a_tied_embedding_on_one_rank_get_the_sum() -> None:
    """In a V the first rank has the first stage and the last."""
    parallel = {"pp": 2, "chunks": 2, "schedule": "zb-v"}
    tied = {"tie_embeddings": True}

    def copies(rank: Worker) -> list[torch.Tensor]:
        gradients(rank)
        return [tensors["grads"] for _, bucket, tensors in rank.optimizer._held if bucket.tied]

    alone = solo_rank(small_config(model=tied))
    gradients(alone)
    want = alone.buffers[0].params["embed_tokens"].main_grad.view(-1)
    (first, last), others = on_threads(small_config(model=tied, parallel=parallel), 2, copies)
    assert torch.equal(first, last) and others == []
    assert torch.allclose(first[: len(want)], want, rtol=1e-9, atol=1e-12)  # the rest fills the bucket


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("parallel", [{}, {"pp": 2, "schedule": "zb-h1"}, {"pp": 2, "chunks": 2}], ids=str)
def test_overlap_changes_no_bit(parallel: dict[str, Any], dtype: str) -> None:
    def weights(rank: Worker) -> list[torch.Tensor]:
        train(rank, tokens(rank.plan.config, 3))
        rank.optimizer.wait()
        return [buffers.weights.clone() for buffers in rank.buffers.values()]

    results = []
    for on in (True, False):
        overlap = {"grad_reduce": on, "param_gather": on}
        config = small_config(parallel=parallel, overlap=overlap, precision={"dtype": dtype})
        results.append(on_threads(config, 2 * parallel.get("pp", 1), weights))
    for own, theirs in zip(*results, strict=True):
        for a, b in zip(own, theirs, strict=True):
            assert torch.equal(a, b)


def test_clipping_and_decay_follow_the_formula() -> None:
    """One step by hand: clip to 0.5, decay of matrices only, AdamW's first step."""
    config = small_config(optimizer={"clip_grad": 0.5, "lr": 1e-2, "weight_decay": 0.1})
    rank = solo_rank(config)
    params = rank.buffers[0].params
    before = {name: p.data.clone() for name, p in params.items()}
    (result,) = train(rank, tokens(config, 1))
    norm = sum(float(p.main_grad.square().sum()) for p in params.values()) ** 0.5  # after clipping, in place
    assert result.grad_norm > 0.5
    assert abs(norm - 0.5) <= 1e-6
    for name, param in params.items():
        decay = 0.0 if "norm" in name else 0.1
        grad = param.main_grad
        want = before[name] * (1 - 1e-2 * decay) - 1e-2 * grad / (grad.abs() + 1e-8)
        assert torch.allclose(param.data, want, rtol=1e-9, atol=1e-12), name


class Descent:
    """A second rule: plain gradient descent, with one number per element beside the masters."""

    moments: tuple[str, ...] = ("last",)

    def __call__(
        self, shards: Sequence[dict[str, torch.Tensor]], lr: float, scale: float, decay: bool, number: int
    ) -> None:
        for shard in shards:
            shard["last"].copy_(shard["grads"] * scale)
            shard["master"].sub_(lr * shard["last"])
            shard["step"].add_(1)
            assert number == shard["step"] == 4


def test_another_rule_has_its_state_in_the_shards() -> None:
    config = small_config(precision={"dtype": "bf16"})
    rank = solo_rank(config)
    update = Update([*rank.buffers.values()], rank.groups, config.overlap, Descent(), sum_of_squares)
    for shard in update.shards(owned_only=True):
        assert [*shard.state] == ["master", "last"]
        shard.state["master"].fill_(1.0)
    update.loaded(steps=3)
    rank.buffers[0].grads.fill_(0.5)
    update.compute(0.25, 2.0)
    update.gather()
    update.wait()
    assert all((p.data == 0.75).all() for p in rank.buffers[0].params.values())
    assert all((s.state["last"] == 1.0).all() for s in update.shards(owned_only=True))


def test_owned_shards_hold_every_element_once_and_all_shards_the_copies_too() -> None:
    config = small_config(model=MODELS["shared heads, tied, padded"], parallel={"tp": 4})

    def boxes(rank: Worker) -> list[list[Box]]:
        return [[shard.box for shard in rank.optimizer.shards(owned_only=owned)] for owned in (True, False)]

    for owned, held in zip((True, False), zip(*on_threads(config, 4, boxes), strict=True), strict=True):
        counts = {name: torch.zeros(shape) for name, shape in global_shapes(config.model).items()}
        for box in (box for of_rank in held for box in of_rank):
            counts[box.key][tuple(map(slice, box.start, box.stop))] += 1
        assert all((count >= 1).all() for count in counts.values())
        assert all((count == 1).all() for count in counts.values()) is owned


def test_without_clipping_gradients_are_taken_as_they_are() -> None:
    config = small_config(optimizer={"clip_grad": 0.0})
    rank = solo_rank(config)
    (result,) = train(rank, tokens(config, 1))
    norm = sum(float(p.main_grad.square().sum()) for p in rank.buffers[0].params.values()) ** 0.5
    assert abs(norm - result.grad_norm) <= 1e-12 * norm


def test_masters_are_the_weights_where_the_formats_agree() -> None:
    for dtype, shared in (("fp32", True), ("fp64", True), ("bf16", False), ("fp16", False)):
        rank = solo_rank(small_config(precision={"dtype": dtype}))
        pairs = [(tensors["weights"], tensors["master"]) for *_, tensors in rank.optimizer._held]
        assert all((weights.data_ptr() == master.data_ptr()) is shared for weights, master in pairs)
        if not shared:  # weights are the rounded masters
            assert all(torch.equal(weights, master.to(weights.dtype)) for weights, master in pairs)


def test_unequal_masks_over_micro_batches_equal_one_large_batch() -> None:
    config = small_config(batch={"micro_batch_size": 8})
    data = tokens(config, 2)
    masks = torch.rand(2, 8, 16, generator=torch.Generator().manual_seed(1)) < torch.linspace(0.05, 1, 8)[:, None]
    want = [(r.loss, r.grad_norm, r.tokens) for r in train(solo_rank(config), data, masks)]
    assert want[0][2] == int(masks[0].sum())
    split = small_config(parallel={"pp": 2})
    for results in on_threads(split, 4, lambda rank: train(rank, data, masks)):
        for own, (loss, norm, count) in zip(results, want, strict=True):
            assert own.tokens == count
            assert abs(own.loss - loss) <= 1e-12 * loss
            assert abs(own.grad_norm - norm) <= 1e-12 * norm
