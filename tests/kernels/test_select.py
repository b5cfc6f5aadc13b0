"""The choice of kernels: reasons are kept, broken and wrong candidates are refused, nothing crashes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megallama.config.errors import MegallamaError
from megallama.kernels import attention, gemm, select
from megallama.kernels.attention import ATTENTION, Attend, Documents, MakeAttention, blocked_attention, sdpa
from megallama.kernels.candidate import APEX, TE, Operation, Target, Unsupported
from megallama.kernels.gemm import FP8_PRODUCTS, PRODUCT, TORCH_FP8, WGRAD, add_wgrad_with, matmul_nt
from megallama.kernels.optimizer import adamw_step
from tests.kernels.eager import EAGER
from tests.kernels.plain import plain_attention

CPU = torch.device("cpu")
BF16, FP32 = Target(CPU, torch.bfloat16), Target(CPU, torch.float32)
add_wgrad = add_wgrad_with(matmul_nt)
ON_CUDA = Target(torch.device("cuda"), torch.bfloat16)
NO_CUDA = "not Transformer Engine: no CUDA device"


def test_a_cpu_takes_torch_and_says_why() -> None:
    lines = [str(c) for c in select.select_kernels(CPU, torch.bfloat16).choices]
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
    monkeypatch.setattr(gemm, "processor", lambda: vendor)
    kernels = select.select_kernels(CPU, torch.float32)
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
    choice = select.select_kernels(CPU, torch.bfloat16).choices[7]
    assert str(choice) == "AdamW: torch fused (not Transformer Engine: cudnn shared object not found.)"


def test_what_the_user_left_out_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for without in ("blocks of matrix products", "attention: blocks of matrix products"):
        choice = select.select_kernels(CPU, torch.bfloat16, without=(without,)).choices[0]
        assert choice.selected == "torch scaled_dot_product_attention"
        assert choice.refused[1] == ("blocks of matrix products", "left out by run.without_kernels")
    kept = select.select_kernels(CPU, torch.bfloat16, without=("RMSNorm: Transformer Engine",)).choices
    assert kept[0].selected == "blocks of matrix products"
    assert kept[1].refused[1] == ("Transformer Engine", "left out by run.without_kernels")
    message = "run.without_kernels=['RMSNorm: apexx'] names no candidate; write for example RMSNorm: apex"
    with pytest.raises(MegallamaError) as caught:
        select.select_kernels(CPU, torch.bfloat16, without=("apex", "RMSNorm: apexx"))
    assert str(caught.value) == message
    with pytest.raises(MegallamaError, match="write for example .*Transformer Engine or .*apex or"):
        select.select_kernels(CPU, torch.bfloat16, without=("TE",))


def test_fp8_is_refused_where_nothing_multiplies_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    message = (
        "precision.fp8: fp8 products: nothing here can (not Transformer Engine: no CUDA device; "
        r'not torch _scaled_mm: no CUDA device\); write precision.fp8="none"'
    ).replace("(not", r"\(not")
    with pytest.raises(MegallamaError, match=message):
        select.select_kernels(CPU, torch.bfloat16, fp8="tensorwise")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(Unsupported, match=r"compute capability 8.0 is below 8.9 \(L40S, H100, H200, B200\)"):
        FP8_PRODUCTS.candidates[1][1](ON_CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert FP8_PRODUCTS.candidates[1][1](ON_CUDA) is TORCH_FP8


def test_fp8_is_of_the_layers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    products = replace(FP8_PRODUCTS, candidates=[("torch _scaled_mm", lambda target: TORCH_FP8)])
    monkeypatch.setattr(select, "FP8_PRODUCTS", products)
    kernels = select.select_kernels(CPU, torch.bfloat16, fp8="tensorwise")
    assert kernels.layer_gemms is TORCH_FP8 and kernels.gemms is not TORCH_FP8
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


WRONG: list[tuple[str, Any, str]] = [  # operation, an implementation with one mistake, what it is refused for
    ("attention", as_maker(not_causal), "output differs"),
    ("RMSNorm", (lambda x, w, eps: EAGER.rms_norm(x, w, 1e-2), EAGER.rms_norm_backward), "output differs"),
    ("RMSNorm", (EAGER.rms_norm, lambda dy, *a: EAGER.rms_norm_backward(dy * 1.1, *a)), "gradient of x differs"),
    (
        "RMSNorm",
        (EAGER.rms_norm, lambda *a: (EAGER.rms_norm_backward(*a)[0], a[0].sum(0))),
        "gradient of the weight differs",
    ),
    ("RoPE", (lambda x, c, s, out: EAGER.apply_rope(x, c, -s, out), EAGER.rope_backward), "rotated heads differs"),
    ("RoPE", (EAGER.apply_rope, lambda *a: EAGER.rope_backward(*a[:4], -a[4], a[5])), "heads rotated back differs"),
    ("SwiGLU", (lambda x: EAGER.swiglu(x.flip(1)), EAGER.swiglu_backward), "output differs"),
    ("SwiGLU", (EAGER.swiglu, lambda dout, x: EAGER.swiglu_backward(dout, x.flip(1))), "gradient differs"),
    ("cross entropy", (unscaled, EAGER.softmax_gradient_), "probabilities differs"),
    ("cross entropy", (EAGER.softmax_, no_label), "gradient at labels differs"),
    ("cross entropy", (EAGER.softmax_, only_own_sum), "probabilities differs"),
    ("matrix product", lambda a, b: (a.double() @ b.double().t() * 1.001).float(), "product differs"),
    ("weight gradient", lambda main, dy, x, overwrite: add_wgrad(main, dy, x, False), "overwritten differs"),
    ("weight gradient", lambda main, dy, x, overwrite: add_wgrad(main, dy, x, True), "accumulated differs"),
    ("AdamW", lambda *a: adamw_step(*a[:3], 0.0, a[4]), "weights differs"),
    ("gradient norm", lambda ts: sum((t.cumsum(0)[-1:] ** 2).sum() for t in ts) * 1.0, "sum of squares differs"),
]


@pytest.mark.parametrize(("operation", "made", "reason"), WRONG, ids=[f"{w[0]}: {w[2]}" for w in WRONG])
def test_wrong_results_are_refused(operation: str, made: Any, reason: str) -> None:
    with pytest.raises(Unsupported, match=f"{reason} from the plain formula by"):
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
        select.select_kernels(CPU, torch.bfloat16, documents=on).choices for on in (False, True)
    )
    assert plain.selected == "blocks of matrix products"
    assert apart.selected == "torch scaled_dot_product_attention"
    assert apart.refused[1][1].startswith("output within documents differs from the plain formula by")
    last = ("torch scaled_dot_product_attention", lambda target: as_maker(across_documents))
    monkeypatch.setitem(select.OPERATIONS, "attention", replace(ATTENTION, last=last, plain=as_maker(plain_attention)))
    message = "no attention here keeps documents apart: torch's output within documents differs .* by .*; use data.docu"
    with pytest.raises(MegallamaError, match=message):
        select.select_kernels(CPU, torch.bfloat16, documents=True)


class DotProductAttention:
    """Takes what Transformer Engine's class of this name takes, and means by it what its documentation says."""

    def __init__(
        self, num_attention_heads: int, kv_channels: int, *, num_gqa_groups: int, qkv_format: str, attn_mask_type: str
    ) -> None:
        assert (num_attention_heads, kv_channels, num_gqa_groups) == (4, 64, 2)
        assert (qkv_format, attn_mask_type) == ("bshd", "causal")

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **packed: Any) -> torch.Tensor:
        if not packed:
            return plain_attention(q, k, v).flatten(2)
        ends, longest = packed["cu_seqlens_q"], packed["max_seqlen_q"]
        assert ends is packed["cu_seqlens_kv"] and longest == packed["max_seqlen_kv"]
        assert (packed["qkv_format"], packed["attn_mask_type"]) == ("thd", "padding_causal")
        assert q.dim() == 3 and ends.dtype == torch.int32 and ends[0] == 0 and ends[-1] == len(q)
        assert int(ends.diff().max()) <= longest
        pieces = zip(ends, ends[1:], strict=False)
        return torch.cat([plain_attention(*(x[None, a:b] for x in (q, k, v)))[0] for a, b in pieces]).flatten(1)


