"""Flat buffers: alignment, buckets, shards, and segments that lead back to global tensors."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from megallama.config.schema import ModelConfig
from megallama.plan.params import ALIGN, BufferLayout, ParamBuilder, ParamSpec, build_layout, global_shapes

MODEL = ModelConfig(
    hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, ffn_hidden_size=24, vocab_size=21, tie_embeddings=True
)


def stage(tp: int = 1, tp_rank: int = 0, first: bool = True, last: bool = False) -> tuple[ParamSpec, ...]:
    return ParamBuilder(MODEL, tp, tp_rank).stage([0, 1, 2], first, last)


def layout(dp: int, elements: int, **where: bool) -> BufferLayout:
    return build_layout(stage(**where), dp, elements)


@pytest.mark.parametrize("dp,elements", list(product((1, 2, 3, 8), (1, 1000, 10**9))))
def test_buckets(dp: int, elements: int) -> None:
    made = layout(dp, elements)
    assert made.buckets[0].start == 0 and made.buckets[-1].stop == made.numel
    assert [b.index for b in made.buckets] == list(range(len(made.buckets)))
    for bucket, after in zip(made.buckets, made.buckets[1:], strict=False):
        assert bucket.stop == after.start
    placed = []
    for bucket in made.buckets:
        assert (bucket.stop - bucket.start) % (dp * ALIGN) == 0
        ranges = [bucket.shard(dp, r) for r in range(dp)]
        assert ranges[0][0] == bucket.start and ranges[-1][1] == bucket.stop
        assert all(a[1] == b[0] for a, b in zip(ranges, ranges[1:], strict=False))
        at = bucket.start
        for p in bucket.params:
            assert p.offset % ALIGN == 0 and p.offset >= at
            at = p.offset + p.spec.numel
            assert (p.spec.decay, p.spec.tied) == (bucket.decay, bucket.tied)
        assert at <= bucket.stop
        placed += [p.spec.name for p in bucket.params]
    assert sorted(placed) == sorted(s.name for s in stage())


def test_order_is_that_of_the_backward() -> None:
    made = layout(1, 1000)
    matrices = [p.spec.name for b in made.buckets if b.decay and not b.tied for p in b.params]
    assert matrices == [s.name for s in reversed(stage()) if s.decay and not s.tied]
    assert [(b.decay, b.tied) for b in made.buckets[-2:]] == [(True, True), (False, False)]


def test_bucket_size() -> None:
    assert len(layout(1, 10**9).buckets) == 3  # matrices, the tied embedding, norms
    assert len(layout(1, 1).buckets) == 12 + 2  # one per matrix
    for bucket in layout(1, 1000).buckets[:-3]:
        assert sum(p.spec.numel for p in bucket.params) >= 1000
        assert sum(p.spec.numel for p in bucket.params[:-1]) < 1000


def test_the_tied_matrix_has_one_layout_on_both_ends() -> None:
    ends = [layout(4, 1000, first=True, last=False), layout(4, 1000, first=False, last=True)]
    tied = [next(b for b in end.buckets if b.tied) for end in ends]
    assert len({b.stop - b.start for b in tied}) == 1
    assert [b.params[0].offset - b.start for b in tied] == [0, 0]


@pytest.mark.parametrize("dp,tp", list(product((1, 3), (1, 2, 4))))
def test_shards_cover_the_model_once(dp: int, tp: int) -> None:
    """Segments of all ranks' shards, as boxes of global tensors: every owned element exactly once."""
    count = {key: np.zeros(shape, int) for key, shape in global_shapes(MODEL).items()}
    for rank in range(tp):
        made = build_layout(stage(tp, rank, first=True, last=True), dp, 1000)
        for bucket, d in product(made.buckets, range(dp)):
            start, stop = bucket.shard(dp, d)
            at = start
            for segment in made.segments(start, stop):
                assert at <= segment.offset and segment.offset + segment.count <= stop
                at = segment.offset + segment.count
                boxes = list(segment.boxes())
                assert sum(b.numel for b in boxes) == segment.count
                for box in boxes:
                    count[box.key][tuple(map(slice, box.start, box.stop))] += segment.part.owner
    assert all((c == 1).all() for c in count.values())


def test_segment_of_a_part() -> None:
    made = layout(1, 10**9)
    place = next(p for b in made.buckets for p in b.params if p.spec.name == "layers.1.qkv_proj")
    k = place.spec.parts[1]
    first = place.offset + k.row * 16
    (segment,) = made.segments(first + 5, first + 40)
    assert (segment.part, segment.first, segment.count) == (k, 5, 35)
    assert [b.numel for b in segment.boxes()] == [11, 16, 8]


def test_a_bucket_is_closed_once_it_is_exactly_full() -> None:
    first = next(s for s in reversed(stage()) if s.decay and not s.tied)
    assert [p.spec for p in layout(1, first.numel).buckets[0].params] == [first]
