"""Random delays change no bit; and code that forgets to wait is caught by them, whatever it forgets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megallama.comm.group import Done, Handle
from megallama.config.schema import Config
from megallama.layers.linear import TensorParallel
from megallama.layers.param import Gather
from megallama.optim.update import GradSync, Update
from megallama.pipeline.runtime import PipelineRuntime
from megallama.plan.schedule import Action, Kind
from megallama.train.assemble import Worker
from tests.small import curve, on_threads, small_config, tokens, train

STEPS, SEEDS = 3, (1, 2, 3)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp sp": (2, {"parallel": {"tp": 2}}),
    "tp": (2, {"parallel": {"tp": 2, "sequence_parallel": False}}),
    "dp": (2, {"overlap": {"bucket_mb": 0.002}}),
    "interleaved, dp": (4, {"parallel": {"pp": 2, "chunks": 2}, "overlap": {"bucket_mb": 0.004}}),
    "zb-h1": (2, {"parallel": {"pp": 2, "schedule": "zb-h1"}}),
    "zb-v, dp": (4, {"parallel": {"pp": 2, "chunks": 2, "schedule": "zb-v"}, "model": {"tie_embeddings": True}}),
    "all": (8, {"parallel": {"tp": 2, "pp": 2, "schedule": "zb-h1"}, "model": {"num_kv_heads": 1}}),
    "tp in pieces": (2, {"parallel": {"tp": 2}, "overlap": {"tensor_parallel_chunks": 2}}),
    "all, recomputed": (
        8,
        {
            "parallel": {"tp": 2, "pp": 2, "chunks": 2},
            "memory": {"recompute": "full"},
            "overlap": {"tensor_parallel_chunks": 4},
            "model": {"tie_embeddings": True},
        },
    ),
}


def config_of(name: str, dtype: str) -> Config:
    ranks, sections = LAYOUTS[name]
    parallel = sections.get("parallel", {})
    alone = ranks == parallel.get("tp", 1) * parallel.get("pp", 1)
    size = {"global_batch_size": 4 if alone else 8}  # micro-batches of each replica: 4, or 2 of 8 ranks
    return small_config(**{**sections, "batch": size, "precision": {"dtype": dtype}})


def outcome(rank: Worker) -> list[Tensor]:
    """Losses, norms, this rank's sums of gradients, and its weights, as they are after a few steps."""
    numbers = curve(train(rank, tokens(rank.plan.config, STEPS)))
    grads = [tensors["grads"].clone() for *_, tensors in rank.optimizer._held]
    rank.optimizer.wait()
    return [torch.tensor(numbers, dtype=torch.float64), *grads, *(b.weights for b in rank.buffers.values())]


class Calm:
    """Outcomes without delays, made once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], list[list[Tensor]]] = {}

    def __call__(self, name: str, dtype: str) -> list[list[Tensor]]:
        if (name, dtype) not in self._known:
            self._known[name, dtype] = on_threads(config_of(name, dtype), LAYOUTS[name][0], outcome)
        return self._known[name, dtype]


@pytest.fixture(scope="module")
def calm() -> Calm:
    return Calm()


def same(own: list[list[Tensor]], theirs: list[list[Tensor]]) -> bool:
    return all(
        torch.equal(a, b) for x, y in zip(own, theirs, strict=True) for a, b in zip(x, y, strict=True)
    )  # NaN is not equal to anything


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_delays_change_no_bit(calm: Calm, name: str, dtype: str, seed: int) -> None:
    assert same(on_threads(config_of(name, dtype), LAYOUTS[name][0], outcome, delays=seed), calm(name, dtype))


# ---- the same, with code that is wrong ----


class Forgotten:
    """A handle that nobody really waits for."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def wait(self) -> None:
        return None

    def done(self) -> bool:
        return True


