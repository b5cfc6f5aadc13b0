"""torch's own pointwise operations, with which others are compared."""

from __future__ import annotations

from megallama.kernels.pointwise import (
    SWIGLUS,
    PointwiseOps,
    add_norm,
    add_norm_backward,
    apply_rope,
    rotate_parts,
    softmax_,
    softmax_gradient_,
)

EAGER = PointwiseOps(
    *(add_norm, add_norm_backward, *SWIGLUS),
    *(apply_rope, rotate_parts, softmax_, softmax_gradient_),
)
