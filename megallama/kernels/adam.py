"""AdamW (Loshchilov & Hutter 2019) on flat shards, fused where the device has a fused kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megallama.config.schema import OptimizerConfig
from megallama.kernels.candidate import APEX, TE, Operation, Target, require_close

Lists = Sequence[list[Tensor]]  # masters, gradients, first moments, second moments, step counts
AdamWStep = Callable[[Lists, OptimizerConfig, float, float, Tensor | None], None]  # with lr, decay, divisor


def adamw_step(lists: Lists, config: OptimizerConfig, lr: float, decay: float, divisor: Tensor | None) -> None:
    """One step of torch's fused AdamW, in place; step counts are incremented.

    Gradients are divided by `divisor` on the way (clipping and loss scale in the same pass).
    """
    masters, grads, exp_avgs, exp_avg_sqs, steps = lists
    if divisor is not None and divisor.dtype == torch.float64:  # the fused kernel takes an fp32 divisor only
        torch._foreach_div_(grads, divisor)
        divisor = None
    adamw(
        masters, grads, exp_avgs, exp_avg_sqs, [], steps,
        fused=True, grad_scale=divisor, amsgrad=False, maximize=False, has_complex=False,
        beta1=config.beta1, beta2=config.beta2, eps=config.eps, lr=lr, weight_decay=decay,
    )  # fmt: skip


def _multi_tensor_adam(kernel: Callable[..., None]) -> AdamWStep:
    """The kernel that Transformer Engine and apex share."""

    def step(lists: Lists, config: OptimizerConfig, lr: float, decay: float, divisor: Tensor | None) -> None:
        masters, grads, exp_avgs, exp_avg_sqs, steps = lists
        if divisor is not None:
            torch._foreach_div_(grads, divisor)
        torch._foreach_add_(steps, 1)
        noop = torch.zeros(1, dtype=torch.int32, device=masters[0].device)
        # chunk size, noop flag, tensors, lr, betas, eps, step, AdamW mode, bias correction, decay
        kernel(65536, noop, [grads, masters, exp_avgs, exp_avg_sqs], lr, config.beta1, config.beta2, config.eps,
               int(steps[0]), 1, 1, decay)  # fmt: skip

    return step


def check_adam(step: AdamWStep, target: Target) -> None:
    """Three steps beside torch's."""
    results = []
    for one in (step, adamw_step):
        master, grad = (replace(target, dtype=torch.float32).random(1000, seed=i) for i in range(2))
        state = [torch.zeros_like(master), torch.zeros_like(master), torch.zeros((), device=target.device)]
        for _ in range(3):
            divisor = torch.tensor(2.0, device=target.device)
            lists = [[t] for t in (master, grad.clone(), *state)]
            one(lists, OptimizerConfig(), 1e-2, 0.1, divisor)
        results.append((master, *state))
    for name, result, expected in zip(("weights", "first moment", "second moment", "step"), *results, strict=True):
        require_close(name, result, expected, 1e-5)


ADAMW = Operation(
    [
        (TE, lambda target: _multi_tensor_adam(target.te_module().multi_tensor_adam)),
        (APEX, lambda target: _multi_tensor_adam(target.apex_module("amp_C").multi_tensor_adam)),
    ],
    ("torch fused", lambda target: adamw_step),
    check_adam,
)
