"""torch.compile of pointwise operations: beside eager and float64, the same bits always, refused without a compiler."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megallama.kernels import select
from megallama.kernels.candidate import COMPILED, Target
from tests.kernels.eager import EAGER
from tests.small import curve, deviation, small_config, solo_rank, tokens, train

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: torch.compile needs a C++ compiler")


TARGET = Target(CPU, torch.bfloat16, compiled=True)


def compiled(operation: str) -> Any:
    return dict(select.OPERATIONS[operation].candidates)[COMPILED](TARGET)


COMPILED_OPS: dict[str, Callable[[], Callable[..., Any]]] = {
    "add_norm": lambda: compiled("RMSNorm")[0],
    "add_norm_backward": lambda: compiled("RMSNorm")[1],
    "swiglu": lambda: compiled("SwiGLU")[0],
    "swiglu_backward": lambda: compiled("SwiGLU")[1],
    "apply_rope": lambda: compiled("RoPE")[0],
    "softmax_": lambda: compiled("cross entropy")[0],
}


def operands(name: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of an operation; what it writes comes last but for the scale of softmax_."""
    generator = torch.Generator().manual_seed(3)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, angles, packed = rand(96, 64), torch.randn(16, 1, 4, generator=generator), rand(6, 16, 12, 8)
    heads_first = torch.empty(6, 4, 16, 8, dtype=dtype).transpose(1, 2)
    index = torch.arange(96).remainder(64).unsqueeze(1)
    sums = torch.zeros(2, 96)
    return {
        "add_norm": (x, rand(96, 64), rand(64), 1e-5),
        "add_norm_backward": (rand(96, 64), x, rand(64), 1e-5, x / 4, torch.zeros(64), True, True),
        "swiglu": (x,),
        "swiglu_backward": (rand(96, 32), x, True),
        "apply_rope": (packed[:, :, :4], angles.cos(), angles.sin(), heads_first),
        "softmax_": (x, index, sums[0], sums[1], torch.rand(96, generator=generator)),
    }[name]


def outcome(fused: Callable[..., Any], args: tuple[Any, ...]) -> list[torch.Tensor]:
    """What an operation returns and what its arguments are afterwards."""
    args = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
    result = fused(*args)
    results = [] if result is None else list(result) if isinstance(result, tuple) else [result]
    written = [a for a in args if isinstance(a, torch.Tensor)] if result is None else []
    return [*results, *written]


def error(own: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((own.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_formulas_are_right_before_they_are_compiled(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(torch, "compile", lambda fn, dynamic: fn)
    target, found = Target(CPU, dtype, compiled=True), 0
    for operation in select.OPERATIONS.values():
        if make := dict(operation.candidates).get(COMPILED):
            operation.check(make(target), target)
            found += 1
    assert found == 4


@needs_compiler
@pytest.mark.parametrize("name", COMPILED_OPS)
def test_a_compiled_operation_is_eager_to_rounding(name: str) -> None:
    """bf16: eager rounds between its operations, the compiled one does not."""
    fused = COMPILED_OPS[name]()
    for dtype, limit in ((torch.bfloat16, 8e-3), (torch.float32, 2e-6)):
        args = operands(name, dtype)
        own, want = outcome(fused, args), outcome(getattr(EAGER, name), args)
        assert len(own) == len(want) >= 1
        for m, w in zip(own, want, strict=True):
            assert m.dtype == w.dtype and m.shape == w.shape
            assert error(m, w) <= limit
        again = outcome(fused, args)
        assert all(torch.equal(a, b) for a, b in zip(own, again, strict=True)), "the same bits on every call"


@needs_compiler
@pytest.mark.parametrize("shape", [(6, 16, 4, 8), (2, 16, 3, 8)], ids=str)
def test_a_rotation_in_place_is_the_rotation_into_another_tensor(shape: tuple[int, ...]) -> None:
    """And it changes nothing else: torch 2.13 wrote into another argument when the compiled function itself wrote."""
    fused = COMPILED_OPS["apply_rope"]()
    _, cos, sin, _ = operands("apply_rope", torch.bfloat16)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    out, eager = torch.empty_like(x), x.clone()
    EAGER.apply_rope(eager, cos, sin, eager)
    before = x.clone(), cos.clone(), sin.clone()
    with torch.no_grad():
        fused(x, cos, sin, out)
    assert all(map(torch.equal, (x, cos, sin), before))
    fused(x, cos, sin, x)
    assert torch.equal(x, out)
    assert error(x, eager) <= 8e-3


@needs_compiler
def test_every_shape_is_compiled_beyond_torchs_limit() -> None:
    """Past eight shapes torch would run a function as it is, and its bits would depend on the order of shapes."""
    seen = torch._dynamo.utils.counters["stats"]
    fused, before = COMPILED_OPS["swiglu"](), seen["unique_graphs"]
    for rows in range(1, 11):
        fused(torch.ones(rows, 6))
    assert seen["unique_graphs"] - before == 10


@needs_compiler
def test_softmax_of_a_real_width_in_place() -> None:
    fused, logits = COMPILED_OPS["softmax_"](), torch.randn(40, 4096, generator=torch.Generator().manual_seed(1)) * 4
    index, sums = torch.arange(40).mul(97).unsqueeze(1), torch.zeros(2, 40)
    args = logits.bfloat16(), index, sums[0], sums[1], torch.linspace(0.5, 2, 40)
    for own, want in zip(outcome(fused, args), outcome(EAGER.softmax_, args), strict=True):
        assert error(own, want) <= 1e-3


@needs_compiler
def test_a_model_trains_with_compiled_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(precision={"dtype": "fp32"})
    data = tokens(config, 4)
    want = curve(train(solo_rank(config), data))
    kernels = select.select_kernels(Target(CPU, torch.float32, compiled=True))
    used = {c.operation: c.selected for c in kernels.choices}
    compiled = {"RMSNorm", "RoPE", "SwiGLU", "cross entropy"}
    assert {operation for operation, kind in used.items() if kind == "torch.compile"} == compiled
    monkeypatch.setattr("tests.small.select_kernels", lambda target: kernels)
    own, again = (curve(train(solo_rank(config), data)) for _ in range(2))
    assert own == again
    assert 0 < deviation(own, want) < 1e-4


def test_where_nothing_compiles_eager_is_taken_and_the_reason_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(fn: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
        def call(*args: Any) -> None:
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n and more")

        return call

    monkeypatch.setattr(torch, "compile", refuses)
    kernels = select.select_kernels(Target(CPU, torch.float32, compiled=True))
    norm = kernels.choices[1]
    assert norm.selected == "torch" and norm.refused[0] == (
        "torch.compile", "InvalidCxxCompiler: No working C++ compiler found",
    )  # fmt: skip
    assert kernels.pointwise == EAGER
