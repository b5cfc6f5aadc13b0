"""What layers are made of: parameters, views into one weight and one fp32 gradient buffer per stage.

Gradients of weights never pass through autograd: backwards hand them to `Param`, which adds them up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function

from megallama.comm.group import Handle
from megallama.kernels.candidate import accumulate_dtype
from megallama.kernels.gemm import Gemms
from megallama.kernels.select import Kernels
from megallama.plan.box import Box
from megallama.plan.params import BufferLayout, ParamSpec


@dataclass
class Gather:
    """The all-gather of one bucket; all its parameters hold the same one."""

    handle: Handle | None = None  # of the gather under way

    def wait(self) -> None:
        if self.handle is not None:
            self.handle.wait()
            self.handle = None


@dataclass
class WeightGradQueue:
    """Weight gradients put off, by micro-batch; each keeps both operands of its GEMM."""

    groups: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    open: list[Callable[[], None]] | None = None  # of the micro-batch whose GEMMs are put off now

    @contextmanager
    def put_off(self, microbatch: int) -> Iterator[None]:
        """Queue the weight gradients that the ``with`` block would compute."""
        self.open = self.groups[microbatch] = []
        yield
        self.open = None

    def run(self, microbatch: int) -> None:
        with torch.no_grad():  # queued operands still remember that they were part of a graph
            for work in self.groups.pop(microbatch):
                work()


@dataclass(eq=False)
class Param:
    """One local weight with its fp32 gradient."""

    spec: ParamSpec
    data: Tensor
    main_grad: Tensor
    _gather: Gather
    _queue: WeightGradQueue
    _gemms: Gemms
    overwrite: bool = True  # main_grad holds nothing of this step yet
    on_grad_done: Callable[[Param], None] | None = None

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

        def add() -> None:
            self.accumulate_wgrad(dy, x)
            self.grad_done()

        add() if self._queue.open is None else self._queue.open.append(add)

    def accumulate_wgrad(self, dy: Tensor, x: Tensor) -> None:
        """main_grad += dy.T @ x, one of several pieces: call `grad_done` after the last."""
        self._gemms.wgrad(self.main_grad, dy, x, self.overwrite)
        self.overwrite = False

    def add_rows(self, rows: Tensor, grad: Tensor) -> None:
        """main_grad[rows] += grad, repeated rows included."""
        if self.overwrite:
            self.main_grad.zero_()
        self.main_grad.index_add_(0, rows, grad.to(self.main_grad.dtype))
        self.overwrite = False
        self.grad_done()

    def grad_done(self) -> None:
        """Tell the synchronisation that a use of this parameter is accounted for."""
        if self.on_grad_done is not None:
            self.on_grad_done(self)


class _Apply(Function):
    @staticmethod
    def forward(ctx: Any, layer: Layer, *args: Any) -> Any:
        ctx.layer = layer
        return layer.forward(ctx, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, *ctx.layer.backward(ctx, *grads)


class Layer:
    """A map with its own backward: one node of autograd.

    `forward` (ctx, arguments) keeps on ctx what `backward` (ctx, gradients) reads to return one per argument, or None.
    """

    forward: Callable[..., Any]
    _function: ClassVar[Any]

    def __init_subclass__(cls) -> None:
        cls._function = type(cls.__name__, (_Apply,), {})  # a name of its own, for profiles

    def __call__(self, *args: Any) -> Any:
        return self._function.apply(self, *args)


class FlatBuffers:
    """Weights and main gradients of a stage, laid out by the plan; without `trains` one zero."""

    def __init__(
        self, layout: BufferLayout, dtype: torch.dtype, device: torch.device, kernels: Kernels, trains: bool = True
    ) -> None:
        self.layout = layout
        self.weights = torch.zeros(layout.numel, dtype=dtype, device=device)
        kept, grad_dtype = (layout.numel, accumulate_dtype(dtype)) if trains else (1, dtype)
        self.grads = torch.zeros(kept, dtype=grad_dtype, device=device).expand(layout.numel)
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


def digest(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The bits of a 1-D tensor, cast to `dtype` if given, as an int64 on its device; never waits.

    A polynomial of its 64-bit words modulo 2^64: one changed word always shows, several nearly always.
    """
    weights = torch.arange(1024, device=tensor.device) * -7046029254386353131 | 1  # odd: nothing vanishes
    total = weights.new_zeros(())
    for part in tensor.detach().split(1 << 20):
        words = part.to(dtype or tensor.dtype).view(torch.uint8)
        if words.numel() % 8192 or words.storage_offset() % 8:
            words = torch.nn.functional.pad(words, (0, -words.numel() % 8192))
        total = total * 6364136223846793005 + (words.view(torch.int64).view(-1, 1024).sum(0) * weights).sum()
    return total


@dataclass(frozen=True)
class Shard:
    """The optimizer's state of `box`, a rectangle of the Hugging Face tensor ``box.key``.

    `state` is by the name of the files: "master" (the weights), "exp_avg", "exp_avg_sq": contiguous 1-D views of the
    box's elements in row-major order, fp32 (fp64 in fp64 mode).  `digests`: as a save found them, if known.
    """

    box: Box
    state: dict[str, Tensor]
    digests: dict[str, int] = field(default_factory=dict)
