"""AdamW (Loshchilov & Hutter 2019) on flat shards, fused where the device has a fused kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megallama.config.schema import OptimizerConfig
from megallama.kernels.candidate import APEX, TE, Operation, Target, apex_module, random, require_close, te_module

AdamWStep = Callable[..., None]  # the arguments of `adamw_step`


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


def _multi_tensor_adam(kernel: Callable[..., None]) -> AdamWStep:
    """The kernel that Transformer Engine and apex share."""

    def step(
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
        if divisor is not None:
            torch._foreach_div_(list(grads), divisor)
        torch._foreach_add_(list(steps), 1)
        lists = [list(grads), list(masters), list(exp_avgs), list(exp_avg_sqs)]
        noop = torch.zeros(1, dtype=torch.int32, device=masters[0].device)
        count = int(steps[0])
        # chunk size, noop flag, tensors, lr, betas, eps, step, AdamW mode, bias correction, decay
        kernel(65536, noop, lists, lr, config.beta1, config.beta2, config.eps, count, 1, 1, weight_decay)

    return step


def check_adam(step: AdamWStep, target: Target) -> None:
    """Three steps beside torch's."""
    results = []
    for one in (step, adamw_step):
        master, grad = (random(replace(target, dtype=torch.float32), 1000, seed=i) for i in range(2))
        state = [torch.zeros_like(master), torch.zeros_like(master), torch.zeros((), device=target.device)]
        for _ in range(3):
            divisor = torch.tensor(2.0, device=target.device)
            one([master], [grad.clone()], [state[0]], [state[1]], [state[2]], OptimizerConfig(), 1e-2, 0.1, divisor)
        results.append((master, *state))
    for name, result, expected in zip(("weights", "first moment", "second moment", "step"), *results, strict=True):
        require_close(name, result, expected, 1e-5)


ADAMW = Operation(
    [
        (TE, lambda target: _multi_tensor_adam(te_module(target).multi_tensor_adam)),
        (APEX, lambda target: _multi_tensor_adam(apex_module(target, "amp_C").multi_tensor_adam)),
    ],
    ("torch fused", lambda target: adamw_step),
    check_adam,
)
