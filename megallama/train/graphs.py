"""CUDA graphs: the kernels of a micro-batch, forward and backward, recorded once and then started by one call.

A recorded kernel reads and writes the addresses it was recorded with, and no Python runs when it is started again.
So the micro-batch is copied into tensors that stay, and what Python decides must be the same every time: weights are
whole before, nobody waits to hear of gradients, and of the two ways to write a gradient each has a recording, for the
first micro-batch of a step overwrites the main gradients and the others add to them.

The micro-batches before a recording run as they are, on the stream that will record, so that whatever is set up on
first use is set up by then.  Both recordings draw on one memory pool: nothing in it outlives a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from megallama.layers.param import FlatBuffers
from megallama.model.llama import StageInput
from megallama.pipeline.runtime import StageCall

WARM_UPS = 3  # micro-batches of each kind before theirs is recorded

Work = Callable[[], None]


class Recorder(Protocol):
    """Records the kernels that a function starts."""

    def warm_up(self, work: Work) -> None:
        """Run `work` where it will be recorded."""

    def record(self, work: Work) -> Work:
        """Record `work`, whose kernels do not run meanwhile; the result starts them."""


class CudaRecorder:
    """torch's CUDA graphs, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None

    def warm_up(self, work: Work) -> None:
        outside = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            work()
        outside.wait_stream(self._stream)

    def record(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # threads of the loader and of checkpoints go on meanwhile: what they ask of CUDA is no fault of this one
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        self._pool = graph.pool()
        return graph.replay


class GraphedMicroBatch:
    """A whole micro-batch of the one stage of a rank without pipeline: its loss sum, its gradients added.

    `announces`: the last micro-batch of a step tells the gradient synchronisation of every gradient as it is formed,
    so that reductions start under the backward; that takes Python, so this one is never recorded.
    """

    def __init__(self, stage: StageCall, buffers: FlatBuffers, recorder: Recorder, *, announces: bool) -> None:
        self._stage, self._buffers, self._recorder = stage, buffers, recorder
        self._announces = announces
        self._inputs: StageInput | None = None
        self._loss = torch.zeros((), dtype=buffers.grads.dtype, device=buffers.grads.device)
        self._runs: dict[bool, int] = {}
        self._graphs: dict[bool, Work] = {}

    def takes(self, *, last: bool) -> bool:
        """Whether this micro-batch of a step is run here, and not action by action."""
        return not (last and self._announces)

    def run(self, batch: StageInput) -> Tensor:
        """Forward and backward; the loss sum, to be read before the next call."""
        params = self._buffers.params.values()
        fresh = all(p.fresh for p in params)
        for gather in self._buffers.gathers:
            gather.wait()
        inputs = self._filled(batch)
        work = partial(self._work, inputs)
        self._runs[fresh] = self._runs.get(fresh, 0) + 1
        if self._runs[fresh] <= WARM_UPS:
            self._recorder.warm_up(work)
            return self._loss
        if fresh not in self._graphs:
            self._graphs[fresh] = self._recorder.record(work)
        self._graphs[fresh]()
        for param in params:
            param.fresh = False
        return self._loss

    def _filled(self, batch: StageInput) -> StageInput:
        """The inputs that stay, with the values of this micro-batch."""
        assert batch.mask is None and batch.documents is None, "shapes and masks of recorded micro-batches are fixed"
        if self._inputs is None:
            scale = torch.zeros_like(self._loss)
            self._inputs = replace(
                batch, tokens=torch.empty_like(batch.tokens), labels=torch.empty_like(batch.labels), grad_scale=scale
            )
        mine = self._inputs
        assert isinstance(mine.grad_scale, Tensor)
        mine.tokens.copy_(batch.tokens)
        mine.labels.copy_(batch.labels)
        mine.grad_scale.fill_(batch.grad_scale)
        return mine

    def _work(self, inputs: StageInput) -> None:
        with torch.enable_grad():
            loss = self._stage(None, inputs)
        loss.backward()
        self._loss.copy_(loss.detach())
