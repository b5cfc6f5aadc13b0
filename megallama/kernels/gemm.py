"""Matrix products of the linear layers, the weight gradients that add to fp32, and both in fp8.

All three GEMMs of a layer have one form, a @ b.T:

    forward  y  = x @ W.T          matmul_nt(x, W)
    dgrad    dx = dy @ W           matmul_nt(dy, W.T)
    wgrad    dW = dy.T @ x         matmul_nt(dy.T, x.T)
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from megallama.kernels.candidate import APEX, TE, TRITON, Operation, Results, Target, Unsupported, accumulate_dtype
from megallama.kernels.processors import Processor

MatmulNT = Callable[[Tensor, Tensor], Tensor]  # a [m, k], b [n, k] -> a @ b.T [m, n], a new tensor
# main_grad [out, in], dy, x, overwrite; all contiguous: some kernels read any tensor so
AddWgrad = Callable[[Tensor, Tensor, Tensor, bool], None]


@dataclass(frozen=True)
class Gemms:
    """The three products of a weight [out, in], x [T, in] and dy [T, out]."""

    fprop: MatmulNT  # x, weight -> x @ weight.T
    dgrad: Callable[[Tensor, Tensor], Tensor]  # dy, weight -> dy @ weight
    wgrad: AddWgrad  # += dy.T @ x

    @classmethod
    def of(cls, product: MatmulNT, wgrad: AddWgrad) -> Self:
        """All by one product but the last."""
        return cls(product, lambda dy, weight: product(dy, weight.t()), wgrad)


def matmul_nt(a: Tensor, b: Tensor) -> Tensor:
    """torch's own product."""
    return torch.mm(a, b.t())


