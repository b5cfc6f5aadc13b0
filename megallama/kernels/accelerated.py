"""Implementations from Transformer Engine and NVIDIA's apex; nothing is imported before a GPU asks for it.

Every function returns an implementation or raises: `Refused` with a reason, or whatever the package
raises.  Both packages can fail to import in many ways (missing CUDA libraries, other versions, an
unrelated package of the same name), so the caller catches everything and keeps the text.

Considered and left out: Transformer Engine's fused RoPE (takes angles where ours are tables, writes a new tensor
where ours turns in place, and knows documents in another layout only), its cross entropy (all logits of a micro-batch
at once, reduced over a process group of its own) and apex's (a second copy of them), apex's fused dense layers (they
keep outputs that our backward makes again), and `te.Linear` under `te.autocast`: our linear layers are hand-written
functions, so they call what it calls, quantizer and GEMM.
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
from megallama.kernels.adam import AdamWStep, SumOfSquares
from megallama.kernels.attention import Attend
from megallama.kernels.checks import Place, Refused
from megallama.kernels.documents import Documents
from megallama.kernels.gemm import Gemms
from megallama.kernels.norm import NormPair, inverse_rms
from megallama.kernels.wgrad import AddWgrad


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


def te_attention(place: Place) -> Callable[[int, int, int], Attend]:
    """cuDNN or flash attention through Transformer Engine."""
    place.need_half_on_cuda()
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


def te_wgrad(place: Place) -> AddWgrad:
    """Transformer Engine's GEMM with fp32 output and accumulation."""
    place.need_half_on_cuda()
    _module("transformer_engine.pytorch", "transformer_engine")
    gemm = importlib.import_module("transformer_engine.pytorch.cpp_extensions").general_gemm

    def add(main_grad: Tensor, dy: Tensor, x: Tensor, fresh: bool) -> None:
        gemm(x, dy, out_dtype=torch.float32, accumulate=not fresh, layout="NT", out=main_grad, grad=True)

    return add


def apex_wgrad(place: Place) -> AddWgrad:
    """apex's GEMM that accumulates into fp32."""
    place.need_half_on_cuda()
    extension = _apex("fused_weight_gradient_mlp_cuda")

    def add(main_grad: Tensor, dy: Tensor, x: Tensor, fresh: bool) -> None:
        if fresh:
            main_grad.zero_()
        extension.wgrad_gemm_accum_fp32(x, dy, main_grad)

    return add


def _te_extension(place: Place) -> ModuleType:
    """Transformer Engine's functions below its modules; they are there once the package has been imported."""
    place.need_cuda()
    _module("transformer_engine.pytorch", "transformer_engine")
    return importlib.import_module("transformer_engine_torch")


def te_norm(place: Place) -> NormPair:
    """Transformer Engine's RMSNorm. Its gradient of the weight is rounded to the weight's format."""
    place.need_half_on_cuda()
    tex = _te_extension(place)
    kind = importlib.import_module("transformer_engine.pytorch.constants").TE_DType[place.dtype]
    return _norm_pair(
        lambda x, weight, eps: tex.rmsnorm_fwd(x, weight, eps, None, None, kind, 0, False),
        lambda dy, x, rstd, weight, eps: tex.rmsnorm_bwd(dy, x, rstd, weight, 0, False),
    )


def apex_norm(place: Place) -> NormPair:
    """apex's RMSNorm. Its gradient of the weight is rounded to the weight's format."""
    place.need_half_on_cuda()
    extension = _apex("fused_layer_norm_cuda")
    return _norm_pair(
        lambda x, weight, eps: extension.rms_forward_affine(x, x.shape[1:], weight, eps),
        lambda dy, x, rstd, weight, eps: extension.rms_backward_affine(dy, rstd, x, x.shape[1:], weight, eps, False),
    )


def _norm_pair(forward: Callable[..., Any], backward: Callable[..., Any]) -> NormPair:
    def gradients(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        dx, dweight = backward(dy, x, inverse_rms(x, eps).view(-1), weight, eps)[:2]
        return dx, dweight.float()

    return lambda x, weight, eps: forward(x, weight, eps)[0], gradients


def te_swiglu(place: Place) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """Transformer Engine's SwiGLU on packed gate and up, one kernel each way."""
    place.need_half_on_cuda()
    tex = _te_extension(place)
    return lambda gate_up: tex.swiglu(gate_up, None), lambda dout, gate_up: tex.dswiglu(dout, gate_up, None)


def te_fp8(place: Place) -> Gemms:
    """Transformer Engine's fp8 with current scaling: its quantizers and GEMM, accumulating into fp32."""
    tex = _te_extension(place)
    quantizer = importlib.import_module("transformer_engine.pytorch.tensor.float8_tensor").Float8CurrentScalingQuantizer
    gemm = importlib.import_module("transformer_engine.pytorch.cpp_extensions").general_gemm

    def make(kind: Any, columns: bool) -> Any:  # on Hopper only a transposed copy can be read by columns
        return quantizer(kind, place.device, rowwise=True, columnwise=columns, force_pow_2_scales=True)

    (rows4, columns4), (rows5, columns5) = (
        (make(kind, False), make(kind, True)) for kind in (tex.DType.kFloat8E4M3, tex.DType.kFloat8E5M2)
    )
    bf16 = torch.bfloat16

    def project(x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = gemm(rows4(weight), rows4(x), out_dtype=bf16, layout="TN")[0]
        return out

    def project_back(dy: Tensor, weight: Tensor) -> Tensor:
        operands = columns4(weight), rows5(dy)
        out: Tensor = gemm(*operands, out_dtype=bf16, layout="NN", grad=True, use_split_accumulator=True)[0]
        return out

    def add(main_grad: Tensor, dy: Tensor, x: Tensor, fresh: bool) -> None:
        gemm(
            columns4(x), columns5(dy), out_dtype=torch.float32, layout="NT", grad=True, out=main_grad,
            accumulate=not fresh, use_split_accumulator=True,
        )  # fmt: skip

    return Gemms(project, project_back, add)


def te_sum_of_squares(place: Place) -> SumOfSquares:
    """Transformer Engine's multi-tensor norm, squared."""
    return _multi_tensor_sum(_te_extension(place).multi_tensor_l2norm)


def apex_sum_of_squares(place: Place) -> SumOfSquares:
    """apex's multi-tensor norm, squared."""
    place.need_cuda()
    return _multi_tensor_sum(_apex("amp_C").multi_tensor_l2norm)


def _multi_tensor_sum(kernel: Callable[..., Any]) -> SumOfSquares:
    def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
        held = [x for x in tensors if x.numel()]
        if not held:
            return torch.zeros((), dtype=torch.float64)
        noop = torch.zeros(1, dtype=torch.int32, device=held[0].device)
        norm: Tensor = kernel(65536, noop, [held], False)[0]  # chunk size, noop flag, tensors, norms of each
        return norm.double().square().sum()

    return sum_of_squares


def te_adam(place: Place) -> AdamWStep:
    """Transformer Engine's multi-tensor AdamW."""
    return _multi_tensor_adam(_te_extension(place).multi_tensor_adam)


def apex_adam(place: Place) -> AdamWStep:
    """apex's multi-tensor AdamW."""
    place.need_cuda()
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
