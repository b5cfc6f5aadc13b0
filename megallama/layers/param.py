"""Parameters: views into one flat weight buffer and one flat fp32 gradient buffer per stage.

Gradients of weights never pass through autograd.  The hand-written backward functions hand each
weight gradient to its `Param`, which adds it into `main_grad` at once; the last contribution of a
step tells the gradient synchronisation that the parameter is ready.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megallama.comm.group import Handle
from megallama.kernels.candidate import accumulate_dtype
from megallama.kernels.gemm import Gemms
from megallama.kernels.select import Kernels
from megallama.plan.layout import BufferLayout
from megallama.plan.params import ParamSpec


class Gather:
    """The parameter all-gather of one bucket; every parameter of the bucket holds the same one."""

    def __init__(self) -> None:
        self._handle: Handle | None = None

    def start(self, handle: Handle) -> None:
        """Remember the gather under way."""
        self._handle = handle

    def wait(self) -> None:
        """Return when the bucket's weights are whole."""
        if self._handle is not None:
            self._handle.wait()
            self._handle = None


@dataclass
class WeightGradQueue:
    """Weight gradients put off: `begin` to `end` queues GEMMs, `run` computes a micro-batch's.

    A schedule that splits the backward (zero bubble) runs the input-gradient half between them.
    The queue keeps the two operands of every GEMM alive.
    """

    groups: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    open: list[Callable[[], None]] | None = None  # of the micro-batch whose GEMMs are put off now

    def begin(self, microbatch: int) -> None:
        """Put the weight gradients of this micro-batch off until `end`."""
        self.open = self.groups[microbatch] = []

    def end(self) -> None:
        """Compute weight gradients at once again."""
        self.open = None

    def run(self, microbatch: int) -> None:
        """Compute what was put off for this micro-batch."""
        with torch.no_grad():  # queued operands still remember that they were part of a graph
            for work in self.groups.pop(microbatch):
                work()


class Param:
    """One local weight with its fp32 gradient."""

    def __init__(
        self, spec: ParamSpec, weight: Tensor, main_grad: Tensor, gather: Gather, queue: WeightGradQueue, gemms: Gemms
    ) -> None:
        self.spec = spec
        self.data = weight
        self.main_grad = main_grad
        self.overwrite = True  # main_grad holds nothing of this step yet
        self.on_grad_done: Callable[[Param], None] | None = None
        self._gather = gather
        self._queue = queue
        self._gemms = gemms

    @property
    def weight(self) -> Tensor:
        """The weight, once its all-gather has ended."""
        self._gather.wait()
        return self.data

    def fprop(self, x: Tensor) -> Tensor:
        """x [T, in] @ weight.T -> [T, out]."""
        return self._gemms.fprop(x, self.weight)

    def dgrad(self, dy: Tensor) -> Tensor:
        """dy [T, out] @ weight -> [T, in]."""
        return self._gemms.dgrad(dy, self.weight)

    def wgrad(self, dy: Tensor, x: Tensor) -> None:
        """main_grad += dy [T, out].T @ x [T, in], now or when the queue runs."""
        if self._queue.open is None:
            self._add_now(dy, x)
        else:
            self._queue.open.append(lambda: self._add_now(dy, x))

    def _add_now(self, dy: Tensor, x: Tensor) -> None:
        self.accumulate_wgrad(dy, x)
        self.grad_done()

    def accumulate_wgrad(self, dy: Tensor, x: Tensor) -> None:
        """main_grad += dy.T @ x, one of several pieces: call `grad_done` after the last."""
        self._gemms.wgrad(self.main_grad, dy, x, self.overwrite)
        self.overwrite = False

    def add_grad(self, grad: Tensor) -> None:
        """main_grad += grad."""
        if self.overwrite:
            self.main_grad.copy_(grad)
        else:
            self.main_grad.add_(grad)
        self.overwrite = False
        self.grad_done()

    def add_rows(self, rows: Tensor, grad: Tensor) -> None:
        """main_grad[rows] += grad, repeated rows included."""
        if self.overwrite:
            self.main_grad.zero_()
        self.main_grad.index_add_(0, rows, grad.to(self.main_grad.dtype))
        self.overwrite = False
        self.grad_done()

    def grad_done(self) -> None:
        """Tell the synchronisation that one use of this parameter has been accounted for."""
        if self.on_grad_done is not None:
            self.on_grad_done(self)


class FlatBuffers:
    """Weights and main gradients of one stage, laid out by the plan."""

    def __init__(self, layout: BufferLayout, dtype: torch.dtype, device: torch.device, kernels: Kernels) -> None:
        self.layout = layout
        self.weights = torch.zeros(layout.numel, dtype=dtype, device=device)
        self.grads = torch.zeros(layout.numel, dtype=accumulate_dtype(dtype), device=device)
        self.queue = WeightGradQueue()
        self.gathers = tuple(Gather() for _ in layout.buckets)
        self.params: dict[str, Param] = {}
        for bucket, gather in zip(layout.buckets, self.gathers, strict=True):
            for placement in bucket.params:
                spec = placement.spec
                at = slice(placement.offset, placement.offset + spec.numel)
                weight, grad = self.weights[at].view(spec.shape), self.grads[at].view(spec.shape)
                gemms = kernels.layer_gemms if spec.name.startswith("layers.") else kernels.gemms
                self.params[spec.name] = Param(spec, weight, grad, gather, self.queue, gemms)

    def start_step(self) -> None:
        """Forget last step's gradients."""
        for param in self.params.values():
            param.overwrite = True