def installed(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> None:
    """Stand-ins for modules, as if their packages were there."""
    for name, members in modules.items():
        fake = ModuleType(name)
        vars(fake).update(members)
        monkeypatch.setitem(sys.modules, name.replace("__", "."), fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())


def test_transformer_engines_attention_is_called_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(DotProductAttention=DotProductAttention)
    monkeypatch.setattr(Target, "te_module", lambda self, name: module)
    make = foreign("attention", TE)(ON_CUDA)
    select.OPERATIONS["attention"].check(make, replace(BF16, documents=True))


def test_the_multi_tensor_kernels_are_called_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the documented signatures of amp_C must reproduce torch's AdamW and norm."""

    def multi_tensor_adam(chunk, noop, lists, lr, beta1, beta2, eps, step, mode, bias_correction, decay):  # type: ignore[no-untyped-def]
        assert (mode, bias_correction, noop.dtype) == (1, 1, torch.int32)
        for g, p, m, v in zip(*lists, strict=True):
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps) + decay * p
            p.sub_(lr * update)

    def multi_tensor_l2norm(chunk, noop, lists, per_tensor):  # type: ignore[no-untyped-def]
        assert per_tensor is False and noop.dtype == torch.int32
        (tensors,) = lists
        assert all(t.numel() for t in tensors)
        return torch.cat([t.double() for t in tensors]).norm().float().view(1), None

    members = {"multi_tensor_adam": multi_tensor_adam, "multi_tensor_l2norm": multi_tensor_l2norm}
    installed(monkeypatch, amp_C=members, transformer_engine_torch=members, transformer_engine__pytorch={})
    for package in (APEX, TE):
        select.OPERATIONS["AdamW"].check(foreign("AdamW", package)(ON_CUDA), FP32)
        norm = foreign("gradient norm", package)(ON_CUDA)
        select.OPERATIONS["gradient norm"].check(norm, FP32)
        assert norm([]).item() == 0