def onednn_matmul_nt(a: Tensor, b: Tensor) -> Tensor:
    """The same through oneDNN, for fp32 in host memory."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def _onednn(target: Target) -> MatmulNT:
    """torch's CPU build multiplies fp32 with MKL, which is slow on processors that are not Intel's.

    Measured on an AMD Zen 5 core: 85 GFLOP/s, oneDNN, which the same build contains, 180.  The
    processor decides, never a measurement: two runs on one machine give the same bits.
    """
    if target.device.type != "cpu" or target.dtype != torch.float32:
        raise Unsupported("fp32 on a CPU only")
    if Processor.here().vendor == "GenuineIntel" and target.named != "oneDNN":
        raise Unsupported("MKL is as fast on this processor")
    target.need_onednn()
    return onednn_matmul_nt


def _product_results(product: MatmulNT, target: Target) -> Results:
    """Also of operands that are views."""
    a, b = (target.random(n, 48, seed=n) for n in (33, 40))
    pairs = (a, b), (a[:, :40], b.t()[:, :40].t()[:, :40]), (a.t(), b[:33].t())
    return [("product", product(x, y)) for x, y in pairs]


MAX_PRODUCT = 1 << 22  # elements that exist before they are added: a large head comes in blocks


def product_in_fp32(product: MatmulNT, a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T of 16 bits, rounded once; of b at most `MAX_PRODUCT` numbers exist in fp32."""
    left = a.float()
    if b.numel() <= MAX_PRODUCT:
        return product(left, b.float()).to(a.dtype)
    out = a.new_empty(a.shape[0], b.shape[0])
    step = max(1, MAX_PRODUCT // b.shape[1])
    for into, part in zip(out.split(step, 1), b.split(step), strict=True):
        into.copy_(product(left, part.float()))
    return out


PRODUCT = Operation(
    [("oneDNN", _onednn)],
    ("torch mm", lambda target: matmul_nt),
    _product_results,
    named=[
        ("oneDNN in fp32", Target.on_cpu(partial(product_in_fp32, onednn_matmul_nt), onednn=True)),
        ("torch mm in fp32", Target.on_cpu(partial(product_in_fp32, matmul_nt))),
    ],
)


def add_wgrad(product: MatmulNT, main_grad: Tensor, dy: Tensor, x: Tensor, overwrite: bool) -> None:
    """Accumulation by a product in the operands' format and an addition in main_grad's."""
    if dy.dtype == main_grad.dtype and product is matmul_nt:
        torch.mm(dy.t(), x, out=main_grad) if overwrite else main_grad.addmm_(dy.t(), x)
        return
    step = max(1, MAX_PRODUCT // main_grad.shape[1])
    for grad, part in zip(main_grad.split(step), dy.split(step, 1), strict=True):
        grad.copy_(product(part.t(), x.t())) if overwrite else grad.add_(product(part.t(), x.t()))


def wgrad_in_fp32(main_grad: Tensor, dy: Tensor, x: Tensor, overwrite: bool) -> None:
    """Straight into main_grad [out, in]: nothing is rounded, no pass adds."""
    add_wgrad(matmul_nt, main_grad, dy.float(), x.float(), overwrite)


def _addmm(target: Target) -> AddWgrad:
    """One GEMM whose output is fp32: torch's addmm with an output format."""
    if target.device.type != "cuda" or accumulate_dtype(target.dtype) == target.dtype:
        raise Unsupported("CUDA with 16-bit weights only")

    def add(main_grad: Tensor, dy: Tensor, x: Tensor, overwrite: bool) -> None:
        if overwrite:
            torch.mm(dy.t(), x, out_dtype=torch.float32, out=main_grad)
        else:
            torch.ops.aten.addmm.dtype_out(main_grad, dy.t(), x, torch.float32, out=main_grad)

    return add


def _te_wgrad(target: Target) -> AddWgrad:
    target.need_half_on_cuda()
    gemm, whole = target.te_module("transformer_engine.pytorch.cpp_extensions").general_gemm, target.contiguous

    def add(main_grad: Tensor, dy: Tensor, x: Tensor, overwrite: bool) -> None:
        operands, into = (whole(x), whole(dy)), {"out": whole(main_grad), "out_dtype": torch.float32}
        gemm(*operands, accumulate=not overwrite, layout="NT", grad=True, **into)

    return add


def _apex_wgrad(target: Target) -> AddWgrad:
    target.need_half_on_cuda()
    extension, whole = target.apex_module("fused_weight_gradient_mlp_cuda"), target.contiguous

    def add(main_grad: Tensor, dy: Tensor, x: Tensor, overwrite: bool) -> None:
        if overwrite:
            main_grad.zero_()
        extension.wgrad_gemm_accum_fp32(whole(x), whole(dy), whole(main_grad))

    return add


def _wgrad_results(add: AddWgrad, target: Target) -> Results:
    """Written over what was there, and added to it."""
    dy, x = (target.random(64, n, seed=n) for n in (32, 48))
    first = torch.full((32, 48), 7.0, dtype=accumulate_dtype(dy.dtype), device=target.device)
    add(first, dy, x, True)
    second = first.clone()
    add(second, dy, x, False)
    return [("overwritten", first), ("accumulated", second)]


WGRAD = Operation(
    [(TE, _te_wgrad), (APEX, _apex_wgrad), ("torch addmm into fp32", _addmm)],
    ("that product, then add", lambda target: partial(add_wgrad, target.product or matmul_nt)),
    _wgrad_results,
    (1e-5,),
    named=[("torch addmm in fp32", Target.on_cpu(wgrad_in_fp32, torch.float32))],
)


# fp8 with current scaling (Micikevicius et al. 2022): fp32 sums; bf16 outputs, fp32 weight gradients.
# Hopper wants a @ b.T contiguous along the sum, sizes multiples of 16: the backward's are transposed once rounded.
FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2  # largest values 448, 57344
Scaled = tuple[Tensor, Tensor]  # fp8 values and the inverse of their scale, one fp32 number


def quantize(x: Tensor, dtype: torch.dtype, rows: bool = True, columns: bool = False) -> list[Scaled]:
    """x times a power of two in `dtype`, as it lies and transposed, as asked; each with its inverse.

    One power for the whole tensor, from its largest element: scaling rounds nothing.
    """
    largest = torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32)
    _, exponent = torch.frexp(torch.finfo(dtype).max / largest.clamp(1e-30))
    scale = torch.ldexp(torch.ones_like(largest), (exponent - 1).clamp_(-100, 100))
    inverse = torch.where(largest.isfinite(), 1 / scale, torch.nan)  # fp8 would hide an infinity
    values = (x * scale.to(x.dtype)).to(dtype)
    return [(values, inverse)] * rows + ([(values.t().contiguous(), inverse)] if columns else [])


def _scaled_mm(a: Scaled, b: Scaled, out: Tensor | None = None, fast: bool = False) -> Tensor:
    """a [m, k] @ b [n, k].T in bf16 or into `out`; `fast`: a GPU may add in fewer bits."""
    kind, where = (torch.bfloat16, {}) if out is None else (out.dtype, {"out": out})
    scales = {"scale_a": a[1], "scale_b": b[1]}
    return torch._scaled_mm(a[0], b[0].t(), **scales, out_dtype=kind, use_fast_accum=fast, **where)


def _need_fp8(target: Target) -> None:
    target.need_cuda()
    major, minor = torch.cuda.get_device_capability(target.device)
    if (major, minor) < (8, 9):
        raise Unsupported(f"compute capability {major}.{minor} is below 8.9 (L40S, H100, H200, B200)")


def _torch_fp8(target: Target) -> Gemms:
    _need_fp8(target)
    return fp8_gemms(quantize)


def fp8_gemms(quantized: Callable[[Tensor, torch.dtype, bool, bool], list[Scaled]]) -> Gemms:
    """By a function that does what `quantize` does.

    A weight is rounded after each change, and kept so: two bytes an element.  wgrad takes what dgrad rounds.
    """
    weights: WeakIdKeyDictionary = WeakIdKeyDictionary()  # -> (version, by rows, by columns)
    latest: list[tuple[weakref.ref[Tensor], int, Scaled]] = []  # a gradient, its version, by columns

    def of(weight: Tensor) -> tuple[Scaled, Scaled]:
        version, *both = weights.get(weight, (-1,))
        if version != weight._version:  # of the whole buffer, into which every step writes
            weights.pop(weight, None)  # before there are new ones
            both = quantized(weight, FORWARD, True, True)
            weights[weight] = weight._version, *both
        return both[0], both[1]

    def fprop(x: Tensor, weight: Tensor) -> Tensor:
        return _scaled_mm(quantized(x, FORWARD, True, False)[0], of(weight)[0], fast=True)

    def dgrad(dy: Tensor, weight: Tensor) -> Tensor:
        rows, columns = quantized(dy, GRADIENT, True, True)
        latest[:] = [(weakref.ref(dy), dy._version, columns)]
        return _scaled_mm(rows, of(weight)[1])

    def wgrad(main_grad: Tensor, dy: Tensor, x: Tensor, overwrite: bool) -> None:
        known = [columns for of, version, columns in latest if of() is dy and version == dy._version]
        latest.clear()
        columns = known[0] if known else quantized(dy, GRADIENT, False, True)[0]
        into = main_grad if overwrite else torch.empty_like(main_grad)
        product = _scaled_mm(columns, quantized(x, FORWARD, False, True)[0], out=into)
        if not overwrite:
            main_grad.add_(product)

    return Gemms(fprop, dgrad, wgrad)


def _triton_fp8(target: Target) -> Gemms:
    _need_fp8(target)
    target.need_triton()
    from megallama.kernels.triton_kernels import quantized

    return fp8_gemms(quantized)


def _te_fp8(target: Target) -> Gemms:
    """Transformer Engine's quantizers and GEMM, which accumulates into fp32."""
    _need_fp8(target)
    tex = target.te_module()
    quantizer = target.te_module("transformer_engine.pytorch.tensor.float8_tensor").Float8CurrentScalingQuantizer
    gemm = target.te_module("transformer_engine.pytorch.cpp_extensions").general_gemm

    rows4, columns4, rows5, columns5 = (  # Hopper reads by columns only copies
        _showing(quantizer(kind, target.device, rowwise=True, columnwise=columns, force_pow_2_scales=True))
        for kind in (tex.DType.kFloat8E4M3, tex.DType.kFloat8E5M2)
        for columns in (False, True)
    )
    forward: dict[str, Any] = {"out_dtype": torch.bfloat16, "layout": "TN"}
    backward: dict[str, Any] = {"grad": True, "use_split_accumulator": True}

    def add(main_grad: Tensor, dy: Tensor, x: Tensor, overwrite: bool) -> None:
        into: dict[str, Any] = {"out": main_grad, "out_dtype": torch.float32, "accumulate": not overwrite}
        gemm(columns4(x), columns5(dy), layout="NT", **into, **backward)

    return Gemms(
        lambda x, weight: gemm(rows4(weight), rows4(x), **forward)[0],
        lambda dy, weight: gemm(columns4(weight), rows5(dy), **forward | backward | {"layout": "NN"})[0],
        add,
    )


def _showing(quantizer: Any) -> Callable[[Tensor], Any]:
    """That quantizer, but of an infinity, which would become finite, the inverse scale is NaN.

    Transformer Engine's scale is 1 where the largest element is infinite or NaN, and its casts saturate.
    """

    def quantized(x: Tensor) -> Any:
        out, largest = quantizer(x), getattr(quantizer, "amax", None)
        if largest is None:  # since version 2.16 it is not kept
            largest = torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32)
        out._scale_inv.add_(largest - largest)  # 0, or NaN
        return out

    return quantized


