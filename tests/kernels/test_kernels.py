"""Every kernel against a float64 formula, forward and backward."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megallama.config.schema import OptimizerConfig, RopeScaling
from megallama.kernels.attention import ATTENTION, BLOCK, Attend, Documents, blocked_attention, sdpa
from megallama.kernels.candidate import Target, Wrong
from megallama.kernels.gemm import MatmulNT, add_wgrad, matmul_nt, onednn_matmul_nt
from megallama.kernels.optimizer import adamw_step, sum_of_squares
from megallama.kernels.pointwise import (
    apply_rope,
    inverse_frequencies,
    rms_norm,
    rms_norm_backward,
    rope_tables,
    swiglu,
    swiglu_backward,
)
from tests.kernels.made import Made
from tests.kernels.plain import plain_attention

EPS = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = list(EPS)


def rand(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(own: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> None:
    error = float((own.double() - theirs.double()).norm() / theirs.double().norm())
    assert error <= EPS[dtype], error


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype) -> None:
    x, dy = rand(37, 64, dtype=dtype), rand(37, 64, dtype=dtype, seed=1)
    weight = (1 + 0.3 * rand(64, seed=2)).to(dtype)
    y = rms_norm(x, weight, 1e-5)
    assert y.dtype == dtype
    leaves = x.double().clone().requires_grad_(), weight.double().clone().requires_grad_()
    want = leaves[0] * torch.rsqrt(leaves[0].square().mean(-1, keepdim=True) + 1e-5) * leaves[1]
    want.backward(dy.double())
    dx, dweight = rms_norm_backward(dy, x, weight, 1e-5)
    assert dx.dtype == dtype
    assert dweight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(y, want.detach(), dtype)
    close(dx, leaves[0].grad, dtype)
    close(dweight, leaves[1].grad, dtype)
    assert torch.equal(rms_norm(x, weight, 1e-5), y), "the recomputed norm must be the same bits"


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    packed, dout = rand(29, 48, dtype=dtype), rand(29, 24, dtype=dtype, seed=1)
    leaf = packed.double().clone().requires_grad_()
    want = F.silu(leaf[:, :24]) * leaf[:, 24:]
    want.backward(dout.double())
    close(swiglu(packed), want.detach(), dtype)
    close(swiglu_backward(dout.clone(), packed), leaf.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("seq", [1, 19, 256, 300])
@pytest.mark.parametrize("attend", [sdpa, blocked_attention])
def test_attention(attend: Attend, seq: int, kv_heads: int, dtype: torch.dtype) -> None:
    parts = [rand(2, seq, n, 8, dtype=dtype, seed=i) for i, n in enumerate((4, kv_heads, kv_heads))]
    dout = rand(2, seq, 4, 8, dtype=dtype, seed=9)
    leaves, exact = [p.clone().requires_grad_() for p in parts], [p.double().requires_grad_() for p in parts]
    out, want = attend(*leaves), plain_attention(*exact)
    out.backward(dout)
    want.backward(dout.double())
    close(out.detach(), want.detach(), dtype)
    for own, theirs in zip(leaves, exact, strict=True):
        if seq > 1 or own is leaves[2]:  # a single key gives its query and itself no gradient
            close(own.grad, theirs.grad, dtype)


STARTS = {  # where the document of each token begins, by sample
    "many": [[0] * 70 + [70] * 1 + [71] * 190 + [261] * 39, [0] + [1] * 128 + [129] * 171],
    "one": [[0] * 300, [0] * 300],
    "single tokens": [[*range(300)], [0] * 299 + [299]],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("where", STARTS)
@pytest.mark.parametrize("attend", [sdpa, blocked_attention, plain_attention])
def test_attention_within_documents(attend: Attend, where: str, kv_heads: int, dtype: torch.dtype) -> None:
    """Against the plain formula on each document alone."""
    starts = torch.tensor(STARTS[where])
    parts = [rand(2, 300, n, 8, dtype=dtype, seed=i) for i, n in enumerate((4, kv_heads, kv_heads))]
    dout = rand(2, 300, 4, 8, dtype=dtype, seed=9)
    leaves, exact = [p.clone().requires_grad_() for p in parts], [p.double().requires_grad_() for p in parts]
    out = attend(*leaves, Documents.of(starts))
    rows = []
    for sample, row in enumerate(starts):
        ends = [*row.unique().tolist(), 300]
        pieces = [[w[sample : sample + 1, a:b] for w in exact] for a, b in zip(ends, ends[1:], strict=False)]
        rows.append(torch.cat([plain_attention(*piece) for piece in pieces], 1))
    want = torch.cat(rows)
    out.backward(dout)
    want.backward(dout.double())
    close(out.detach(), want.detach(), dtype)
    for own, theirs in zip(leaves, exact, strict=True):
        if where != "single tokens" or own is leaves[2]:
            close(own.grad, theirs.grad, dtype)


def test_documents_are_known_by_their_starts() -> None:
    documents = Documents.of(torch.tensor([[0, 0, 2, 2, 2], [0, 1, 1, 1, 4]]))
    assert documents.positions.tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 2, 0]]
    assert documents.cu_seqlens.tolist() == [0, 2, 5, 6, 9, 10] and documents.cu_seqlens.dtype == torch.int32
    assert documents.pieces == (((5, True),), ((5, True),))
    mask, _ = documents.masks(torch.float32)
    assert mask is not None and mask.isfinite().int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1],
    ]  # fmt: skip


def test_short_documents_are_taken_together() -> None:
    """Longer ones alone; none with those of another sample."""
    many = Documents.of(torch.tensor(STARTS["many"]))
    alone = [70, 1, 190, 39], [1, 128, 171]
    assert many.pieces == tuple(tuple((n, False) for n in sample) for sample in alone)
    single = Documents.of(torch.tensor(STARTS["single tokens"]))
    assert single.pieces == ((*[(64, True)] * 4, (44, True)), ((299, False), (1, False)))
    assert [None if m is None else len(m) for m in single.masks(torch.float64)] == [64, 64, 64, 64, 44, None, None]


@pytest.mark.parametrize("name", ["masks", "pieces"])
def test_documents_taken_together_without_their_mask_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check that precedes every run has documents of both kinds: some alone, some together."""
    target = Target(torch.device("cpu"), torch.float32, documents=True)
    found = ATTENTION.last[1](target)
    ATTENTION.check(found, target)
    masks, of = Documents.masks, Documents.of
    if name == "masks":
        monkeypatch.setattr(Documents, name, lambda self, dtype: [None for _ in masks(self, dtype)])
    else:  # halves of samples, whatever begins in them
        halves = ((64, False),) * 2
        monkeypatch.setattr(Documents, "of", lambda starts, rows: replace(of(starts), pieces=(halves,) * len(starts)))
    with pytest.raises(Wrong, match="output within documents differs"):
        ATTENTION.check(found, target)