def forget(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Never wait for what this method of TensorParallel has started."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real = getattr(TensorParallel, name)

        def careless(self: TensorParallel, tensor: Tensor) -> tuple[Tensor, Handle]:
            out, handle = real(self, tensor)
            return out, handle if isinstance(handle, Done) else Forgotten(handle)

        patch.setattr(TensorParallel, name, careless)

    return plant


def read_weights_early(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Gather, "wait", lambda self: None)


def read_sums_early(patch: pytest.MonkeyPatch) -> None:
    real = GradSync.finish

    def careless(self: GradSync) -> None:
        self._handles = {index: Forgotten(handle) for index, handle in self._handles.items()}
        real(self)

    patch.setattr(GradSync, "finish", careless)


def reduce_early(patch: pytest.MonkeyPatch) -> None:
    """Take the first contributions for the last."""
    real = GradSync.start_step

    def careless(self: GradSync, early: bool) -> None:
        real(self, early)
        self.last_microbatch().__enter__()

    patch.setattr(GradSync, "start_step", careless)
    patch.setattr(GradSync, "_grad_done", _ready_without_check)


def _ready_without_check(self: GradSync, param: Any) -> None:
    bucket = self._bucket_of[param.spec.name]
    self._pending[bucket.index] -= 1
    if self._pending[bucket.index] == 0:
        self._reduce(bucket)


def forget_messages(patch: pytest.MonkeyPatch) -> None:
    real = PipelineRuntime._recv

    def careless(self: PipelineRuntime, *args: Any) -> None:
        real(self, *args)
        self._values |= {key: (value, Forgotten(h)) for key, (value, h) in self._values.items() if h is not None}

    patch.setattr(PipelineRuntime, "_recv", careless)


def reuse_sent_memory(patch: pytest.MonkeyPatch) -> None:
    """What an allocator does with a tensor that is freed before the message has left."""
    real = PipelineRuntime._send

    def careless(self: PipelineRuntime, action: Action) -> None:
        kind, to = (Kind.F, action.stage + 1) if action.kind is Kind.SEND_F else (Kind.B, action.stage - 1)
        value, _ = self._values[kind, to, action.microbatch]
        real(self, action)
        value.fill_(1e3)

    patch.setattr(PipelineRuntime, "_send", careless)


def drop_handles(patch: pytest.MonkeyPatch) -> None:
    real = PipelineRuntime._send

    def careless(self: PipelineRuntime, *args: Any) -> None:
        real(self, *args)
        self._sends.clear()

    patch.setattr(PipelineRuntime, "_send", careless)


def zero_grads_under_way(patch: pytest.MonkeyPatch) -> None:
    real = GradSync._reduce

    def careless(self: GradSync, bucket: Any) -> None:
        real(self, bucket)
        self.buffers.grads[bucket.start : bucket.stop].zero_()

    patch.setattr(GradSync, "_reduce", careless)


def write_weights_under_way(patch: pytest.MonkeyPatch) -> None:
    """Round the masters once more while the weights are being gathered."""
    real = Update.gather

    def careless(self: Update, **overlap: bool) -> None:
        real(self, **overlap)
        for *_, tensors in self._held:
            tensors["weights"].mul_(0.5)

    patch.setattr(Update, "gather", careless)


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], tuple[str, ...]]] = {
    "gathered rows are read early": (forget("all_gather_sequence"), ("tp sp", "tp in pieces", "all")),
    "summed rows are read early": (forget("reduce_scatter_sequence"), ("tp in pieces", "tp", "all")),
    "weights are read early": (read_weights_early, ("dp", "zb-v, dp", "all")),
    "sums of gradients are read early": (read_sums_early, ("dp", "interleaved, dp")),
    "buckets are reduced early": (reduce_early, ("dp", "interleaved, dp", "zb-v, dp")),
    "messages are read early": (forget_messages, ("interleaved, dp", "zb-h1", "all")),
    "sent memory is used again": (reuse_sent_memory, ("interleaved, dp", "zb-h1", "all")),
    "handles of sends are dropped": (drop_handles, ("interleaved, dp", "zb-h1")),
    "gradients are zeroed under way": (zero_grads_under_way, ("dp", "zb-v, dp", "all")),
    "weights are written under way": (write_weights_under_way, ("dp", "all")),
}


def cases() -> Iterator[tuple[str, str]]:
    for fault, (_, layouts) in FAULTS.items():
        yield from ((fault, name) for name in layouts)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", SEEDS[:2])
@pytest.mark.parametrize(("fault", "name"), [*cases()], ids=str)
def test_forgotten_waits_are_caught(
    calm: Calm, monkeypatch: pytest.MonkeyPatch, fault: str, name: str, seed: int
) -> None:
    want = calm(name, "bf16")
    FAULTS[fault][0](monkeypatch)
    try:
        got = on_threads(config_of(name, "bf16"), LAYOUTS[name][0], outcome, delays=seed)
    except AssertionError:
        return  # noticed where it happened
    assert not same(got, want)
