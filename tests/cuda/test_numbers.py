"""Branches that only a GPU takes, with real numbers: tensors in host memory that say they are on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megallama.config.schema import OptimizerConfig
from megallama.kernels import optimizer, pointwise
from megallama.kernels.candidate import TE, TOLERANCE, Target, accumulate_dtype
from megallama.kernels.pointwise import Norms, rms_norm, softmax_, softmax_at_once_
from megallama.kernels.select import Choice, select_kernels
from megallama.train.assemble import DTYPES, Worker
from tests.small import curve, documents, on_threads, small_config, solo_rank, tokens, train

LAYOUTS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "one rank": (1, {}),
    "grouped heads, full": (1, {"model": {"num_kv_heads": 2}, "memory": {"recompute": "full"}}),
    "documents": (1, {"data": {"document_mask": True}}),
    "tp2": (2, {"parallel": {"tp": 2}}),
    "tp4, padding": (4, {"parallel": {"tp": 4, "sequence_parallel": False}, "memory": {"recompute": "none"}}),
    "pp2, split backward": (2, {"parallel": {"pp": 2, "schedule": "zb-h1"}}),
}


@contextmanager
def on_cuda() -> Iterator[None]:
    """Within the ``with`` block every tensor is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", property(lambda t: True))
        yield


def trained(ranks: int, sections: dict[str, dict[str, Any]], dtype: str) -> list[tuple[list[float], Tensor]]:
    """Losses and norms of three steps and the weights after them, of every rank."""
    config = small_config(**sections, precision={"dtype": dtype})
    data = tokens(config, 3)
    starts = documents(config, 3) if config.data.document_mask else None

    def one(rank: Worker) -> tuple[list[float], Tensor]:
        results = curve(train(rank, data, starts=starts))
        return results, torch.cat([b.weights for b in rank.buffers.values()])

    return on_threads(config, ranks, one)