@pytest.mark.parametrize("kv", [4, 2], ids="kv {}".format)
@pytest.mark.parametrize(("seq", "rows"), [(24, 8), (300, 140), (24, 3)])
@pytest.mark.parametrize("attend", [sdpa, blocked_attention])
def test_queries_that_are_the_last_rows(attend: Attend, seq: int, rows: int, kv: int) -> None:
    """As with all of them, of which the last rows are taken; keys of documents that end before are not seen."""
    q, k, v = (rand(2, seq, n, 8, dtype=torch.float64, seed=n + i).requires_grad_() for i, n in enumerate((4, kv, kv)))
    begins = torch.rand(2, seq, generator=torch.Generator().manual_seed(1)) < 0.1
    starts = torch.where(begins, torch.arange(seq), 0).cummax(1).values
    dout = rand(2, rows, 4, 8, dtype=torch.float64, seed=9)
    for some, whole in ((None, None), (Documents.of(starts, rows), Documents.of(starts))):
        want, found = attend(q, k, v, whole)[:, -rows:], attend(q[:, -rows:], k, v, some)
        pairs = zip(
            (found, *torch.autograd.grad(found, (q, k, v), dout)),
            (want, *torch.autograd.grad(want, (q, k, v), dout)),
            strict=True,
        )
        assert all(torch.allclose(own, theirs, rtol=0, atol=1e-12) for own, theirs in pairs)
    assert some is not None and int(some.cu_seqlens[-1]) == 2 * rows
    assert torch.equal(some.packed(k), torch.cat([k[i, starts[i, -rows] :] for i in range(2)]))


@pytest.mark.parametrize("attend", [sdpa, blocked_attention])
def test_samples_of_one_document_are_those_without_documents_to_the_bit(attend: Attend) -> None:
    q, k, v = (rand(2, 300, n, 8, dtype=torch.float32, seed=n) for n in (4, 2, 2))
    assert torch.equal(attend(q, k, v, Documents.of(torch.tensor(STARTS["one"]))), attend(q, k, v))


def made(attend: Attend, dtype: torch.dtype, seq: int, length: int) -> Made:
    """By attention and its gradient, in samples of documents of `length` tokens; 0: without."""
    q, k, v = (rand(1, n, seq, 8, dtype=dtype, seed=n).transpose(1, 2).requires_grad_() for n in (2, 1, 1))
    at = torch.arange(seq)[None]
    documents = Documents.of(at // length * length) if length else None
    with Made() as found:
        attend(q, k, v, documents).sum().backward()
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [4096, 700, 3, 0])
@pytest.mark.parametrize("attend", [sdpa, blocked_attention])
def test_attention_takes_memory_linear_in_the_sequence(attend: Attend, length: int, dtype: torch.dtype) -> None:
    """Of twice the tokens at most twice: no scores and no mask of all queries by all keys, in no format."""
    found, half = (made(attend, dtype, seq, min(length, seq)) for seq in (4096, 2048))
    assert found.largest <= 2 * BLOCK * 4096 < 4096 * 4096 and found.peak <= 2.05 * half.peak
    assert found.peak >= 4096 * 2 * 8 * dtype.itemsize, "at least the output"


