"""The pointwise operations of a layer, as one value that layers are handed: each may be another implementation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megallama.kernels.cross_entropy import Softmax
from megallama.kernels.rope import ApplyRope


@dataclass(frozen=True)
class PointwiseOps:
    """Pairs of forward and backward that keep nothing but their input, as the layers' backward wants them."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rms_norm_backward: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    swiglu: Callable[[Tensor], Tensor]
    swiglu_backward: Callable[[Tensor, Tensor], Tensor]
    apply_rope: ApplyRope
    softmax_: Softmax