def test_fused_norms_are_called_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the signatures of transformer_engine_torch, fused_layer_norm_cuda and aten."""

    def forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        return EAGER.rms_norm(x, weight, eps), torch.rsqrt(x.float().square().mean(-1) + eps)

    def backward(dy: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        assert rstd.dtype == torch.float32 and torch.allclose(rstd.view(-1), forward(x, weight, 1e-5)[1])
        dx, dweight = EAGER.rms_norm_backward(dy, x, weight, 1e-5)
        return [dx, dweight.to(weight.dtype)]

    def rmsnorm_fwd(x, weight, eps, out, quantizer, kind, margin, zero_centered):  # type: ignore[no-untyped-def]
        assert (out, quantizer, kind, margin, zero_centered) == (None, None, "bf16", 0, False)
        y, rstd = forward(x, weight, eps)
        return [y, None, rstd]

    def rmsnorm_bwd(dy, x, rstd, weight, margin, zero_centered):  # type: ignore[no-untyped-def]
        assert (rstd.dim(), margin, zero_centered) == (1, 0, False)
        return backward(dy, x, rstd, weight)

    def rms_backward_affine(dy, rstd, x, shape, weight, eps, memory_efficient):  # type: ignore[no-untyped-def]
        assert (tuple(shape), memory_efficient) == ((x.shape[1],), False)
        return backward(dy, x, rstd, weight)

    def rms_forward_affine(x, shape, weight, eps):  # type: ignore[no-untyped-def]
        assert tuple(shape) == (x.shape[1],)
        return forward(x, weight, eps)

    installed(
        monkeypatch,
        fused_layer_norm_cuda={"rms_forward_affine": rms_forward_affine, "rms_backward_affine": rms_backward_affine},
        transformer_engine_torch={"rmsnorm_fwd": rmsnorm_fwd, "rmsnorm_bwd": rmsnorm_bwd},
        transformer_engine__pytorch={},
        transformer_engine__pytorch__constants={"TE_DType": {torch.bfloat16: "bf16"}},
    )
    for package in (APEX, TE):
        pair = foreign("RMSNorm", package)(ON_CUDA)
        select.OPERATIONS["RMSNorm"].check(pair, BF16)
        assert pair[1](*(torch.ones(4, 8, dtype=torch.bfloat16),) * 2, torch.ones(8), 1e-5)[1].dtype == torch.float32


def test_transformer_engines_swiglu_is_called_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    def swiglu(x: torch.Tensor, quantizer: None) -> torch.Tensor:
        assert quantizer is None
        return EAGER.swiglu(x)

    def dswiglu(grad: torch.Tensor, x: torch.Tensor, quantizer: None) -> torch.Tensor:
        assert quantizer is None
        return EAGER.swiglu_backward(grad.clone(), x)

    members = {"swiglu": swiglu, "dswiglu": dswiglu}
    installed(monkeypatch, transformer_engine_torch=members, transformer_engine__pytorch={})
    select.OPERATIONS["SwiGLU"].check(foreign("SwiGLU", TE)(ON_CUDA), BF16)


def test_transformer_engines_fp8_is_called_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in whose quantised tensors can be read only in the way that Hopper's GEMM can read them."""

    class Quantizer:
        def __init__(self, kind, device, *, rowwise, columnwise, force_pow_2_scales):  # type: ignore[no-untyped-def]
            assert rowwise and force_pow_2_scales
            self.kind, self.columns = kind, columnwise

        def __call__(self, x: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(kind=self.kind, columns=self.columns, x=x.to(self.kind).float())

    def general_gemm(A, B, *, out_dtype, layout, grad=False, out=None, accumulate=False, use_split_accumulator=False):  # type: ignore[no-untyped-def]
        forward = layout == "TN"
        assert grad is use_split_accumulator is not forward
        assert A.columns is (layout[0] == "N") and B.columns is (layout[1] == "T")
        assert (A.kind, B.kind) == (torch.float8_e4m3fn, torch.float8_e4m3fn if forward else torch.float8_e5m2)
        a, b = A.x if layout[0] == "T" else A.x.t(), B.x.t() if layout[1] == "T" else B.x
        result = (b @ a.t()).to(out_dtype)  # cuBLAS counts columns first: out = B op A
        return [out.copy_(result + accumulate * out) if out is not None else result, None, None, None]

    kinds = SimpleNamespace(kFloat8E4M3=torch.float8_e4m3fn, kFloat8E5M2=torch.float8_e5m2)
    installed(
        monkeypatch,
        transformer_engine_torch={"DType": kinds},
        transformer_engine__pytorch={},
        transformer_engine__pytorch__tensor__float8_tensor={"Float8CurrentScalingQuantizer": Quantizer},
        transformer_engine__pytorch__cpp_extensions={"general_gemm": general_gemm},
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    FP8_PRODUCTS.check(gemm._te_fp8(ON_CUDA), BF16)


def test_one_line_says_what_is_not_torchs_own() -> None:
    def messages(**used: str) -> str:
        choices = [select.Choice(name, used.get(name, one.last[0]), ()) for name, one in select.OPERATIONS.items()]
        return str(replace(kernels, choices=tuple(choices)))

    kernels = select.select_kernels(CPU, torch.float64)
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
