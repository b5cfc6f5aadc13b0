"""Stand-ins for Transformer Engine and apex on a CPU: the declarations of a table, computing with torch.

Arguments are bound as the package's own declaration binds them, and looked at: kinds, formats, layouts. A tensor
that the package would read as if it were contiguous is read so here too, and the numbers are then wrong.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megallama.config.schema import OptimizerConfig
from megallama.kernels.optimizer import adamw_step, sum_of_squares
from megallama.kernels.pointwise import rms_norm, rms_norm_backward, swiglu, swiglu_backward
from tests.cuda.read_sources import TE, TEX
from tests.kernels.plain import plain_attention

CONTRACTS = Path(__file__).parent / "contracts"
LABELS = {"Transformer Engine": ("transformer-engine-2.12", "transformer-engine-2.18"), "apex": ("apex-6424da3b",)}


@dataclass(frozen=True)
class Format:
    """A member of Transformer Engine's enumeration."""

    name: str


def as_read(tensor: Tensor, strided: str, where: str) -> Tensor:
    """What a package sees of a tensor."""
    if strided == "refused" and not tensor.is_contiguous():
        raise RuntimeError(f"{where} must be contiguous")
    if strided == "misread" and not tensor.is_contiguous():  # sizes and the address of the first element
        room = tensor.untyped_storage().nbytes() // tensor.itemsize - tensor.storage_offset()
        flat = tensor.detach().as_strided((min(room, tensor.numel()),), (1,))
        return torch.cat([flat, flat.new_zeros(tensor.numel() - len(flat))]).view(tensor.shape)
    return tensor


def looked_at(value: Any, row: Mapping[str, Any], where: str) -> Any:
    """`value` as the parameter takes it. Raises: TypeError as pybind11 would."""
    kind, strided = row.get("kind", "object"), row.get("strided", "copied")
    fits = {
        "tensor": isinstance(value, Tensor),
        "int": isinstance(value, int) and not isinstance(value, bool),
        "float": isinstance(value, (int, float)) and not isinstance(value, bool),
        "bool": isinstance(value, bool),
        "format": isinstance(value, Format),
        "sizes": isinstance(value, (tuple, list, torch.Size)),
        "tensors": isinstance(value, list) and all(isinstance(x, Tensor) for part in value for x in part),
    }
    if not fits.get(kind, True):
        raise TypeError(f"{where} must be {kind}, not {type(value).__name__}")
    if kind == "tensors":
        assert len({len(part) for part in value}) == 1, f"{where}: lists of different lengths"
        return [[as_read(x, strided, where) for x in part] for part in value]
    return as_read(value, strided, where) if isinstance(value, Tensor) else value


class Package:
    """What a table says; `called` are the names of the functions that were."""

    def __init__(self, label: str) -> None:
        table = json.loads((CONTRACTS / f"{label}.json").read_text(encoding="utf-8"))
        self.source, self.facts, self.called = table["source"], table["facts"], set[str]()
        self.formats = SimpleNamespace(**{name: Format(name) for name in self.facts.get(f"{TEX}.DType", ())})

    def bind(self, name: str, args: Any, named: Any) -> dict[str, Any]:
        """Arguments by the names of the declaration. Raises: TypeError."""
        entry, P = self.facts[name], inspect.Parameter
        kinds = {"only": P.KEYWORD_ONLY, "both": P.POSITIONAL_OR_KEYWORD, "place": P.POSITIONAL_ONLY}
        parameters = [
            P(
                row["name"],
                kinds["only" if row.get("only") else "both" if entry.get("python") else "place"],
                default=None if row.get("default") else P.empty,
            )
            for row in entry["parameters"]
        ]
        bound = inspect.Signature(parameters).bind(*args, **named).arguments
        self.called.add(name)
        rows = {row["name"]: row for row in entry["parameters"]}
        return {key: looked_at(value, rows[key], f"{name}: {key}") for key, value in bound.items()}

    def function(self, name: str, body: Callable[..., Any], drop: int = 0) -> Callable[..., Any]:
        """A function of an extension; `body` takes its arguments in their order."""
        return lambda *args, **named: body(*self.bind(name, args, named).values())


def norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normalised rows and 1 / rms of each."""
    return rms_norm(x, weight, eps), torch.rsqrt(x.float().square().mean(-1) + eps)


def norm_backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> list[Tensor]:
    """Both gradients in the format of what they are gradients of."""
    assert rstd.dtype == torch.float32 and rstd.dim() == 1
    assert torch.allclose(rstd, norm_forward(x, weight, 1e-5)[1])
    dx, dweight = rms_norm_backward(dy, x, weight, 1e-5)
    return [dx, dweight.to(weight.dtype)]


def multi_tensor_adam(
    chunk: int, noop: Tensor, lists: Any, lr: float, beta1: float, beta2: float, eps: float, step: int, mode: int,
    bias_correction: int, decay: float,
) -> None:  # fmt: skip
    """AdamW (mode 1) with bias correction, in place; `step` counts from 1."""
    assert (mode, bias_correction, noop.dtype) == (1, 1, torch.int32) and step >= 1 and chunk > 0
    grads, *rest = lists
    steps = [torch.tensor(float(step - 1)) for _ in grads]
    config = OptimizerConfig(beta1=beta1, beta2=beta2, eps=eps)
    adamw_step([rest[0], [g.clone() for g in grads], *rest[1:], steps], config, lr, decay, None)


def multi_tensor_l2norm(chunk: int, noop: Tensor, lists: Any, per_tensor: bool) -> tuple[Tensor, None]:
    """The norm over all."""
    assert per_tensor is False and noop.dtype == torch.int32 and all(x.numel() for x in lists[0])
    return sum_of_squares([x.float() for x in lists[0]]).sqrt().float().view(1), None


class Attention:
    """Transformer Engine's class, for the two ways in which it is called."""

    def __init__(self, package: Package, args: Any, named: Any) -> None:
        self._package, self.made = package, package.bind(f"{TE}.DotProductAttention", args, named)

    def __call__(self, *args: Any, **named: Any) -> Tensor:
        given = self.made | self._package.bind(f"{TE}.DotProductAttention.forward", args, named)
        q, k, v = (given[f"{name}_layer"] for name in ("query", "key", "value"))
        assert (q.shape[-2], k.shape[-2]) == (given["num_attention_heads"], given["num_gqa_groups"])
        if given["qkv_format"] == "bshd":
            assert given["attn_mask_type"] == "causal" + "_bottom_right" * (q.shape[1] < k.shape[1])
            return last_rows(q, k, v).flatten(2)
        fewer, (ends, key_ends) = len(q) < len(k), (given[f"cu_seqlens_{name}"] for name in ("q", "kv"))
        mask = "padding_causal" + "_bottom_right" * (given["max_seqlen_q"] < given["max_seqlen_kv"])
        assert (given["qkv_format"], given["attn_mask_type"], q.dim()) == ("thd", mask, 3)
        assert (ends is key_ends or fewer) and {ends.dtype, key_ends.dtype} == {torch.int32}
        for cut, x, most in ((ends, q, "max_seqlen_q"), (key_ends, k, "max_seqlen_kv")):
            assert cut[0] == 0 and cut[-1] == len(x) and int(cut.diff().max()) <= given[most]
        return by_documents(q, k, v, ends, key_ends).flatten(1)


