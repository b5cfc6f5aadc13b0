"""The interpreter of pipeline schedules: a handler per kind of action, one path for all schedules.

Sends and receives are posted where the schedule says and awaited where their value is needed.  A forward keeps the
edge of its autograd graph, not its output, so an output is freed once it has been sent.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megallama.comm.flight_record import FlightRecord
from megallama.comm.group import Group, Handle
from megallama.kernels.candidate import accumulate_dtype
from megallama.layers.batch import MicroBatch
from megallama.layers.param import WeightGradQueue
from megallama.plan.schedule import RECVS, SENDS, Action, Kind, Schedule

StageCall = Callable[[Tensor | None, MicroBatch], Tensor]  # -> hidden states or loss sum


class Observer:
    """Is told of a pipeline's actions; remembers the present one, and tells the record."""

    action: Action | None = None  # None outside, and in the wait for the last sends

    def __init__(self, record: FlightRecord | None = None) -> None:
        self.record = record or FlightRecord()

    def started(self, action: Action | None) -> None:
        """It begins; None stands for the wait for the last sends."""
        self.action = action
        self.record.action(*(action or ("last sends",)))

    def arrived(self) -> None:
        """What it waited for has come from another rank."""

    def ended(self) -> None:
        self.action = None
        self.record.action("")


@dataclass(frozen=True)
class StageWork:
    """A stage and what its backward feeds."""

    stage: StageCall
    queue: WeightGradQueue
    last_gradients: Callable[[], AbstractContextManager[None]]  # around actions that form them


class PipelineRuntime:
    """Runs the schedule of one pipeline rank over one batch.

    Between stages a micro-batch of T tokens passes as [T / shares, h] like `hidden` [0, h]; `longest`: sample, at most.
    """

    def __init__(
        self, work: Mapping[int, StageWork], pp: Group, hidden: Tensor, record: FlightRecord | None = None, *,
        shares: int, longest: int,
    ) -> None:  # fmt: skip
        self._work, self._pp, self._hidden, self.observer = work, pp, hidden, Observer(record)
        self._shares, self._longest = shares, longest
        # torch makes a 1 itself, by one kernel more; where it is given one it imports a compiler, 30 MiB
        dtype = accumulate_dtype(hidden.dtype)
        self._one = torch.ones((), dtype=dtype, device=hidden.device) if hidden.is_cuda else None
        self._handlers: dict[Kind, Callable[[Action], None]] = {
            Kind.F: self._forward,
            Kind.B: self._differentiate,
            Kind.I: self._input_grad,
            Kind.W: lambda action: self._work[action.stage].queue.run(action.microbatch),
            **dict.fromkeys(SENDS, self._send),
            **dict.fromkeys(RECVS, self._recv),
        }

    def run(self, schedule: Schedule, inputs: Sequence[MicroBatch]) -> Tensor:
        """Execute this rank's actions; the sum of token losses (zero without the last stage).

        Raises: ValueError, before anything is sent, if a micro-batch is too long or does not divide.
        """
        for shape in (batch.tokens.shape for batch in inputs):
            if shape[1] > self._longest or shape.numel() % self._shares:
                samples, most = f"{shape[0]} samples of {shape[1]} tokens", f"at most {self._longest} each"
                raise ValueError(f"{samples}: give {most}, in all a multiple of {self._shares}")
        self._schedule, self._inputs = schedule, inputs
        # by who takes it (F or B, stage, micro-batch); a handle if received
        self._values: dict[tuple[Kind, int, int], tuple[Tensor, Handle | None]] = {}
        self._graphs: dict[tuple[int, int], tuple[Tensor | None, GradientEdge]] = {}
        self._sends: list[Handle] = []
        self._loss: Tensor = torch.zeros((), dtype=torch.float64, device=self._hidden.device)
        actions = schedule.steps[self._pp.rank]
        last = _last_gradients(actions)
        for index, action in enumerate(actions):
            self.observer.started(action)
            with self._work[action.stage].last_gradients() if index in last else nullcontext():
                self._handlers[action.kind](action)
            self.observer.ended()
            self._sends = [send for send in self._sends if not send.done()]
        self.observer.started(None)
        for send in self._sends:
            send.wait()
        self.observer.ended()
        return self._loss

    def _forward(self, action: Action) -> None:
        stage = self._work[action.stage].stage
        x = self._take(Kind.F, action) if action.stage > 0 else None
        train = torch.is_grad_enabled()
        if x is not None and train:
            x.requires_grad_()
        out = stage(x, self._inputs[action.microbatch])
        if action.stage == self._schedule.num_stages - 1:
            self._loss += out.detach()
        else:
            self._values[Kind.F, action.stage + 1, action.microbatch] = out.detach(), None
        if train:
            self._graphs[action.stage, action.microbatch] = (x, get_gradient_edge(out))

    def _input_grad(self, action: Action) -> None:
        with self._work[action.stage].queue.put_off(action.microbatch):
            self._differentiate(action)

    def _differentiate(self, action: Action) -> None:
        x, edge = self._graphs.pop((action.stage, action.microbatch))
        last = action.stage == self._schedule.num_stages - 1
        grad = self._one if last else self._take(Kind.B, action)
        torch.autograd.backward((edge,), (grad,))
        if x is not None:
            assert x.grad is not None
            self._values[Kind.B, action.stage - 1, action.microbatch] = x.grad, None
            x.grad = None

    def _take(self, kind: Kind, action: Action) -> Tensor:
        """The value from the neighbouring stage: received, or left by it on this rank."""
        value, handle = self._values.pop((kind, action.stage, action.microbatch))
        if handle is not None:
            handle.wait()
            self.observer.arrived()
        return value

    def _send(self, action: Action) -> None:
        kind, to = (Kind.F, action.stage + 1) if action.kind is Kind.SEND_F else (Kind.B, action.stage - 1)
        value, _ = self._values.pop((kind, to, action.microbatch))
        self._sends.append(self._pp.send(value.contiguous(), self._schedule.owners[to]))

    def _recv(self, action: Action) -> None:
        kind, source = (Kind.F, action.stage - 1) if action.kind is Kind.RECV_F else (Kind.B, action.stage + 1)
        rows = self._inputs[action.microbatch].tokens.numel() // self._shares
        buffer = self._hidden.new_empty(rows, self._hidden.shape[1])
        handle = self._pp.recv(buffer, self._schedule.owners[source])
        self._values[kind, action.stage, action.microbatch] = buffer, handle


def _last_gradients(actions: Sequence[Action]) -> frozenset[int]:
    """Positions in which the last gradients of a stage's parameters are formed.

    The last B or W has those of the large weights, the last B or I the others.  A B before that W is left out, for it
    would also announce the weights: the others are then reduced at the end of the step.
    """
    weights = {a.stage: i for i, a in enumerate(actions) if a.kind in (Kind.B, Kind.W)}
    others = {a.stage: i for i, a in enumerate(actions) if a.kind in (Kind.B, Kind.I)}
    return frozenset({*weights.values(), *(i for i in others.values() if actions[i].kind is Kind.I)})


def end_alike(schedules: Sequence[Schedule], rank: int) -> bool:
    """Whether all these schedules complete the gradients of a pipeline rank's stages in one order.

    Ranks that reduce their gradients together must reduce them in one order.
    """
    rows = [schedule.steps[rank] for schedule in schedules]
    orders = [[row[i][:2] for i in sorted(_last_gradients(row))] for row in rows] if len(rows) > 1 else []
    return all(order == orders[0] for order in orders)
