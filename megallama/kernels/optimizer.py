"""What the optimizer computes on shards: AdamW (Loshchilov & Hutter 2019), the gradient's norm."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megallama.config.schema import OptimizerConfig
from megallama.kernels.candidate import APEX, TE, Operation, Results, Target, accumulate_dtype

Lists = Sequence[list[Tensor]]  # masters, gradients, first moments, second moments, step counts
# with lr, decay, divisor, and the number of this step, from 1
AdamWStep = Callable[[Lists, OptimizerConfig, float, float, Tensor | None, int], None]
SumOfSquares = Callable[[Sequence[Tensor]], Tensor]
CHUNK = 65536  # elements that a block of a multi-tensor kernel works on
MOST = (1 << 31) - 1  # elements of a tensor in such a kernel, which counts them in 32 bits


def adamw_step(
    lists: Lists, config: OptimizerConfig, lr: float, decay: float, divisor: Tensor | None, number: int = 0
) -> None:
    """A step of torch's fused AdamW, in place; step counts are incremented, and read, not `number`.

    Gradients are divided by `divisor` on the way (clipping and loss scale in the same pass).
    """
    masters, grads, exp_avgs, exp_avg_sqs, steps = lists
    if divisor is not None and divisor.dtype == torch.float64:  # the kernel takes fp32
        torch._foreach_div_(grads, divisor)
        divisor = None
    values: dict[str, Any] = {"beta1": config.beta1, "beta2": config.beta2, "eps": config.eps}
    values |= {"lr": lr, "weight_decay": decay, "grad_scale": divisor, "fused": True}
    values |= {"amsgrad": False, "maximize": False, "has_complex": False}
    adamw(masters, grads, exp_avgs, exp_avg_sqs, [], steps, **values)


def _countable(tensors: Sequence[Tensor]) -> None:
    for x in tensors:
        assert x.numel() <= MOST, f"{x.numel():,} elements in one bucket, a multi-tensor kernel counts {MOST:,}"


def _multi_tensor(name: str, make: Callable[[Any], Any]) -> list[tuple[str, Callable[[Target], Any]]]:
    """Both packages' kernel of this name, made into what the operation is."""
    return [
        (TE, lambda target: make(getattr(target.te_module(), name))),
        (APEX, lambda target: make(getattr(target.apex_module("amp_C"), name))),
    ]


def _multi_tensor_adam(kernel: Callable[..., None]) -> AdamWStep:  # Transformer Engine's and apex's
    def step(
        lists: Lists, config: OptimizerConfig, lr: float, decay: float, divisor: Tensor | None, number: int
    ) -> None:
        masters, grads, exp_avgs, exp_avg_sqs, steps = lists
        _countable(masters)
        if divisor is not None:
            torch._foreach_div_(grads, divisor)
        torch._foreach_add_(steps, 1)
        noop = torch.zeros(1, dtype=torch.int32, device=masters[0].device)
        lists, adamw_mode, bias_correction = [grads, masters, exp_avgs, exp_avg_sqs], 1, 1
        values = lr, config.beta1, config.beta2, config.eps, number
        kernel(CHUNK, noop, lists, *values, adamw_mode, bias_correction, decay)

    return step


def _adam_results(step: AdamWStep, target: Target) -> Results:
    """After three steps."""
    master, grad = (target.random(1000, seed=i) for i in range(2))
    master, grad = (t.to(accumulate_dtype(t.dtype)) for t in (master, grad))
    state = [master, torch.zeros_like(master), torch.zeros_like(master), torch.zeros((), device=target.device)]
    for number in (1, 2, 3):
        divisor = torch.tensor(2.0, device=target.device)
        step([[t] for t in (master, grad.clone(), *state[1:])], OptimizerConfig(), 1e-2, 0.1, divisor, number)
    return list(zip(("weights", "first moment", "second moment", "step"), state, strict=True))


ADAMW = Operation(
    _multi_tensor("multi_tensor_adam", _multi_tensor_adam),
    ("torch fused", lambda target: adamw_step),
    _adam_results,
    (1e-5,),
)


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares, float64: norms of short runs first, so fp32 loses nothing."""
    norms = []
    for x in tensors:
        whole = x.numel() // 4096 * 4096
        norms.append(torch.linalg.vector_norm(x[:whole].view(-1, 4096), dim=1))
        norms.append(torch.linalg.vector_norm(x[whole:]).view(1))
    device = tensors[0].device if tensors else None
    return torch.cat(norms).double().square().sum() if norms else torch.zeros((), dtype=torch.float64, device=device)


def _multi_tensor_sum(kernel: Callable[..., Any]) -> SumOfSquares:
    def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
        held = [x for x in tensors if x.numel()]
        if not held:
            return torch.zeros((), dtype=torch.float64)
        _countable(held)
        noop = torch.zeros(1, dtype=torch.int32, device=held[0].device)
        norm: Tensor = kernel(CHUNK, noop, [held], False)[0]  # not also of each tensor
        return norm.double().square().sum()

    return sum_of_squares


def _norm_results(sum_of_squares: SumOfSquares, target: Target) -> Results:
    """Over several lengths, one of them 0, with more equal terms than fp32 sums bear."""
    like, runs = target.random(1), ((0.1, 700_001), (0.2, 0), (0.3, 17))
    like = like.to(accumulate_dtype(like.dtype))
    return [("sum of squares", sum_of_squares([like.new_full((n,), value) for value, n in runs]))]


GRAD_NORM = Operation(
    _multi_tensor("multi_tensor_l2norm", _multi_tensor_sum),
    ("torch", lambda target: sum_of_squares),
    _norm_results,
    (1e-5,),
)