def last_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of queries that are the last rows of the keys."""
    front = q.new_zeros(q.shape[0], k.shape[1] - q.shape[1], *q.shape[2:])
    return plain_attention(torch.cat([front, q], 1), k, v)[:, front.shape[1] :]


def by_documents(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, key_ends: Tensor) -> Tensor:
    """The same of packed documents [tokens, heads, d]."""
    cuts = [cut.diff().tolist() for cut in (ends, key_ends, key_ends)]
    parts = zip(*(x.split(cut) for x, cut in zip((q, k, v), cuts, strict=True)), strict=True)
    return torch.cat([last_rows(*(x[None] for x in one))[0] for one in parts])


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Quantizer:
    """Float8CurrentScalingQuantizer: a scale from the largest element, and a cast that saturates."""

    def __init__(self, package: Package, args: Any, named: Any) -> None:
        name = f"{TE}.tensor.float8_tensor.Float8CurrentScalingQuantizer"
        given = package.bind(name, args, named)
        assert given["force_pow_2_scales"] and given["device"].type == "cuda"
        self._package, self._name = package, name
        self._dtype = {"kFloat8E4M3": E4M3, "kFloat8E5M2": E5M2}[given["fp8_dtype"].name]
        self._columns = given["columnwise"]
        if "amax" in package.facts["a quantizer keeps"]:
            self.amax = torch.empty(1)

    def __call__(self, *args: Any) -> SimpleNamespace:
        (x,) = self._package.bind(f"{self._name}.__call__", args, {}).values()
        largest, most = x.abs().max().float(), torch.finfo(self._dtype).max
        if hasattr(self, "amax"):
            self.amax.copy_(largest)
        finite = bool(largest.isfinite()) and float(largest) > 0
        scale = 2.0 ** torch.floor(torch.log2(most / largest)) if finite else torch.tensor(1.0)
        values = (x.float() * scale).clamp(-most, most).to(self._dtype)  # an infinity becomes the largest number
        made = dict.fromkeys(self._package.facts["a product reads of a quantized tensor"])
        assert made.keys() >= {"_data", "_transpose", "_scale_inv"}
        made |= {"_data": values, "_transpose": values.t().contiguous() if self._columns else None}
        return SimpleNamespace(**made | {"_scale_inv": (1 / scale).view(1), "kind": self._dtype})


def operand(tensor: Any, by_columns: bool) -> Tensor:
    """The values of an operand; Hopper reads fp8 along the sum alone."""
    if isinstance(tensor, Tensor):
        return tensor.float()
    data = tensor._transpose.t() if by_columns else tensor._data
    return data.float() * tensor._scale_inv


def general_gemm(package: Package, args: Any, named: Any) -> tuple[Any, ...]:
    """out = B op A, for cuBLAS counts columns first."""
    given = {"layout": "TN", "accumulate": False, "out": None, "use_split_accumulator": False, "grad": False}
    given |= package.bind(f"{TE}.cpp_extensions.general_gemm", args, named)
    (a_turned, b_turned), a, b = given["layout"], given["A"], given["B"]
    if not isinstance(a, Tensor):  # gradients are E5M2, and added in full
        kind = E5M2 if given["grad"] else E4M3
        assert (a.kind, b.kind, given["use_split_accumulator"]) == (E4M3, kind, given["grad"])
    a, b = operand(a, a_turned == "N"), operand(b, b_turned == "T")
    result = ((b.t() if b_turned == "T" else b) @ (a.t() if a_turned == "T" else a)).to(given["out_dtype"])
    if (out := given["out"]) is not None:
        out.copy_(out + result if given["accumulate"] else result)
    return (result if out is None else out), None, None, None


def modules_of(package: Package) -> dict[str, dict[str, Any]]:
    """Module -> its members, of either package."""
    bodies: dict[str, Callable[..., Any]] = {
        f"{TEX}.rmsnorm_fwd": lambda x, w, eps, *rest: [(y := norm_forward(x, w, eps))[0], None, y[1]],
        f"{TEX}.rmsnorm_bwd": lambda dy, x, rstd, w, *rest: norm_backward(dy, x, rstd, w),
        f"{TEX}.swiglu": lambda x, q: swiglu(x),
        f"{TEX}.dswiglu": lambda grad, x, q: swiglu_backward(grad.clone(), x),
        "fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32": lambda x, dy, w: w.add_(dy.float().t() @ x.float()),
        "fused_layer_norm_cuda.rms_forward_affine": lambda x, shape, w, eps: norm_forward(x, w, eps),
        "fused_layer_norm_cuda.rms_backward_affine": lambda dy, r, x, s, w, eps, less: norm_backward(dy, x, r, w),
    }
    for module in (TEX, "amp_C"):
        bodies |= {
            f"{module}.multi_tensor_adam": multi_tensor_adam,
            f"{module}.multi_tensor_l2norm": multi_tensor_l2norm,
        }
    members: dict[str, dict[str, Any]] = {}
    for name, body in bodies.items():
        if name in package.facts:
            module, _, short = name.rpartition(".")
            members.setdefault(module, {})[short] = package.function(name, body)
    if TEX in members:
        codes = {"bfloat16": "kBFloat16", "half": "kFloat16", "float32": "kFloat32"}
        known = {getattr(torch, name): name for name in package.facts[f"{TE}.constants.TE_DType"]}
        kinds = {dtype: getattr(package.formats, codes[name]) for dtype, name in known.items() if name in codes}
        members[TEX]["DType"] = package.formats
        members[TE] = {"DotProductAttention": lambda *args, **named: Attention(package, args, named)}
        members[f"{TE}.constants"] = {"TE_DType": kinds}
        members[f"{TE}.cpp_extensions"] = {"general_gemm": lambda *args, **named: general_gemm(package, args, named)}
        quantizer = {"Float8CurrentScalingQuantizer": lambda *args, **named: Quantizer(package, args, named)}
        members[f"{TE}.tensor.float8_tensor"] = quantizer
    return members


def install(monkeypatch: pytest.MonkeyPatch, label: str, capability: tuple[int, int] = (9, 0)) -> Package:
    """As if that version were there, on such a GPU."""
    package = Package(label)
    for name, members in modules_of(package).items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    there = "transformer_engine" if TEX in sys.modules and label.startswith("t") else "apex"
    own = {there, "apex.optimizers", *modules_of(package)}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name in own else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return package
