"""Our calls of Transformer Engine and apex, bound as their own sources declare what is called."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megallama.kernels import gemm, optimizer, select
from megallama.kernels.attention import ATTENTION, Attend, Documents, MakeAttention, sdpa
from megallama.kernels.candidate import APEX, TE, Target, Unsupported, Wrong
from megallama.kernels.gemm import FP8_PRODUCTS
from tests.cuda.packages import LABELS, Package, install
from tests.cuda.read_sources import facts
from tests.kernels.plain import plain_attention

CPU = torch.device("cpu")
ON_CUDA = Target(torch.device("cuda"), torch.bfloat16, documents=True)
HERE = replace(ON_CUDA, device=CPU, fewer=True)
ALL = {**select.OPERATIONS, select.FP8: FP8_PRODUCTS}
CASES = [
    (label, name)
    for kind, labels in LABELS.items()
    for label in labels
    for name, operation in ALL.items()
    if kind in dict(operation.candidates)
]
TE_LABELS = LABELS[TE]


def candidate(operation: str, label: str) -> Callable[[Target], Any]:
    """The function that makes it, of the package of that label."""
    kind = APEX if label in LABELS[APEX] else TE
    return dict(ALL[operation].candidates)[kind]


@pytest.mark.parametrize(("label", "operation"), CASES, ids=str)
def test_every_call_binds_and_computes_what_it_should(
    label: str, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = install(monkeypatch, label)
    made = candidate(operation, label)(ON_CUDA)
    ours = replace(HERE, dtype=torch.float32) if operation in ("AdamW", "gradient norm") else HERE
    ALL[operation].check(made, ours)
    assert package.called, "the stand-ins were not asked"


def test_all_that_the_tables_hold_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    for labels in LABELS.values():
        for label in labels:
            package = install(monkeypatch, label)
            names = {name for name, fact in package.facts.items() if isinstance(fact, dict)}
            called = set[str]()
            for other, operation in CASES:
                if other == label:
                    package = install(monkeypatch, label)
                    dtype = torch.float32 if operation in ("AdamW", "gradient norm") else torch.bfloat16
                    ALL[operation].results(candidate(operation, label)(ON_CUDA), replace(HERE, dtype=dtype))
                    called |= package.called
            assert called == names, label


CHANGES: list[tuple[str, str, str, Callable[[dict[str, Any]], Any], str]] = [
    (  # label, operation, function, what another version does to it, the complaint
        TE_LABELS[0], "SwiGLU", "transformer_engine_torch.swiglu",
        lambda f: f["parameters"].append({"name": "limit", "kind": "float"}), "missing a required argument: 'limit'",
    ),
    (
        TE_LABELS[0], "RMSNorm", "transformer_engine_torch.rmsnorm_bwd",
        lambda f: f["parameters"].insert(0, f["parameters"].pop(4)), "sm_margin must be int, not Tensor",
    ),
    (
        TE_LABELS[0], "weight gradient", "transformer_engine.pytorch.cpp_extensions.general_gemm",
        lambda f: f["parameters"][10].update(name="D"), "got an unexpected keyword argument 'out'",
    ),
    (
        TE_LABELS[1], "fp8 products", "transformer_engine.pytorch.tensor.float8_tensor.Float8CurrentScalingQuantizer",
        lambda f: f["parameters"].pop(7), "got an unexpected keyword argument 'force_pow_2_scales'",
    ),
    (
        LABELS[APEX][0], "RMSNorm", "fused_layer_norm_cuda.rms_backward_affine",
        lambda f: f["parameters"].pop(), "too many positional arguments",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("label", "operation", "function", "change", "why"), CHANGES, ids=lambda x: "" if callable(x) else x[:40]
)
def test_another_declaration_is_noticed(
    label: str, operation: str, function: str, change: Callable[..., Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = install(monkeypatch, label)
    change(package.facts[function])
    monkeypatch.setattr("tests.cuda.packages.Package", lambda label: package)
    install(monkeypatch, label)
    with pytest.raises(TypeError, match=why):
        ALL[operation].check(candidate(operation, label)(ON_CUDA), HERE)


def strided(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape[1], shape[0]).to(torch.bfloat16).t()


@pytest.mark.parametrize("label", [*TE_LABELS, *LABELS[APEX]])
def test_products_that_misread_strided_operands_are_never_given_them(
    label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, label)
    add = candidate("weight gradient", label)(ON_CUDA)
    x, dy, grad = torch.randn(64, 48).bfloat16(), torch.randn(64, 32).bfloat16(), torch.zeros(32, 48)
    for bad in ((grad, strided((64, 32)), x), (grad, dy, strided((64, 48))), (torch.zeros(48, 32).t(), dy, x)):
        with pytest.raises(AssertionError, match="a copy is needed first"):
            add(*bad, True)
    monkeypatch.setattr(Target, "contiguous", staticmethod(lambda x: x))
    add = candidate("weight gradient", label)(ON_CUDA)  # without the assertion it is wrong in silence
    add(grad, dy := strided((64, 32)), x, True)
    want = dy.float().t() @ x.float()
    assert float((grad - want).norm() / want.norm()) > 0.5


@pytest.mark.parametrize("label", TE_LABELS)
def test_norms_that_misread_strided_rows_are_never_given_them(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, label)
    forward, _ = candidate("RMSNorm", label)(ON_CUDA)
    with pytest.raises(AssertionError, match="a copy is needed first"):
        forward(strided((48, 64)), None, torch.ones(64).bfloat16(), 1e-5)


@pytest.mark.parametrize("label", TE_LABELS)
def test_no_infinity_hides_in_fp8(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, label)
    make, x, weight = candidate("fp8 products", label), torch.randn(64, 48).bfloat16(), torch.randn(32, 48).bfloat16()
    for bad in (torch.inf, -torch.inf):
        x[7, 3] = bad
        assert make(ON_CUDA).fprop(x, weight).isnan().all()
    real = gemm._showing
    monkeypatch.setattr(gemm, "_showing", lambda quantizer: quantizer)
    assert make(ON_CUDA).fprop(x, weight).isfinite().all(), "the package by itself hides it"
    with pytest.raises(Wrong, match="an infinity in x differs from the plain formula by 1.0e"):
        FP8_PRODUCTS.check(make(ON_CUDA), HERE)
    monkeypatch.setattr(gemm, "_showing", real)
    FP8_PRODUCTS.check(make(ON_CUDA), HERE)


@pytest.mark.parametrize("label", TE_LABELS)
def test_documents_on_an_a100_need_flash_attention(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = candidate("attention", label)
    install(monkeypatch, label, capability=(8, 0))
    with pytest.raises(Unsupported, match="documents need flash_attn below compute capability 9.0, here 8.0"):
        make(ON_CUDA)
    make(replace(ON_CUDA, documents=False))
    known = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "flash_attn" else known(name))
    make(ON_CUDA)
    install(monkeypatch, label, capability=(9, 0))
    make(ON_CUDA)


def as_maker(attend: Attend) -> MakeAttention:
    return lambda n, k, d: attend


def taken_apart(q: Any, k: Any, v: Any, documents: Documents | None = None) -> torch.Tensor:
    """Right for tensors of their own alone: parts of a packed one are read as if they were such."""
    parts = (x if x.is_contiguous() else x.as_strided(x.shape, x.new_empty(x.shape).stride()) for x in (q, k, v))
    return plain_attention(*parts, documents)


def only_grouped(q: Any, k: Any, v: Any, documents: Documents | None = None) -> torch.Tensor:
    return sdpa(q, k, v, documents) if k.shape[2] < q.shape[2] else sdpa(q, k.flip(2), v, documents)


def never_grouped(q: Any, k: Any, v: Any, documents: Documents | None = None) -> torch.Tensor:
    return sdpa(q, k, v, documents) if k.shape[2] == q.shape[2] else sdpa(q, k.flip(2), v, documents)


def test_attention_is_checked_on_parts_of_a_packed_tensor() -> None:
    q, k, v = (torch.randn(2, 16, n, 8) for n in (4, 2, 2))
    assert torch.allclose(taken_apart(q, k, v), plain_attention(q, k, v))
    for attend, where in ((taken_apart, "output"), (only_grouped, "output"), (never_grouped, "output of grouped")):
        with pytest.raises(Wrong, match=f"^{where}.* differs from the plain formula by"):
            ATTENTION.check(as_maker(attend), replace(HERE, fewer=False))
    ATTENTION.check(as_maker(plain_attention), replace(HERE, fewer=False))


def test_kernels_that_count_in_32_bits_are_given_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    label = TE_LABELS[0]
    install(monkeypatch, label)
    too_many = torch.empty(1 << 31, device="meta", dtype=torch.float32)
    step, norm = (candidate(name, label)(ON_CUDA) for name in ("AdamW", "gradient norm"))
    for call in (lambda: step([[too_many]] * 5, None, 1e-3, 0.0, None, 1), lambda: norm([too_many])):
        with pytest.raises(AssertionError, match="2,147,483,648 elements in one bucket, .* counts 2,147,483,647"):
            call()
    optimizer._countable([too_many[1:]])


def test_the_tables_say_of_what_they_are() -> None:
    sources = [Package(label).source for labels in LABELS.values() for label in labels]
    versions = ("NVIDIA/TransformerEngine v2.12", "NVIDIA/TransformerEngine v2.18", "NVIDIA/apex 6424da3b")
    assert tuple(sources) == versions


SMALL_APEX = {
    "csrc/megatron/fused_weight_gradient_dense.cpp": """
