"""AdamW (Loshchilov & Hutter 2019) on flat shards, fused where the device has a fused kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megallama.config.schema import OptimizerConfig

AdamWStep = Callable[..., None]  # the arguments of `adamw_step`
SumOfSquares = Callable[[Sequence[Tensor]], Tensor]


def adamw_step(
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
    """One step of torch's fused AdamW, in place; `steps` are incremented.

    Gradients are divided by `divisor` on the way (clipping and loss scale in the same pass).
    """
    if divisor is not None and divisor.dtype == torch.float64:  # the fused kernel takes an fp32 divisor only
        torch._foreach_div_(list(grads), divisor)
        divisor = None
    adamw(
        list(masters), list(grads), list(exp_avgs), list(exp_avg_sqs), [], list(steps),
        fused=True, grad_scale=divisor, amsgrad=False, maximize=False, has_complex=False,
        beta1=config.beta1, beta2=config.beta2, eps=config.eps, lr=lr, weight_decay=weight_decay,
    )  # fmt: skip


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares of all elements, float64: norms of short runs first, so nothing is lost in fp32."""
    norms = []
    for x in tensors:
        whole = x.numel() // 4096 * 4096
        norms.append(torch.linalg.vector_norm(x[:whole].view(-1, 4096), dim=1))
        norms.append(torch.linalg.vector_norm(x[whole:]).view(1))
    device = tensors[0].device if tensors else None
    return torch.cat(norms).double().square().sum() if norms else torch.zeros((), dtype=torch.float64, device=device)
