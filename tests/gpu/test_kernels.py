"""On a GPU: what was chosen, every candidate against float64, and a step against the CPU's."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch

from megallama.comm.group import Solo, build_groups
from megallama.kernels import select
from megallama.kernels.candidate import Target, Unsupported
from megallama.plan.plan import make_plan
from megallama.train.assemble import Worker, assemble, initialize, kernels_of
from tests.small import curve, deviation, small_config, solo_rank, tokens, train


def on_gpu(config: Any, device: torch.device) -> Worker:
    plan = make_plan(config, 1)
    groups = build_groups(plan.topology, 0, config.model.num_kv_heads, lambda name, parts: Solo(name))
    rank = assemble(plan, groups, device, kernels_of(config, device))
    initialize(rank, config.train.seed)
    return rank


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_choice_is_reported(cuda: torch.device, dtype: torch.dtype) -> None:
    choices = select.select_kernels(Target(cuda, dtype)).choices
    print(*choices, sep="\n")
    assert [c.operation for c in choices] == list(select.OPERATIONS)


CANDIDATES = [(name, kind, make) for name, o in select.OPERATIONS.items() for kind, make in (*o.candidates, o.last)] + [
    (select.FP8, kind, make) for kind, make in select.FP8_PRODUCTS.candidates
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "kind", "make"), CANDIDATES, ids=[f"{c[0]}: {c[1]}" for c in CANDIDATES])
def test_every_candidate_is_right_both_ways(
    cuda: torch.device, name: str, kind: str, make: Any, dtype: torch.dtype
) -> None:
    target = Target(cuda, dtype, documents=True, compiled=True, width=4096)
    if kind in ("torch.compile", "Triton") and shutil.which("gcc") is None:
        pytest.skip("no gcc, which Triton needs")
    operation = {**select.OPERATIONS, select.FP8: select.FP8_PRODUCTS}[name]
    try:
        made = make(target)
    except Unsupported as reason:
        pytest.skip(f"{name}: {kind}: {reason}")
    if kind == "that product, then add" and dtype == torch.bfloat16:
        replace(operation, tolerances=(1e-2,)).check(made, target)  # the product is rounded before it is added
    else:
        operation.check(made, target)


def test_both_fp8_products_round_alike(cuda: torch.device) -> None:
    """Transformer Engine's scales are forced to powers of two, so both implementations multiply the same numbers."""
    target = Target(cuda, torch.bfloat16)
    try:
        te, ours = (make(target) for _, make in select.FP8_PRODUCTS.candidates)
    except Unsupported as reason:
        pytest.skip(f"fp8: {reason}")
    generator = torch.Generator(cuda).manual_seed(0)
    shapes = (256, 512), (256, 768), (768, 512)
    x, dy, weight = (torch.randn(shape, device=cuda, generator=generator).bfloat16() for shape in shapes)
    grads = [torch.zeros(768, 512, device=cuda) for _ in range(2)]
    for grad, gemms in zip(grads, (te, ours), strict=True):
        gemms.wgrad(grad, dy, x, True)
    forward = [gemms.fprop(x, weight) for gemms in (te, ours)]
    back = [gemms.dgrad(dy, weight) for gemms in (te, ours)]
    for own, theirs in (forward, back, grads):
        assert float((own.double() - theirs.double()).norm() / theirs.double().norm()) <= 4e-3


def test_a_model_trains_in_fp8_beside_bf16(cuda: torch.device) -> None:
    if torch.cuda.get_device_capability(cuda) < (8, 9):
        pytest.skip("no fp8 below compute capability 8.9")
    settings: dict[str, Any] = {"model": {"hidden_size": 64}, "optimizer": {"lr": 1e-2}}
    curves = []
    for fp8 in ("none", "tensorwise"):
        config = small_config(**settings, precision={"dtype": "bf16", "fp8": fp8})
        curves.append(curve(train(on_gpu(config, cuda), tokens(config, 12).to(cuda))))
    assert 0 < deviation(curves[1][::2], curves[0][::2]) < 3e-2


@pytest.mark.parametrize("model", [{}, {"num_kv_heads": 2, "tie_embeddings": True, "vocab_size": 59}], ids=str)
@pytest.mark.parametrize(("dtype", "limit"), [("fp64", 1e-10), ("fp32", 1e-3), ("bf16", 3e-2)])
def test_a_gpu_trains_as_a_cpu(cuda: torch.device, model: dict[str, Any], dtype: str, limit: float) -> None:
    settings = {"model": {"hidden_size": 64, **model}, "precision": {"dtype": dtype}}
    config = small_config(**settings)
    data = tokens(config, 5)
    want = curve(train(solo_rank(config), data))
    own = curve(train(on_gpu(config, cuda), data.to(cuda)))
    assert deviation(own, want) <= limit


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_memory_is_flat_over_steps(cuda: torch.device, recompute: str) -> None:
    config = small_config(precision={"dtype": "bf16"}, memory={"recompute": recompute})
    rank = on_gpu(config, cuda)
    data = tokens(config, 3).to(cuda)
    train(rank, data)
    before = torch.cuda.memory_allocated(cuda)
    for _ in range(5):
        train(rank, data)
    assert torch.cuda.memory_allocated(cuda) == before
