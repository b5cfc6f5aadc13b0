"""RMSNorm over the residual stream: replicated over tp, or on sequence shards under sequence parallelism.

Under sequence parallelism every rank normalises its own rows, so the weight's gradient is a partial
sum; its `ParamSpec` says so (``sum_over="tp"``) and the gradient synchronisation adds the parts.
"""

from __future__ import annotations

from torch import Tensor

from megallama.kernels.pointwise import PointwiseOps
from megallama.layers.param import Param


class RMSNorm:
    """x / rms(x) * weight. Nothing is kept: all of it can be made again from the input."""

    def __init__(self, param: Param, eps: float, pointwise: PointwiseOps) -> None:
        self.param = param
        self.eps = eps
        self._pointwise = pointwise

    def forward(self, x: Tensor) -> Tensor:
        """[T, h] -> the normalised rows, the same bits on every call."""
        return self._pointwise.rms_norm(x, self.param.weight, self.eps)

    def backward(self, dy: Tensor, x: Tensor) -> Tensor:
        """Gradient of x; the weight's goes into main_grad."""
        dx, dweight = self._pointwise.rms_norm_backward(dy, x, self.param.weight, self.eps)
        self.param.add_grad(dweight)
        return dx
