"""The sum of squares of gradients, in which nothing is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megallama.kernels.candidate import APEX, TE, Operation, Target, require_close
from megallama.kernels.dtypes import accumulate_dtype

SumOfSquares = Callable[[Sequence[Tensor]], Tensor]


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares of all elements, float64: norms of short runs first, so nothing is lost in fp32."""
    norms = []
    for x in tensors:
        whole = x.numel() // 4096 * 4096
        norms.append(torch.linalg.vector_norm(x[:whole].view(-1, 4096), dim=1))
        norms.append(torch.linalg.vector_norm(x[whole:]).view(1))
    device = tensors[0].device if tensors else None
    return torch.cat(norms).double().square().sum() if norms else torch.zeros((), dtype=torch.float64, device=device)


def _multi_tensor_sum(kernel: Callable[..., Any]) -> SumOfSquares:
    """The multi-tensor norm that Transformer Engine and apex share, squared."""

    def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
        held = [x for x in tensors if x.numel()]
        if not held:
            return torch.zeros((), dtype=torch.float64)
        noop = torch.zeros(1, dtype=torch.int32, device=held[0].device)
        norm: Tensor = kernel(65536, noop, [held], False)[0]  # chunk size, noop flag, tensors, norms of each
        return norm.double().square().sum()

    return sum_of_squares


def check_sum_of_squares(sum_of_squares: SumOfSquares, target: Target) -> None:
    """Over tensors of several lengths, one of them empty, with more equal terms than a plain fp32 sum bears."""
    runs, acc_dtype = ((0.1, 700_001), (0.2, 0), (0.3, 17)), accumulate_dtype(target.dtype)
    tensors = [torch.full((n,), value, dtype=acc_dtype, device=target.device) for value, n in runs]
    want = sum(float(t.double().square().sum()) for t in tensors)
    require_close("sum of squares", sum_of_squares(tensors), torch.tensor(want), 1e-5)


GRAD_NORM = Operation(
    [
        (TE, lambda target: _multi_tensor_sum(target.te_module().multi_tensor_l2norm)),
        (APEX, lambda target: _multi_tensor_sum(target.apex_module("amp_C").multi_tensor_l2norm)),
    ],
    ("torch", lambda target: sum_of_squares),
    check_sum_of_squares,
)
