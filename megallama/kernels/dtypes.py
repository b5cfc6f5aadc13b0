"""Number formats."""

from __future__ import annotations

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The format in which sums over `dtype` are formed: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
