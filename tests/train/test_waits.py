"""The host waits for the device once per step: nothing within micro-batches asks a tensor for its value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megallama.pipeline.runtime import PipelineRuntime
from megallama.train.assemble import Worker
from megallama.train.signals import SIGNALS
from megallama.train.step import RankStatus, train_step
from tests.small import documents, micro_batches, on_threads, small_config, tokens

ATEN = torch.ops.aten
# what on a GPU would wait for it: a value becomes Python's (item, float, bool, int, range ends), or a shape
VALUES = (ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.equal, ATEN.unique_dim, ATEN._unique2)
INDEXED = (ATEN.index, ATEN.index_put, ATEN.index_put_)  # by a mask: a shape
METHODS = ("tolist", "cpu", "numpy", "__array__")


class Watch(TorchDispatchMode):
    """Counts values read, and raises within micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []
        self.within = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = func.overloadpacket in INDEXED and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func.overloadpacket in VALUES or masks:
            self.note(str(func))
        return func(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        assert not self.within, f"{what} within a micro-batch"
        self.read.append(what)


def watched(rank: Worker, data: Tensor, monkeypatch: pytest.MonkeyPatch, starts: Tensor | None = None) -> list[str]:
    """What a training step reads."""
    watch = Watch()
    run = rank.runtime.run
    batches = micro_batches(rank, data, starts=starts)  # as the loader makes them: on the host

    def inside(*args: Any) -> Tensor:
        watch.within = True
        out = run(*args)
        watch.within = False
        return out

    def counted(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        return lambda tensor, *args, **named: (watch.note(name), real(tensor, *args, **named))[1]

    for name in METHODS:
        monkeypatch.setattr(Tensor, name, counted(getattr(Tensor, name), name))
    monkeypatch.setattr(rank.runtime, "run", inside)
    rank = replace(rank, read=lambda tensor: tensor.tolist())
    with watch:
        result = train_step(rank, rank.plan.schedule_for(len(batches)), batches, 1e-3, masked=starts is not None)
    assert result.applied
    return watch.read


VARIANTS: list[dict[str, Any]] = [
    {},
    {"precision": {"dtype": "bf16"}},
    {"precision": {"dtype": "fp32"}, "memory": {"recompute": "full"}, "model": {"tie_embeddings": True}},
    {"parallel": {"schedule": "zb-h1"}, "memory": {"recompute": "none"}},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_one_read_per_step(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(**settings)
    (read,) = on_threads(config, 1, lambda rank: watched(rank, tokens(config, 1)[0], monkeypatch))
    assert read == ["tolist"]


def test_documents_cost_one_more_before_the_first_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(precision={"dtype": "fp32"}, data={"document_mask": True})
    data, starts = tokens(config, 1)[0], documents(config, 1)[0]
    (read,) = on_threads(config, 1, lambda rank: watched(rank, data, monkeypatch, starts))
    assert read == ["aten._local_scalar_dense.default", "tolist"]


@pytest.mark.parametrize("how", ["item", "float", "bool", "int", "tolist", "cpu", "nonzero", "mask"])
def test_the_watch_sees(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config()
    reads: dict[str, Callable[[Tensor], Any]] = {
        "item": lambda t: t.sum().item(),
        "float": lambda t: float(t.sum()),
        "bool": lambda t: bool(t.sum() > 0),
        "int": lambda t: int(t.sum()),
        "tolist": lambda t: t.tolist(),
        "cpu": lambda t: t.cpu(),
        "nonzero": lambda t: t.nonzero(),
        "mask": lambda t: t[t > 0],
    }

    def body(rank: Worker) -> None:
        forward = PipelineRuntime._forward

        def reading(self: PipelineRuntime, action: Any) -> None:
            forward(self, action)
            reads[how](rank.buffers[0].grads)

        rank.runtime._handlers[next(iter(rank.runtime._handlers))] = reading.__get__(rank.runtime)
        watched(rank, tokens(config, 1)[0], monkeypatch)

    with pytest.raises(AssertionError, match="within a micro-batch"):
        on_threads(config, 1, body)


@pytest.mark.parametrize("number", SIGNALS)
def test_what_only_the_host_knows_is_told_with_the_rest(number: Any) -> None:
    config = small_config()

    def body(rank: Worker) -> str | None:
        batches = micro_batches(rank, tokens(config, 1)[0])
        schedule, own = rank.plan.schedule_for(len(batches)), number if rank.groups.rank == 1 else None
        return train_step(rank, schedule, batches, 1e-3, status=lambda: RankStatus(own, late=True)).stop_reason

    assert on_threads(config, 2, body) == [f"{number.name} on 1 rank"] * 2
