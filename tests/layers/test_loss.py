"""The loss: against torch's cross entropy, over tp, with masks, padding columns, any chunk size; never all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megallama.layers.batch import MicroBatch
from megallama.train.assemble import DTYPES, Worker
from tests.small import on_threads, small_config, solo_rank

TOKENS = 30


def batch(vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, 32, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, vocab, (TOKENS,), generator=generator)
    return hidden, labels, torch.rand(TOKENS, generator=generator) < 0.6


def loss_of(rank: Worker, masked: bool) -> tuple[float, torch.Tensor]:
    """The loss sum and this rank's gradient of the hidden states."""
    config = rank.plan.config
    head = rank.stages[0].head
    assert head is not None
    hidden, labels, mask = batch(config.model.vocab_size)
    tp = rank.groups.tp
    rows = slice(tp.rank * TOKENS // tp.size, (tp.rank + 1) * TOKENS // tp.size)
    leaf = hidden[rows].to(DTYPES[config.precision.dtype]).requires_grad_()
    total = head(leaf, None, MicroBatch(labels, labels, mask if masked else None, grad_scale=0.5))
    total.backward()
    assert leaf.grad is not None
    return total.item(), leaf.grad


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 30, 1000])
def test_one_rank_equals_torch(chunk: int, masked: bool) -> None:
    rank = solo_rank(small_config(model={"init_std": 0.3}, memory={"loss_chunk_tokens": chunk}))
    total, grad = loss_of(rank, masked)
    hidden, labels, mask = batch(61)
    leaf = hidden.clone().requires_grad_()
    weight = rank.buffers[0].params["lm_head"].data.clone().requires_grad_()
    normed = leaf * torch.rsqrt(leaf.square().mean(-1, keepdim=True) + 1e-5)
    losses = F.cross_entropy(normed @ weight.t(), labels, reduction="none")
    want = (losses * mask).sum() if masked else losses.sum()
    (0.5 * want).backward()
    assert abs(total - want.item()) <= 1e-12 * want.item()
    assert torch.allclose(grad, leaf.grad, rtol=1e-11, atol=1e-13)
    assert torch.allclose(rank.buffers[0].params["lm_head"].main_grad, weight.grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("vocab", [61, 64, 4, 3])
@pytest.mark.parametrize("tp", [2])
def test_any_vocabulary_over_tp_equals_one_rank(tp: int, vocab: int) -> None:
    model = {"vocab_size": vocab, "init_std": 0.3}
    total, grad = loss_of(solo_rank(small_config(model=model)), True)
    parts = on_threads(small_config(model=model, parallel={"tp": tp}), tp, lambda rank: loss_of(rank, True))
    for own, _ in parts:
        assert abs(own - total) <= 1e-12 * total
    assert torch.allclose(torch.cat([g for _, g in parts]), grad, rtol=1e-11, atol=1e-14)


def test_a_rank_that_holds_only_padding_takes_no_part() -> None:
    """5 ids over 4 ranks: rows 0-1, 2-3, 4 and nothing at all."""
    model = {"vocab_size": 5, "init_std": 0.3}
    total, _ = loss_of(solo_rank(small_config(model=model)), True)
    config = small_config(model=model, parallel={"tp": 4, "sequence_parallel": False})

    def body(rank: Worker) -> tuple[float, float]:
        head = rank.stages[0].head
        assert head is not None
        hidden, labels, mask = batch(5)
        total = head(hidden.requires_grad_(), None, MicroBatch(labels, labels, mask))
        total.backward()
        rows = head.param.main_grad[head.valid :]
        return total.item(), float(rows.abs().sum()) if rows.numel() else 0.0

    for own, padding in on_threads(config, 4, body):
        assert abs(own - total) <= 1e-12 * total
        assert padding == 0.0


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("chunk", [3, 1000])
def test_a_label_is_scored_as_by_torch_wherever_its_logit_lies(tp: int, chunk: int) -> None:
    """log p and whether it is the likeliest; 5 ids: of four ranks one holds padding alone. Also of equal logits."""
    sizes = {"model": {"vocab_size": 5, "init_std": 0.3}, "memory": {"loss_chunk_tokens": chunk}}
    hidden, _, _ = batch(5)
    hidden[0] = 0.0  # all ids are as likely: the first is meant
    at = torch.arange(0, TOKENS, 3)
    normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-5)

    def body(rank: Worker) -> tuple[torch.Tensor, torch.Tensor]:
        head = rank.stages[0].head
        assert head is not None
        with torch.no_grad():
            scores = [head.score(hidden, None, at, torch.full_like(at, label)) for label in range(5)]
        return torch.stack(scores), head.param.data[: head.valid]

    config = small_config(**sizes, parallel={"tp": tp, "sequence_parallel": False})
    found = on_threads(config, tp, body)
    logits = normed[at] @ torch.cat([weight for _, weight in found]).t()
    likeliest = F.one_hot(logits.argmax(1), 5)
    assert likeliest[0, 0] == 1 and (likeliest.sum(0) > 0).sum() >= 3
    for scores, _ in found:
        assert torch.allclose(scores[:, 0], logits.log_softmax(1).t(), rtol=0, atol=1e-12)
        assert torch.equal(scores[:, 1], likeliest.t().to(scores.dtype))


class _LargestTensor(TorchDispatchMode):
    """The most rows of [rows, columns] tensors that any operation makes, by number format."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns
        self.rows: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == self.columns:
            self.rows[out.dtype] = max(self.rows.get(out.dtype, 0), out.shape[0])
        return out


def test_logits_of_the_whole_micro_batch_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = solo_rank(small_config(precision={"dtype": "bf16"}, memory={"loss_chunk_tokens": 200}))
    head = rank.stages[0].head
    assert head is not None
    hidden, labels = torch.randn(1000, 32, dtype=torch.bfloat16).requires_grad_(), torch.zeros(1000, dtype=torch.int64)
    monkeypatch.setattr("megallama.kernels.pointwise.ELEMENTS_IN_FP32", 64 * 61)
    with _LargestTensor(61) as seen:
        head(hidden, None, MicroBatch(labels, labels))
    assert seen.rows[torch.bfloat16] == 200
    assert seen.rows[torch.float32] <= 64
