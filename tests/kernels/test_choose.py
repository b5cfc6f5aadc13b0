"""The choice of kernels: reasons are kept, broken and wrong candidates are refused, nothing crashes."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megallama.config.errors import MegallamaError
from megallama.kernels import accelerated, choose
from megallama.kernels.adam import adamw_step
from megallama.kernels.attention import Attend, blocked_attention, plain_attention, sdpa
from megallama.kernels.documents import Documents
from megallama.kernels.wgrad import add_wgrad

CPU = torch.device("cpu")


def test_a_cpu_takes_torch_and_says_why() -> None:
    lines = [str(c) for c in choose.choose_kernels(CPU, torch.bfloat16).choices]
    assert lines == [
        "attention: blocks of matrix products (not Transformer Engine: no CUDA device)",
        "matrix product: torch mm (not oneDNN: fp32 on a CPU only)",
        "weight gradient: torch mm, then add (not Transformer Engine: no CUDA device; not apex: no CUDA device; "
        "not torch addmm into fp32: CUDA with 16-bit weights only)",
        "AdamW: torch fused (not Transformer Engine: no CUDA device; not apex: no CUDA device)",
    ]


@pytest.mark.parametrize(
    ("vendor", "taken"), [("AuthenticAMD", "oneDNN"), ("GenuineIntel", "torch mm"), ("", "oneDNN")]
)
def test_fp32_products_follow_from_the_processor(monkeypatch: pytest.MonkeyPatch, vendor: str, taken: str) -> None:
    monkeypatch.setattr(choose, "processor", lambda: vendor)
    kernels = choose.choose_kernels(CPU, torch.float32)
    assert kernels.choices[1].taken == taken
    assert kernels.choices[2].taken == f"{taken}, then add"
    a, b = torch.randn(5, 7), torch.randn(3, 7)
    assert torch.allclose(kernels.matmul_nt(a, b), a @ b.t(), atol=1e-6)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for make in (accelerated.te_attention, accelerated.te_wgrad, accelerated.apex_wgrad):
        with pytest.raises(accelerated.Refused, match="not installed"):
            make(True, torch.bfloat16)
    with pytest.raises(accelerated.Refused, match="16-bit formats only, not torch.float32"):
        accelerated.te_attention(True, torch.float32)


def test_the_other_apex_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "apex" else None)
    with pytest.raises(accelerated.Refused, match="not NVIDIA's; build NVIDIA/apex from source"):
        accelerated.apex_adam(True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name.startswith("apex") else None)
    with pytest.raises(accelerated.Refused, match="built without its CUDA extension amp_C"):
        accelerated.apex_adam(True)


def test_any_exception_of_a_package_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("cudnn shared object not found.\nmore text")

    monkeypatch.setattr(accelerated, "te_attention", broken)
    choice = choose.choose_kernels(CPU, torch.bfloat16).choices[0]  # attention
    assert choice.refused == (("Transformer Engine", "cudnn shared object not found."),)


def test_wrong_results_are_refused() -> None:
    def not_causal(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents | None = None
    ) -> torch.Tensor:
        return sdpa(q.flip(1), k, v)

    def make(n: int, k: int, d: int) -> Attend:
        return not_causal

    with pytest.raises(accelerated.Refused, match="output differs from the plain formula by"):
        choose._checked_attention(make, CPU, torch.bfloat16)
    with pytest.raises(accelerated.Refused, match="overwritten differs"):
        choose._checked_wgrad(lambda main, dy, x, fresh: add_wgrad(main, dy, x, False), CPU, torch.float32)
    with pytest.raises(accelerated.Refused, match="weights differs"):
        choose._checked_adam(lambda *a: adamw_step(*a[:7], 0.0, a[8]), CPU)


def across_documents(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents | None = None
) -> torch.Tensor:
    """Attention that silently leaves the mask out."""
    return blocked_attention(q, k, v)


def test_attention_that_forgets_documents_is_refused_only_where_they_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "blocked_attention", across_documents)
    (plain, *_), (apart, *_) = (
        choose.choose_kernels(CPU, torch.bfloat16, documents=on).choices for on in (False, True)
    )
    assert plain.taken == "blocks of matrix products"
    assert apart.taken == "torch scaled_dot_product_attention"
    assert apart.refused[1][1].startswith("output within documents differs from the plain formula by")
    monkeypatch.setattr(choose, "sdpa", across_documents)
    message = "no attention here keeps documents apart: torch's output within documents differs .* by .*; use data.docu"
    with pytest.raises(MegallamaError, match=message):
        choose.choose_kernels(CPU, torch.bfloat16, documents=True)


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


def test_transformer_engines_attention_is_called_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(DotProductAttention=DotProductAttention)
    monkeypatch.setattr(accelerated, "_module", lambda name, package: module)
    monkeypatch.setattr(accelerated, "_half_on_cuda", lambda cuda, dtype: None)
    make = accelerated.te_attention(True, torch.bfloat16)
    assert choose._checked_attention(make, CPU, torch.bfloat16, documents=True) is make


def test_right_results_are_taken() -> None:
    for documents in (False, True):
        assert choose._checked_attention(lambda n, k, d: sdpa, CPU, torch.bfloat16, documents)(1, 1, 1) is sdpa
    assert choose._checked_wgrad(add_wgrad, CPU, torch.float32) is add_wgrad
    assert choose._checked_adam(adamw_step, CPU) is adamw_step


def test_the_multi_tensor_kernel_is_called_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the documented signature of amp_C.multi_tensor_adam must reproduce torch's AdamW."""

    def multi_tensor_adam(chunk, noop, lists, lr, beta1, beta2, eps, step, mode, bias_correction, decay):  # type: ignore[no-untyped-def]
        assert (mode, bias_correction, noop.dtype) == (1, 1, torch.int32)
        for g, p, m, v in zip(*lists, strict=True):
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps) + decay * p
            p.sub_(lr * update)

    fake = ModuleType("amp_C")
    fake.multi_tensor_adam = multi_tensor_adam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "amp_C", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    step = accelerated.apex_adam(True)
    assert choose._checked_adam(step, CPU) is step
