"""Implementations from Transformer Engine and NVIDIA's apex; nothing is imported before a GPU asks for it.

Every function returns an implementation or raises: `Refused` with a reason, or whatever the package
raises.  Both packages can fail to import in many ways (missing CUDA libraries, other versions, an
unrelated package of the same name), so the caller catches everything and keeps the text.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megallama.config.schema import OptimizerConfig
from megallama.kernels.adam import AdamWStep
from megallama.kernels.attention import Attend
from megallama.kernels.documents import Documents
from megallama.kernels.wgrad import AddWgrad


class Refused(Exception):
    """A candidate that cannot be used here, with the reason."""


def _half_on_cuda(cuda: bool, dtype: torch.dtype) -> None:
    if not cuda:
        raise Refused("no CUDA device")
    if dtype not in (torch.bfloat16, torch.float16):
        raise Refused(f"16-bit formats only, not {dtype}")


def _module(name: str, package: str) -> ModuleType:
    if importlib.util.find_spec(package) is None:
        raise Refused("not installed")
    return importlib.import_module(name)


def _apex(name: str) -> ModuleType:
    """A module of NVIDIA's apex; the package index holds an unrelated one of the same name."""
    if importlib.util.find_spec(name.split(".")[0]) is None:
        if importlib.util.find_spec("apex") is None:
            raise Refused("not installed")
        if importlib.util.find_spec("apex.optimizers") is None:
            raise Refused("the installed package named apex is not NVIDIA's; build NVIDIA/apex from source")
        raise Refused(f"apex was built without its CUDA extension {name}")
    return importlib.import_module(name)


def te_attention(cuda: bool, dtype: torch.dtype) -> Callable[[int, int, int], Attend]:
    """cuDNN or flash attention through Transformer Engine."""
    _half_on_cuda(cuda, dtype)
    te = _module("transformer_engine.pytorch", "transformer_engine")

    def make(num_heads: int, num_kv_heads: int, head_dim: int) -> Attend:
        attention = te.DotProductAttention(
            num_heads, head_dim, num_gqa_groups=num_kv_heads, qkv_format="bshd", attn_mask_type="causal"
        )

        def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
            if documents is None:
                out: Tensor = attention(q, k, v)
                return out.view(*q.shape)
            ends, longest = documents.cu_seqlens, q.shape[1]  # packed: [tokens, heads, d], by document
            packed: dict[str, Any] = {"qkv_format": "thd", "attn_mask_type": "padding_causal"}
            packed |= {"cu_seqlens_q": ends, "cu_seqlens_kv": ends, "max_seqlen_q": longest, "max_seqlen_kv": longest}
            out = attention(*(part.flatten(0, 1) for part in (q, k, v)), **packed)
            return out.view(*q.shape)

        return attend

    return make


def te_wgrad(cuda: bool, dtype: torch.dtype) -> AddWgrad:
    """Transformer Engine's GEMM with fp32 output and accumulation."""
    _half_on_cuda(cuda, dtype)
    _module("transformer_engine.pytorch", "transformer_engine")
    gemm = importlib.import_module("transformer_engine.pytorch.cpp_extensions").general_gemm

    def add(main_grad: Tensor, dy: Tensor, x: Tensor, fresh: bool) -> None:
        gemm(x, dy, out_dtype=torch.float32, accumulate=not fresh, layout="NT", out=main_grad, grad=True)

    return add


def apex_wgrad(cuda: bool, dtype: torch.dtype) -> AddWgrad:
    """apex's GEMM that accumulates into fp32."""
    _half_on_cuda(cuda, dtype)
    extension = _apex("fused_weight_gradient_mlp_cuda")

    def add(main_grad: Tensor, dy: Tensor, x: Tensor, fresh: bool) -> None:
        if fresh:
            main_grad.zero_()
        extension.wgrad_gemm_accum_fp32(x, dy, main_grad)

    return add


def te_adam(cuda: bool) -> AdamWStep:
    """Transformer Engine's multi-tensor AdamW."""
    if not cuda:
        raise Refused("no CUDA device")
    _module("transformer_engine.pytorch", "transformer_engine")
    extension = importlib.import_module("transformer_engine_torch")
    return _multi_tensor_adam(extension.multi_tensor_adam)


def apex_adam(cuda: bool) -> AdamWStep:
    """apex's multi-tensor AdamW."""
    if not cuda:
        raise Refused("no CUDA device")
    return _multi_tensor_adam(_apex("amp_C").multi_tensor_adam)


def _multi_tensor_adam(kernel: Callable[..., None]) -> AdamWStep:
    def step(
        masters: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        steps: Sequence[Tensor],
        config: OptimizerConfig,
        lr: float,
        weight_decay: float,
        divisor: Tensor | None,
    ) -> None:
        if divisor is not None:
            torch._foreach_div_(list(grads), divisor)
        torch._foreach_add_(list(steps), 1)
        lists = [list(grads), list(masters), list(exp_avgs), list(exp_avg_sqs)]
        noop = torch.zeros(1, dtype=torch.int32, device=masters[0].device)
        count = int(steps[0])
        # chunk size, noop flag, tensors, lr, betas, eps, step, AdamW mode, bias correction, decay
        kernel(65536, noop, lists, lr, config.beta1, config.beta2, config.eps, count, 1, 1, weight_decay)

    return step
