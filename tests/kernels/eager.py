"""torch's own pointwise operations, with which others are compared."""

from __future__ import annotations

from megallama.kernels.cross_entropy import softmax_
from megallama.kernels.norm import rms_norm, rms_norm_backward
from megallama.kernels.pointwise import PointwiseOps
from megallama.kernels.rope import apply_rope
from megallama.kernels.swiglu import swiglu, swiglu_backward

EAGER = PointwiseOps(rms_norm, rms_norm_backward, swiglu, swiglu_backward, apply_rope, softmax_)
