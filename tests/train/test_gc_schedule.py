"""Garbage is collected after the steps that are to be, at no other time, and as before afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megallama.train import gc_schedule as collect
from megallama.train.gc_schedule import GcSchedule
from tests.pool import Pool


class Cycle:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    gc.enable()
    gc.unfreeze()


def test_only_at_the_interval() -> None:
    alive = []
    with GcSchedule(3) as collector:
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        for number in range(1, 8):
            alive.append(weakref.ref(Cycle()))
            for _ in range(3000):
                _ = [[] for _ in range(3)]  # enough new objects for Python's own collections
            collector.step(number)
            left = sum(ref() is not None for ref in alive)
            assert left == number % 3, number
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_zero_leaves_it_to_python() -> None:
    before = gc.get_freeze_count()
    with GcSchedule(0) as collector:
        assert gc.isenabled() and gc.get_freeze_count() == before
        collector.step(5)


def test_what_was_off_stays_off() -> None:
    gc.disable()
    with pytest.raises(ZeroDivisionError), GcSchedule(1):
        raise ZeroDivisionError
    assert not gc.isenabled() and gc.get_freeze_count() == 0


def collections(world: Any, folder: str, interval: int) -> list[int]:
    """The steps after which a run collects."""
    from tests.train import runs

    seen, real = [], collect.gc.collect

    class Noted(GcSchedule):
        def step(self, number: int) -> None:
            collect.gc.collect = lambda *a: seen.append(number)  # type: ignore[assignment]
            super().step(number)
            collect.gc.collect = real

    before, runs_module = collect.GcSchedule, __import__("megallama.train.loop", fromlist=["x"])
    runs_module.GcSchedule = Noted
    try:
        runs.run(world, folder, {"train": {"steps": 7, "gc_interval": interval}})
    finally:
        runs_module.GcSchedule = before
    return seen


def test_all_ranks_of_a_run_collect_after_the_same_steps(pool: Pool, tmp_path: Path) -> None:
    answers = pool.run(2, "tests.train.test_gc_schedule:collections", str(tmp_path), 3)
    assert answers == [[3, 6], [3, 6]]
