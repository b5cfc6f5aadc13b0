"""The choice of kernels: reasons are kept, broken and wrong candidates are refused, nothing crashes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from megallama.config.errors import MegallamaError
from megallama.kernels import attention, gemm, select
from megallama.kernels.attention import ATTENTION, Attend, Documents, MakeAttention, blocked_attention, sdpa
from megallama.kernels.candidate import APEX, TE, Operation, Target, Unsupported
from megallama.kernels.gemm import FP8_PRODUCTS, PRODUCT, WGRAD, Gemms, fp8_gemms, matmul_nt, quantize
from megallama.kernels.optimizer import adamw_step
from megallama.kernels.pointwise import rms_norm, rms_norm_backward, with_additions
from megallama.kernels.processors import Processor
from tests.kernels.eager import EAGER
from tests.kernels.plain import plain_attention

CPU = torch.device("cpu")
BF16, FP32 = Target(CPU, torch.bfloat16), Target(CPU, torch.float32)
add_wgrad = partial(gemm.add_wgrad, matmul_nt)
ON_CUDA = Target(torch.device("cuda"), torch.bfloat16)
NO_CUDA = "not Transformer Engine: no CUDA device"


def test_a_cpu_takes_torch_and_says_why() -> None:
    lines = [str(c) for c in select.select_kernels(Target(CPU, torch.bfloat16)).choices]
    requested, own = "not torch.compile: run.compile=false", "not Triton: no CUDA device"
    assert lines == [
        f"attention: blocks of matrix products ({NO_CUDA})",
        f"RMSNorm: torch ({requested}; {NO_CUDA}; not apex: no CUDA device; {own}; not torch fused: no CUDA device)",
        f"RoPE: torch ({requested}; {own})",
        f"SwiGLU: torch ({requested}; {NO_CUDA}; {own})",
        f"cross entropy: torch ({requested}; {own})",
        "matrix product: torch mm (not oneDNN: fp32 on a CPU only)",
        f"weight gradient: that product, then add ({NO_CUDA}; not apex: no CUDA device; "
        "not torch addmm into fp32: CUDA with 16-bit weights only)",
        f"AdamW: torch fused ({NO_CUDA}; not apex: no CUDA device)",
        f"gradient norm: torch ({NO_CUDA}; not apex: no CUDA device)",
    ]


@pytest.mark.parametrize(("vendor", "used"), [("AuthenticAMD", "oneDNN"), ("GenuineIntel", "torch mm"), ("", "oneDNN")])
def test_fp32_products_follow_from_the_processor(monkeypatch: pytest.MonkeyPatch, vendor: str, used: str) -> None:
    monkeypatch.setattr(Processor, "here", lambda: Processor(vendor, frozenset()))
    kernels = select.select_kernels(Target(CPU, torch.float32))
    assert {c.operation: c.selected for c in kernels.choices}["matrix product"] == used
    a, b = torch.randn(5, 7), torch.randn(3, 7)
    assert torch.allclose(kernels.gemms.fprop(a, b), a @ b.t(), atol=1e-6)
    assert torch.allclose(kernels.gemms.dgrad(a, b.t()), a @ b.t(), atol=1e-6)
    grad = torch.zeros(3, 7)
    kernels.gemms.wgrad(grad, torch.ones(5, 3), a, False)
    assert torch.allclose(grad, a.sum(0).expand(3, 7), atol=1e-5)
    assert kernels.layer_gemms is kernels.gemms


def foreign(operation: str, package: str) -> Any:
    """The function that makes a candidate of a package."""
    return dict({**select.OPERATIONS, select.FP8: FP8_PRODUCTS}[operation].candidates)[package]


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    makes = [make for o in (*select.OPERATIONS.values(), FP8_PRODUCTS) for make in o.candidates]
    requested = [make for kind, make in makes if kind in (TE, APEX)]
    assert len(requested) == 11
    for make in requested:
        with pytest.raises(Unsupported, match="not installed"):
            make(ON_CUDA)
    with pytest.raises(Unsupported, match="16-bit formats only, not torch.float32"):
        foreign("attention", TE)(replace(ON_CUDA, dtype=torch.float32))


def test_the_other_apex_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "apex" else None)
    with pytest.raises(Unsupported, match="not NVIDIA's; build NVIDIA/apex from source"):
        foreign("AdamW", APEX)(ON_CUDA)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name.startswith("apex") else None)
    with pytest.raises(Unsupported, match="built without its CUDA extension amp_C"):
        foreign("AdamW", APEX)(ON_CUDA)


def broken(*args: object) -> None:
    raise RuntimeError("cudnn shared object not found.\nmore text")


def test_any_exception_of_a_package_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        select.OPERATIONS, "AdamW", replace(select.OPERATIONS["AdamW"], candidates=[("Transformer Engine", broken)])
    )
    choice = select.select_kernels(Target(CPU, torch.bfloat16)).choices[7]
    assert str(choice) == "AdamW: torch fused (not Transformer Engine: cudnn shared object not found.)"


def test_what_the_user_left_out_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for without in ("blocks of matrix products", "attention: blocks of matrix products"):
        choice = select.select_kernels(Target(CPU, torch.bfloat16), without=(without,)).choices[0]
        assert choice.selected == "torch scaled_dot_product_attention"
        assert choice.refused[1] == ("blocks of matrix products", "left out by run.without_kernels")
    kept = select.select_kernels(Target(CPU, torch.bfloat16), without=("RMSNorm: Transformer Engine",)).choices
    assert kept[0].selected == "blocks of matrix products"
    assert kept[1].refused[1] == ("Transformer Engine", "left out by run.without_kernels")
    message = "run.without_kernels=['RMSNorm: apexx'] names no candidate; write for example RMSNorm: apex"
    with pytest.raises(MegallamaError) as caught:
        select.select_kernels(Target(CPU, torch.bfloat16), without=("apex", "RMSNorm: apexx"))
    assert str(caught.value) == message
    with pytest.raises(MegallamaError, match="write for example .*Transformer Engine or .*apex or"):
        select.select_kernels(Target(CPU, torch.bfloat16), without=("TE",))


def test_fp8_is_refused_where_nothing_multiplies_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    message = (
        "precision.fp8: fp8 products: nothing here can (not Transformer Engine: no CUDA device; "
        "not Triton: no CUDA device; "
        r'not torch _scaled_mm: no CUDA device\); write precision.fp8="none"'
    ).replace("(not", r"\(not")
    with pytest.raises(MegallamaError, match=message):
        select.select_kernels(Target(CPU, torch.bfloat16), fp8="tensorwise")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(Unsupported, match=r"compute capability 8.0 is below 8.9 \(L40S, H100, H200, B200\)"):
        FP8_PRODUCTS.candidates[-1][1](ON_CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert isinstance(FP8_PRODUCTS.candidates[-1][1](ON_CUDA), Gemms)


def test_fp8_is_of_the_layers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    in_fp8 = fp8_gemms(quantize)
    products = replace(FP8_PRODUCTS, candidates=[("torch _scaled_mm", lambda target: in_fp8)])
    monkeypatch.setattr(select, "FP8_PRODUCTS", products)
    kernels = select.select_kernels(Target(CPU, torch.bfloat16), fp8="tensorwise")
    assert kernels.layer_gemms is in_fp8 and kernels.gemms is not in_fp8
    assert str(kernels.choices[-1]) == "fp8 products: torch _scaled_mm"


def not_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents | None = None) -> torch.Tensor:
    return sdpa(q.flip(1), k, v)


def as_maker(attend: Attend) -> MakeAttention:
    return lambda n, k, d: attend


def unscaled(logits: torch.Tensor, index: torch.Tensor, log_sum: torch.Tensor, picked: torch.Tensor, _: Any) -> None:
    EAGER.softmax_(logits, index, log_sum, picked, None)


def no_label(logits: torch.Tensor, index: torch.Tensor, at_label: torch.Tensor, *rest: Any) -> None:
    EAGER.softmax_gradient_(logits, index, 0 * at_label, *rest)


def only_own_sum(
    logits: torch.Tensor, index: torch.Tensor, at_label: torch.Tensor, scale: torch.Tensor, own: Any, total: Any
) -> None:
    EAGER.softmax_gradient_(logits, index, at_label, scale, own, total if own is None else own)


def stale_norm(
    x: torch.Tensor, branch: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return EAGER.add_norm(x, branch, weight, eps)[0], rms_norm(x, weight, eps)


def without_residual(*args: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return EAGER.add_norm_backward(*args[:4], None, *args[5:])


def again_of_gradient(*args: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    dx, normed = EAGER.add_norm_backward(*args)
    return dx, normed if normed is None else dx


WRONG: list[tuple[str, Any, str]] = [  # operation, an implementation with one mistake, what it is refused for
    ("attention", as_maker(not_causal), "output differs"),
    ("RMSNorm", with_additions(lambda x, w, eps: rms_norm(x, w, 1e-2), rms_norm_backward), "output differs"),
    ("RMSNorm", (lambda x, _, w, eps: (x, rms_norm(x, w, eps)), EAGER.add_norm_backward), "sum differs"),
    ("RMSNorm", (stale_norm, EAGER.add_norm_backward), "output of the sum differs"),
    ("RMSNorm", (EAGER.add_norm, lambda dy, *a: EAGER.add_norm_backward(dy * 1.1, *a)), "gradient of x differs"),
    ("RMSNorm", (EAGER.add_norm, without_residual), "gradient of x differs"),
    ("RMSNorm", (EAGER.add_norm, lambda *a: EAGER.add_norm_backward(*a[:6], False, a[7])), "gradient of the weight"),
    ("RMSNorm", (EAGER.add_norm, lambda *a: EAGER.add_norm_backward(*a[:6], True, a[7])), "gradient of the weight"),
    ("RMSNorm", (EAGER.add_norm, again_of_gradient), "output again differs"),
    ("RoPE", (lambda x, c, s, out: EAGER.apply_rope(x, c, -s, out), EAGER.rotate_parts), "rotated heads differs"),
    ("RoPE", (EAGER.apply_rope, lambda *a: EAGER.rotate_parts(*a[:4], True)), "heads apart differs"),
    ("RoPE", (EAGER.apply_rope, lambda *a: EAGER.rotate_parts(*a[:4], False)), "heads rotated back differs"),
    ("SwiGLU", (lambda x: EAGER.swiglu(x.flip(1)), EAGER.swiglu_backward), "output differs"),
    ("SwiGLU", (EAGER.swiglu, lambda dout, x, more: EAGER.swiglu_backward(dout, x.flip(1), more)), "gradient differs"),
    ("SwiGLU", (EAGER.swiglu, lambda *a: (EAGER.swiglu_backward(*a)[0], a[0])), "output differs"),
    ("cross entropy", (unscaled, EAGER.softmax_gradient_), "probabilities differs"),
    ("cross entropy", (EAGER.softmax_, no_label), "gradient at labels differs"),
    ("cross entropy", (EAGER.softmax_, only_own_sum), "probabilities differs"),
    ("matrix product", lambda a, b: (a.double() @ b.double().t() * 1.001).float(), "product differs"),
    ("weight gradient", lambda main, dy, x, overwrite: add_wgrad(main, dy, x, False), "overwritten differs"),
    ("weight gradient", lambda main, dy, x, overwrite: add_wgrad(main, dy, x, True), "accumulated differs"),
    ("AdamW", lambda *a: adamw_step(*a[:3], 0.0, a[4]), "weights differs"),
    ("gradient norm", lambda ts: sum((t.cumsum(0)[-1:] ** 2).sum() for t in ts) * 1.0, "sum of squares differs"),
]


@pytest.mark.parametrize(
    ("operation", "made", "reason"), WRONG, ids=[f"{i} {w[0]}: {w[2]}" for i, w in enumerate(WRONG)]
)
def test_wrong_results_are_refused(operation: str, made: Any, reason: str) -> None:
    with pytest.raises(Unsupported, match=f"{reason}.* from the plain formula by"):
        select.OPERATIONS[operation].check(made, FP32)


def test_not_a_number_is_refused() -> None:
    operation = Operation([], ("", lambda p: 1.0), lambda made, p: [("x", torch.tensor([1.0, made]))], (1.0,))
    with pytest.raises(Unsupported, match="x differs from the plain formula by nan"):
        operation.check(torch.nan, FP32)


def test_the_reference_is_the_last_one_on_the_same_numbers_in_float64() -> None:
    seen: dict[str, torch.Tensor] = {}

    def results(made: str, target: Target) -> list[tuple[str, torch.Tensor]]:
        seen[made] = target.random(5)
        return [("x", seen[made]), ("y", seen[made])]

    operation = Operation([], ("last", lambda target: "last"), results)
    operation.check("made", BF16)
    assert seen["made"].dtype == torch.bfloat16 and seen["last"].dtype == torch.float64
    assert torch.equal(seen["made"].double(), seen["last"])
    replace(operation, plain="plain").check("made", BF16)
    assert torch.equal(seen["plain"], seen["last"])


def test_every_result_has_its_tolerance() -> None:
    def off_by(x: float, y: float) -> Operation:
        both = {"last": (1.0, 1.0), "made": (1 + x, 1 + y)}
        return Operation(
            [],
            ("last", lambda target: "last"),
            lambda made, target: list(zip("xy", map(torch.tensor, both[made]), strict=True)),
            (0.5, 0.1),
        )

    off_by(0.4, 0.05).check("made", FP32)
    for x, y, wrong in ((0.6, 0.0, "x"), (0.4, 0.2, "y")):
        with pytest.raises(Unsupported, match=f"{wrong} differs"):
            off_by(x, y).check("made", FP32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", select.OPERATIONS)
def test_every_implementation_that_this_machine_has_is_right(name: str, dtype: torch.dtype) -> None:
    """Also the last ones, which are taken without a check."""
    operation, target = select.OPERATIONS[name], Target(CPU, dtype, documents=True)
    for kind, make in (*operation.candidates, operation.last):
        try:
            made = make(target)
        except Unsupported:
            continue
        if (name, dtype) != ("weight gradient", torch.bfloat16) and (name, dtype) != ("matrix product", torch.bfloat16):
            operation.check(made, target)
        elif kind == "torch mm":
            PRODUCT.check(made, target)
        else:  # a product rounded to bf16 before it is added
            replace(WGRAD, tolerances=(1e-2,)).check(made, target)


def across_documents(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents | None = None
) -> torch.Tensor:
    """Attention that silently leaves the mask out."""
    return blocked_attention(q, k, v)


def test_attention_that_forgets_documents_is_refused_only_where_they_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "blocked_attention", across_documents)
    (plain, *_), (apart, *_) = (
        select.select_kernels(Target(CPU, torch.bfloat16, documents=on)).choices for on in (False, True)
    )
    assert plain.selected == "blocks of matrix products"
    assert apart.selected == "torch scaled_dot_product_attention"
    assert apart.refused[1][1].startswith("output within documents differs from the plain formula by")
    last = ("torch scaled_dot_product_attention", lambda target: as_maker(across_documents))
    monkeypatch.setitem(select.OPERATIONS, "attention", replace(ATTENTION, last=last, plain=as_maker(plain_attention)))
    message = "no attention here keeps documents apart: torch's output within documents differs .* by .*; use data.docu"
    with pytest.raises(MegallamaError, match=message):
        select.select_kernels(Target(CPU, torch.bfloat16, documents=True))


def test_one_line_says_what_is_not_torchs_own() -> None:
    def messages(**used: str) -> str:
        choices = [select.Choice(name, used.get(name, one.last[0]), ()) for name, one in select.OPERATIONS.items()]
        return str(replace(kernels, choices=tuple(choices)))

    kernels = select.select_kernels(Target(CPU, torch.float64))
    assert messages() == "torch's own for everything"
    assert messages(AdamW="apex", RoPE="torch.compile", SwiGLU="torch.compile") == (
        "torch.compile for RoPE, SwiGLU; apex for AdamW; torch's own for the rest"
    )
    assert len(messages(**dict.fromkeys(("attention", "RMSNorm", "SwiGLU", "AdamW"), "Transformer Engine"))) < 110


def test_what_is_installed_and_does_not_work_is_told_from_what_is_not_there() -> None:
    def broken(candidate: Callable[[Target], Any]) -> bool:
        operation = Operation([("x", candidate)], ("torch mm", lambda p: matmul_nt), PRODUCT.results)
        return select._first("matrix product", operation, FP32, ())[1].broken

    def absent(target: Target) -> Any:
        raise Unsupported("not installed")

    def unloadable(target: Target) -> Any:
        raise ImportError("undefined symbol")

    assert not broken(absent) and not broken(lambda p: matmul_nt)
    assert broken(unloadable) and broken(lambda p: lambda a, b: 2 * matmul_nt(a, b))