def test_plain_attention_is_causal() -> None:
    q, k, v = (rand(1, 6, 1, 4, seed=i) for i in range(3))
    base = plain_attention(q, k, v)
    k[:, 4], v[:, 4] = 100, 100
    assert torch.equal(plain_attention(q, k, v)[:, :4], base[:, :4])
    assert torch.allclose(base[:, 0], plain_attention(q, k, v)[:, 0])


def test_rope_rotates_pairs_and_back() -> None:
    cos, sin = rope_tables(11, 8, 10000.0, None, torch.float64, torch.device("cpu"))
    x = rand(2, 11, 3, 8)
    rotated = x.clone()
    apply_rope(rotated, cos, sin, out=rotated)
    as_complex = torch.complex(x[..., :4], x[..., 4:])
    angles = torch.arange(11).double()[:, None] * 10000.0 ** (-torch.arange(4).double() / 4)
    want = as_complex * torch.polar(torch.ones_like(angles), angles)[None, :, None]
    close(rotated, torch.cat((want.real, want.imag), -1), torch.float64)
    apply_rope(rotated, cos, -sin, out=rotated)
    close(rotated, x, torch.float64)


def test_rope_scaling_keeps_short_and_stretches_long_wavelengths() -> None:
    scaling = RopeScaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position=8192)
    plain = inverse_frequencies(128, 500000.0, None, torch.float64)
    scaled = inverse_frequencies(128, 500000.0, scaling, torch.float64)
    wavelength = 2 * math.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    assert torch.equal(scaled[short], plain[short]) and short.sum() > 10
    assert torch.allclose(scaled[long], plain[long] / 8, rtol=1e-15) and long.sum() > 10
    middle = ~short & ~long
    assert middle.any() and (scaled[middle] < plain[middle]).all() and (scaled[middle] > plain[middle] / 8).all()


@pytest.mark.parametrize("product", [matmul_nt, onednn_matmul_nt])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_gradients_accumulate(dtype: torch.dtype, product: MatmulNT) -> None:
    if product is onednn_matmul_nt and dtype != torch.float32:
        pytest.skip("oneDNN is called for fp32 only")
    dy, x = rand(33, 16, dtype=dtype), rand(33, 24, dtype=dtype, seed=1)
    main = torch.full((16, 24), 5.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    add_wgrad(product, main, dy, x, True)
    close(main, dy.double().t() @ x.double(), dtype)
    add_wgrad(product, main, dy, x, False)
    close(main, 2 * dy.double().t() @ x.double(), dtype)


def test_weight_gradients_of_a_large_matrix_are_made_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megallama.kernels.gemm.MAX_PRODUCT", 5 * 24)
    sizes = []

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        sizes.append(len(a))
        return matmul_nt(a, b)

    dy, x = rand(33, 16, dtype=torch.bfloat16), rand(33, 24, dtype=torch.bfloat16, seed=1)
    main = torch.full((16, 24), 5.0)
    for times, overwrite in ((1, True), (2, False)):
        add_wgrad(product, main, dy, x, overwrite)
        close(main, times * dy.double().t() @ x.double(), torch.bfloat16)
    assert sizes == [5, 5, 5, 1] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_follows_the_paper(dtype: torch.dtype) -> None:
    config = OptimizerConfig()
    master, grad = rand(1000, dtype=dtype), rand(1000, dtype=dtype, seed=1)
    m, v, step = torch.zeros_like(master), torch.zeros_like(master), torch.zeros(())
    want, wm, wv = master.double().clone(), torch.zeros(1000).double(), torch.zeros(1000).double()
    for t in range(1, 4):
        divisor = torch.tensor(4.0, dtype=dtype)
        adamw_step([[t] for t in (master, grad.clone(), m, v, step)], config, 1e-2, 0.1, divisor)
        g = grad.double() / 4
        wm, wv = 0.9 * wm + 0.1 * g, 0.95 * wv + 0.05 * g * g
        want = want * (1 - 1e-2 * 0.1) - 1e-2 * (wm / (1 - 0.9**t)) / ((wv / (1 - 0.95**t)).sqrt() + 1e-8)
    close(master, want, dtype)
    close(m, wm, dtype)
    close(v, wv, dtype)
    assert step.item() == 3


def test_sum_of_squares_keeps_its_digits() -> None:
    tensors = [torch.full((3_000_001,), 0.1), torch.full((17,), 3.0)]
    want = 3_000_001 * float(torch.tensor(0.1)) ** 2 + 17 * 9
    assert (
        abs(sum_of_squares(tensors).item() - want) <= 1e-5 * want
    )  # a plain fp32 sum of three million equal terms is off by 1e-3
    assert sum_of_squares([]).item() == 0


def test_a_kernel_that_aligns_fewer_queries_at_the_front_is_not_taken() -> None:
    target = Target(torch.device("cpu"), torch.float32, documents=True, fewer=True)
    ATTENTION.check(ATTENTION.last[1](target), target)

    def front(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, within: Documents | None = None) -> torch.Tensor:
        return sdpa(q, k[:, : q.shape[1]], v[:, : q.shape[1]]) if within is None else sdpa(q, k, v, within)

    with pytest.raises(Wrong, match="output of the last rows differs"):
        ATTENTION.check(lambda *heads: front, target)
