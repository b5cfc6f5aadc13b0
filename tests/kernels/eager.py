"""torch's own pointwise operations, with which others are compared."""

from __future__ import annotations

from megallama.kernels.pointwise import (
    PointwiseOps,
    apply_rope,
    rms_norm,
    rms_norm_backward,
    rope_backward,
    softmax_,
    softmax_gradient_,
    swiglu,
    swiglu_backward,
)

EAGER = PointwiseOps(
    *(rms_norm, rms_norm_backward, swiglu, swiglu_backward),
    *(apply_rope, rope_backward, softmax_, softmax_gradient_),
)