void stub(at::Tensor& x, at::Tensor& d_y, at::Tensor& d_w);
m.def("wgrad_gemm_accum_fp32", &stub, "in fp32", py::arg("x"), py::arg("d_y"), py::arg("d_w") = at::Tensor());""",
    "csrc/layer_norm_cuda.cpp": """
std::vector<at::Tensor> norm(const at::Tensor& x, at::IntArrayRef shape, const double eps = 1e-5) {
  CHECK_INPUT(x); if (eps) { run(x); } }
void norm_back(at::Tensor &dy, const bool less) { auto y = dy.contiguous(); }
m.def("rms_forward_affine", &ns::norm, "forward", py::call_guard<py::gil_scoped_release>());
m.def("rms_backward_affine", &norm_back, "backward (CUDA), twice");""",
    "csrc/amp_C_frontend.cpp": """
void adam(int chunk, std::vector<std::vector<at::Tensor>> lists);
std::tuple<at::Tensor, at::Tensor> l2(std::vector<std::vector<at::Tensor>> lists, at::optional<bool> each);
m.def("multi_tensor_adam", &adam, "Adam"); m.def("multi_tensor_l2norm", &l2, "norm");""",
    "csrc/multi_tensor_apply.cuh": 'TORCH_CHECK(tensor.is_contiguous(), "must be contiguous");',
}


def test_tables_are_read_from_sources(tmp_path: Path) -> None:
    for name, text in SMALL_APEX.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = facts(tmp_path)
    rows = {name: [tuple(row.values()) for row in fact["parameters"]] for name, fact in found.items()}
    assert rows == {
        "fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32": [(x, "tensor", "misread") for x in ("x", "d_y", "d_w")],
        "fused_layer_norm_cuda.rms_forward_affine": [("x", "tensor", "refused"), ("shape", "sizes"), ("eps", "float")],
        "fused_layer_norm_cuda.rms_backward_affine": [("dy", "tensor", "copied"), ("less", "bool")],
        "amp_C.multi_tensor_adam": [("chunk", "int"), ("lists", "tensors", "refused")],
        "amp_C.multi_tensor_l2norm": [("lists", "tensors", "refused"), ("each", "bool")],
    }
    keywords = [fact["keywords"] for fact in found.values()]
    assert keywords == [["x", "d_y", "d_w"], [], [], [], []]