def _fp8_results(gemms: Gemms, target: Target) -> Results:
    x, dy, weight = (target.random(*shape, seed=shape[1]) for shape in ((64, 48), (64, 32), (32, 48)))
    products = [("product", gemms.fprop(x, weight)), ("gradient of the input", gemms.dgrad(dy, weight))]
    products += _wgrad_results(gemms.wgrad, target)

    def spoiled(operand: Tensor) -> Tensor:
        return operand.clone().index_fill_(0, torch.tensor([1], device=operand.device), -torch.inf)

    grad = torch.zeros_like(weight, dtype=accumulate_dtype(weight.dtype))
    gemms.wgrad(grad, spoiled(dy), x, True)
    seen = {"x": gemms.fprop(spoiled(x), weight), "the weight": gemms.fprop(x, spoiled(weight))}
    seen |= {"dy": gemms.dgrad(spoiled(dy), weight), "dy in a weight gradient": grad}
    return products + [(f"an infinity in {of}", (~out.isfinite()).any().double()) for of, out in seen.items()]


FP8_PRODUCTS = Operation(
    [(TE, _te_fp8), (TRITON, _triton_fp8), ("torch _scaled_mm", _torch_fp8)],
    ("nothing here can", lambda target: fp8_gemms(quantize)),
    _fp8_results,
    (6e-2, 8e-2, 8e-2, 8e-2),  # rounding normal operands costs 2.6 % (E4M3), 5.2 % (E5M2) each
    plain=Gemms.of(matmul_nt, partial(add_wgrad, matmul_nt)),
)
