"""Copies to a GPU: what is pinned, when which copy starts and who waits for it, on a CUDA that only takes notes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from megallama.config.errors import DataError
from megallama.data.loader import Loader
from megallama.data.samples import Samples
from megallama.layers.batch import MicroBatch

GPU = torch.device("cuda", 0)


class FakeEvent:
    def __init__(self, stream: FakeStream) -> None:
        self.stream = stream


class FakeStream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.device = name, log, GPU

    def record_event(self) -> FakeEvent:
        self.log.append(f"event on {self.name}")
        return FakeEvent(self)

    def wait_event(self, event: FakeEvent) -> None:
        self.log.append(f"{self.name} waits for {event.stream.name}")


class FakeCuda:
    """In place of the parts of torch.cuda that a transfer uses; every step has one micro-batch of two samples."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.side, self.compute = FakeStream("copies", self.log), FakeStream("compute", self.log)
        self.now = self.compute
        self.pinned: dict[int, str] = {}  # tensor -> the thread that pinned it

        @contextmanager
        def stream(which: FakeStream) -> Iterator[None]:
            self.now, before = which, self.now
            yield
            self.now = before

        def pin(tensor: torch.Tensor) -> torch.Tensor:
            copy = tensor.clone()
            self.pinned[copy.data_ptr()] = threading.current_thread().name
            return copy

        def to(batch: MicroBatch, device: torch.device) -> MicroBatch:
            assert device == GPU and batch.tokens.data_ptr() in self.pinned, "a copy out of memory that is not pinned"
            self.log.append(f"copy {step_of(batch)} on {self.now.name}")
            return batch.each(torch.clone)

        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.side)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.compute)
        monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, s: self.log.append(f"used by {s.name}"))
        monkeypatch.setattr(MicroBatch, "to", to)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def step_of(batch: MicroBatch) -> int:
    return int(batch.tokens[0, 0]) // 200


def read(ids: Sequence[int]) -> Samples:
    return Samples(np.array([np.arange(100 * i, 100 * i + 5) for i in ids]))


def loader(**options: Any) -> Loader:
    return Loader(options.pop("read", read), lambda step: [[2 * step, 2 * step + 1]], device=GPU, **options)


def filled(it: Loader) -> None:
    """Return when the thread has prepared the step after the next one, which may be on its way already."""
    while it._queue.qsize() < (1 if it._ahead else 2):
        time.sleep(0.001)


def test_the_next_step_is_copied_while_one_runs(fake: FakeCuda) -> None:
    with loader(stop_step=3) as it:
        filled(it)
        first = next(it)
        start = ["copy 0 on copies", "event on copies"]
        used = ["compute waits for copies", *["used by compute"] * 2]  # tokens and labels
        assert [x for x in fake.log if "1 on" not in x][:2] == start and fake.log[-3:] == used
        assert step_of(first[0]) == 0
        filled(it) if it._ahead is None else None
        fake.log.clear()
        second = next(it)
        assert step_of(second[0]) == 1
        third = next(it)
        assert step_of(third[0]) == 2
        assert [x for x in fake.log if x.startswith("copy 2")] == ["copy 2 on copies"]  # once, and of no step after it
        with pytest.raises(StopIteration):
            next(it)
    assert set(fake.pinned.values()) == {"loader-train"}


def test_a_copy_starts_before_the_step_that_needs_it(fake: FakeCuda) -> None:
    with loader(stop_step=9, prefetch=3) as it:
        for step in range(8):
            filled(it)
            next(it)
            assert fake.log.index(f"copy {step + 1} on copies") > 0  # already, though nobody has asked for it
            assert fake.log[-3] == "compute waits for copies"


def test_a_fault_of_the_next_step_comes_with_that_step(fake: FakeCuda) -> None:
    def broken(ids: Sequence[int]) -> Samples:
        return read(ids) if max(ids) < 2 else Samples(np.zeros(1 // 0))

    with loader(read=broken) as it:
        while it._queue.qsize() < 2:
            time.sleep(0.001)
        assert step_of(next(it)[0]) == 0
        for _ in range(2):
            with pytest.raises(DataError, match="loader failed at step 1, samples 2 to 3: ZeroDivisionError"):
                next(it)


def test_without_a_thread_nothing_is_ahead(fake: FakeCuda) -> None:
    with loader(prefetch=0, stop_step=2) as it:
        assert [step_of(batches[0]) for batches in it] == [0, 1]
    assert [x for x in fake.log if x.startswith("copy")] == ["copy 0 on copies", "copy 1 on copies"]
    assert set(fake.pinned.values()) == {threading.current_thread().name}