def watched(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    """The arguments of each call of a pointwise operation that is selected from now on."""
    calls, plain = list[tuple[Any, ...]](), getattr(pointwise, name)

    def noting(*args: Any) -> Any:
        calls.append(args)
        return plain(*args)

    monkeypatch.setattr(pointwise, name, noting)
    return calls


@pytest.mark.parametrize(
    "name, dtype", [*((n, "fp64") for n in LAYOUTS), ("grouped heads, full", "bf16"), ("tp2", "bf16")]
)
def test_training_is_bitwise_that_of_a_cpu(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotation in place on the packed tensor, a chunk's softmax at once: other orders in memory, the same numbers."""
    ranks, sections = LAYOUTS[name]
    want = trained(ranks, sections, dtype)
    rotations = watched(monkeypatch, "apply_rope")
    with on_cuda():
        assert pointwise._blocks(torch.zeros(1, 1 << 20)) == [slice(None)]
        found = trained(ranks, sections, dtype)
    assert rotations and all(x.data_ptr() == out.data_ptr() for x, _, _, out in rotations), "the branch of a CPU"
    for (curve_, weights), (curve_want, weights_want) in zip(found, want, strict=True):
        assert curve_ == curve_want
        assert torch.equal(weights, weights_want)


def test_grouped_heads_within_documents_train_as_on_a_cpu_to_rounding() -> None:
    """Keys and values are repeated there: the gradients of a group's heads are added in another order."""
    sections: dict[str, dict[str, Any]] = {"model": {"num_kv_heads": 1}, "data": {"document_mask": True}}
    ((want, weights_want),) = trained(1, sections, "fp64")
    with on_cuda():
        ((found, weights),) = trained(1, sections, "fp64")
    assert found == pytest.approx(want, rel=1e-12)
    torch.testing.assert_close(weights, weights_want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_attention_that_copies_parts_of_a_packed_tensor_is_given_whole_ones(kv: int) -> None:
    """Transformer Engine takes q, k and v where they lie in one tensor, but only where all have as many heads."""
    config, whole = small_config(model={"num_kv_heads": kv}, batch={"global_batch_size": 1}), set[bool]()
    own, want = solo_rank(config), solo_rank(config)
    stage, data = own.stages[0], tokens(config, 2)
    for layer in stage.layers:
        attend = layer.attend

        def noted(*parts: Any, attend: Any = attend) -> Tensor:
            whole.update(part.is_contiguous() for part in parts[:3])
            return attend(*parts)

        layer.attend = noted
    with on_cuda():
        stage.rotary.apart = True
        assert curve(train(own, data)) == curve(train(want, data))
    assert torch.equal(own.buffers[0].weights, want.buffers[0].weights)
    assert whole == {kv < 4}


def test_only_transformer_engine_copies_them() -> None:
    kernels = select_kernels(Target(torch.device("cpu"), torch.float32))
    assert not kernels.apart
    assert replace(kernels, choices=(Choice("attention", TE, ()),)).apart
    assert not replace(kernels, choices=(Choice("RMSNorm", TE, ()),)).apart


@pytest.mark.parametrize("name", ["one rank", "tp2"])
def test_training_with_a_softmax_at_once_is_the_same_to_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, sections = LAYOUTS[name]
    want = trained(ranks, sections, "fp64")
    calls = watched(monkeypatch, "softmax_at_once_")
    monkeypatch.setattr(pointwise, "softmax_", pointwise.softmax_at_once_)
    for (found, _), (own, _) in zip(trained(ranks, sections, "fp64"), want, strict=True):
        assert found == pytest.approx(own, rel=1e-12)
    assert calls


def softmax_case(dtype: torch.dtype, scaled: bool, way: Callable[..., None]) -> list[Tensor]:
    """What a softmax in place leaves: probabilities, log-sums, picked logits; of a view with other columns."""
    generator = torch.Generator().manual_seed(3)
    wide = (torch.randn(40, 72, generator=generator, dtype=torch.float64) * 9).to(dtype)
    wide[3, 7] = 60  # a row that is all but certain
    logits, index = wide[:, :61], torch.randint(0, 61, (40, 1), generator=generator)
    log_sum, picked = (torch.full((40,), 7.0, dtype=accumulate_dtype(dtype)) for _ in range(2))
    scale = torch.rand(40, generator=generator, dtype=torch.float64).to(log_sum.dtype) if scaled else None
    before = wide[:, 61:].clone()
    way(logits, index, log_sum, picked, scale)
    assert torch.equal(wide[:, 61:], before), "it wrote beside its columns"
    return [logits, log_sum, picked]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_softmax_at_once_is_softmax(dtype: torch.dtype, scaled: bool) -> None:
    exact = softmax_case(dtype, scaled, lambda logits, *a: _exact(logits, *a))
    for name, found, want in zip(
        ("p", "sum", "picked"), softmax_case(dtype, scaled, softmax_at_once_), exact, strict=True
    ):
        error = (found.double() - want.double()).norm() / want.double().norm()
        assert float(error) <= (TOLERANCE[dtype] if name == "p" else TOLERANCE[accumulate_dtype(dtype)]), name


def _exact(logits: Tensor, index: Tensor, log_sum: Tensor, picked: Tensor, scale: Tensor | None) -> None:
    """By torch's plain formulas in float64."""
    x = logits.double()
    log_sum.copy_(x.logsumexp(1))
    picked.copy_(x.gather(1, index).squeeze(1))
    logits.copy_(x.softmax(1) * (1 if scale is None else scale.double().unsqueeze(1)))


def test_softmax_hides_no_infinity() -> None:
    for way in (softmax_, softmax_at_once_):
        for bad in (torch.inf, torch.nan):
            logits = torch.zeros(2, 5, dtype=torch.bfloat16)
            logits[1, 2] = bad
            log_sum, picked = torch.zeros(2), torch.zeros(2)
            way(logits, torch.zeros(2, 1, dtype=torch.int64), log_sum, picked, None)
            assert log_sum[0].isfinite() and not log_sum[1].isfinite()
            assert logits[0].isfinite().all() and logits[1].isnan().any()


def remembering(calls: list[int]) -> Norms:
    """A pair of kernels as Transformer Engine's: the forward gives 1 / rms, the backward wants it."""

    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, None, Tensor]:
        return rms_norm(x, weight, eps), None, pointwise._inverse_rms(x, eps).view(-1)

    def backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        calls[0] += rstd.dim() == 1  # as the forward gave it
        assert torch.allclose(rstd.view(-1, 1), pointwise._inverse_rms(x, eps), rtol=1e-6)
        return pointwise.rms_norm_backward(dy, x, weight, eps)

    return pointwise._norm_pair(forward, backward)


@pytest.mark.parametrize("recompute, kept", [("selective", 9), ("full", 9), ("none", 1)])
def test_the_statistics_of_a_norm_just_done_are_not_made_again(recompute: str, kept: int) -> None:
    """2 norms in each of 4 layers and the last one, which alone is at hand where nothing is recomputed."""
    config = small_config(memory={"recompute": recompute}, batch={"global_batch_size": 1})
    rank, other, calls = solo_rank(config), solo_rank(config), [0]
    forward, backward = remembering(calls)
    for layer in rank.stages[0].layers:
        for linear in (layer.qkv_proj, layer.gate_up_proj):
            linear.norm._pointwise = replace(linear.norm._pointwise, add_norm=forward, add_norm_backward=backward)
    head = rank.stages[0].head
    assert head is not None
    head.norm._pointwise = replace(head.norm._pointwise, add_norm=forward, add_norm_backward=backward)
    data = tokens(config, 2)
    assert curve(train(rank, data)) == curve(train(other, data))
    assert torch.equal(rank.buffers[0].weights, other.buffers[0].weights)
    assert calls == [2 * kept]


def test_statistics_of_another_input_or_of_one_that_has_changed_are_not_used() -> None:
    calls = [0]
    add_norm, add_norm_backward = remembering(calls)

    def forward(x: Tensor) -> None:
        add_norm(x, None, weight, 1e-5)

    def backward(dy: Tensor, x: Tensor) -> None:
        add_norm_backward(dy, x, weight, 1e-5, None, torch.empty(8), True, False)

    x, y, dy = (torch.randn(6, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    weight = torch.ones(8)
    forward(x)
    backward(dy, y)
    forward(x)
    x.mul_(2)
    backward(dy, x)
    assert calls == [0]
    forward(x)
    backward(dy, x)
    assert calls == [1]
    backward(dy, x)
    assert calls == [1], "kept no longer than until the next backward"


@pytest.mark.parametrize("clip", [None, 2.0])
def test_adamw_of_another_package_asks_the_device_nothing(clip: float | None) -> None:
    """Tensors without values: whoever reads one fails."""
    told: list[Any] = []
    step = optimizer._multi_tensor_adam(lambda *args: told.append(args))
    held = [torch.empty(5, device="meta") for _ in range(5)]
    divisor = None if clip is None else torch.empty((), device="meta")
    step([[t] for t in held], OptimizerConfig(), 1e-3, 0.1, divisor, 7)
    assert told[0][7:] == (7, 1, 1, 0.1)
