"""fp8 products: what is rounded and how, exact sums of the rounded operands, and a model that learns in them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megallama.kernels import select
from megallama.kernels.candidate import Target, Unsupported
from megallama.kernels.gemm import FORWARD, FP8_PRODUCTS, GRADIENT, Scaled, fp8_gemms, quantize
from megallama.plan.plan import make_plan
from megallama.train.assemble import assemble, initialize
from tests.small import CPU, curve, deviation, small_config, solo_rank, tokens, train

TORCH_FP8 = fp8_gemms(quantize)
BITS = {FORWARD: 3, GRADIENT: 2}  # of the mantissa


def rand(*shape: int, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values * size).to(torch.bfloat16)


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x rounded to the nearest fp8 number (ties to even) after scaling to the format's range, by arithmetic alone."""
    exact, largest = x.double(), torch.finfo(dtype).max
    scale = 2.0 ** torch.floor(torch.log2(largest / exact.abs().max()))
    scaled = exact * scale
    smallest = torch.log2(torch.tensor(torch.finfo(dtype).tiny, dtype=torch.float64))  # below it steps stay as they are
    exponent = torch.floor(torch.log2(scaled.abs())).clamp(min=smallest)
    step = 2.0 ** (exponent - BITS[dtype])
    return torch.round(scaled / step) * step / scale


@pytest.mark.parametrize("size", [1e-20, 3e-3, 1.0, 7e4, 1e20])
@pytest.mark.parametrize("dtype", [FORWARD, GRADIENT], ids=str)
def test_elements_are_rounded_once(dtype: torch.dtype, size: float) -> None:
    x = rand(40, 30, size=size)
    ((values, inverse),) = quantize(x, dtype)
    assert torch.equal(values.double() * inverse.double(), rounded(x, dtype))
    assert torch.frexp(inverse)[0].item() == 0.5, "a power of two"
    top = values.double().abs().max()
    assert torch.finfo(dtype).max / 2 < top <= torch.finfo(dtype).max


@pytest.mark.parametrize("dtype", [FORWARD, GRADIENT], ids=str)
def test_what_cannot_be_scaled(dtype: torch.dtype) -> None:
    ((values, inverse),) = quantize(torch.zeros(16, 16, dtype=torch.bfloat16), dtype)
    assert values.float().abs().max() == 0 and inverse.isfinite()
    for bad in (torch.inf, -torch.inf, torch.nan):
        x = rand(16, 16)
        x[3, 4] = bad
        assert quantize(x, dtype)[0][1].isnan()
        assert TORCH_FP8.fprop(x, rand(16, 16)).isnan().all(), "fp8 would have hidden it"


def test_products_are_those_of_the_rounded_operands() -> None:
    x, dy, weight = rand(64, 48, seed=1, size=30.0), rand(64, 32, seed=2, size=1e-6), rand(32, 48, seed=3, size=0.02)
    x8, w8, dy8 = rounded(x, FORWARD), rounded(weight, FORWARD), rounded(dy, GRADIENT)
    for own, want in (
        (TORCH_FP8.fprop(x, weight), x8 @ w8.t()),
        (TORCH_FP8.dgrad(dy, weight), dy8 @ w8),
    ):
        assert own.dtype == torch.bfloat16
        assert torch.allclose(own.double(), want, rtol=2**-8, atol=1e-6 * float(want.abs().max()))
    main_grad = torch.full((32, 48), 7.0)
    for overwrite, times in ((True, 1), (False, 2)):
        TORCH_FP8.wgrad(main_grad, dy, x, overwrite)
        want = times * (dy8.t() @ x8)
        assert torch.allclose(main_grad.double(), want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))


def test_the_check_tells_bf16_scales_from_missing_ones() -> None:
    FP8_PRODUCTS.check(TORCH_FP8, Target(CPU, torch.bfloat16))
    wrong = replace(TORCH_FP8, dgrad=lambda dy, weight: 1.1 * TORCH_FP8.dgrad(dy, weight))
    with pytest.raises(Unsupported, match="gradient of the input differs from the plain formula by"):
        FP8_PRODUCTS.check(wrong, Target(CPU, torch.bfloat16))


def test_a_model_learns_in_fp8_and_only_its_layers_multiply_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside bf16: nearly the same losses, but not the same; head and embedding keep bf16."""
    model = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_hidden_size": 48, "vocab_size": 61}
    config = small_config(model=model, precision={"dtype": "bf16", "fp8": "tensorwise"}, optimizer={"lr": 1e-2})
    products = replace(FP8_PRODUCTS, candidates=[("torch _scaled_mm", lambda target: TORCH_FP8)])
    monkeypatch.setattr(select, "FP8_PRODUCTS", products)
    plan = make_plan(config, 1)
    groups = solo_rank(config).groups
    rank = assemble(plan, groups, CPU, select.select_kernels(Target(CPU, torch.bfloat16), fp8="tensorwise"))
    initialize(rank, config.train.seed)
    params = rank.buffers[0].params
    eight = {name for name, param in params.items() if param._gemms is TORCH_FP8}
    assert eight == {name for name in params if name.startswith("layers.")}
    data = tokens(config, 12)
    want, own = curve(train(solo_rank(config), data)), curve(train(rank, data))
    assert 1e-4 < deviation(own[::2], want[::2]) < 3e-2
    assert own[-2] < own[0] - 0.5, "it learns"


def test_each_operand_is_rounded_as_seldom_as_can_be() -> None:
    """A weight after each change, a gradient once for both of its products, unless it has changed in between."""
    asked: list[tuple[tuple[int, ...], bool, bool]] = []

    def quantized(x: torch.Tensor, dtype: torch.dtype, rows: bool, columns: bool) -> list[Scaled]:
        asked.append((tuple(x.shape), rows, columns))
        return quantize(x, dtype, rows, columns)

    buffer = rand(2, 32, 48)  # as weights lie: a step writes into one buffer
    gemms, weight, grad = fp8_gemms(quantized), buffer[0], torch.zeros(32, 48)
    x, dy = rand(64, 48, seed=1), rand(64, 32, seed=2)
    for overwrite in (True, False):
        first = gemms.fprop(x, weight)
        assert torch.equal(first, TORCH_FP8.fprop(x, weight))
        gemms.dgrad(dy, weight)
        gemms.wgrad(grad, dy, x, overwrite)
    once = [((64, 48), True, False), ((64, 32), True, True), ((64, 48), False, True)]
    assert asked == [once[0], ((32, 48), True, True), *once[1:], *once]
    asked.clear()
    gemms.wgrad(grad, dy, x, True)  # put off: another gradient came in between
    assert asked == [((64, 32), False, True), once[2]]
    gemms.dgrad(dy, weight)
    dy.mul_(2)
    asked.clear()
    doubled = torch.zeros(32, 48)
    gemms.wgrad(doubled, dy, x, True)
    assert asked[0] == ((64, 32), False, True) and torch.equal(doubled, 2 * grad)
    buffer[1].zero_()  # another weight of the same buffer: it cannot be told
    asked.clear()
    assert torch.equal(gemms.fprop(x, weight), first) and len(asked) == 2
    buffer[0].mul_(2)
    assert torch.equal(gemms.fprop(x, weight), 2 * first)
