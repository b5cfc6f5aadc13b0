"""Garbage is collected after the steps that are to be, at no other time, and as before afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megallama.train import loop
from megallama.train.loop import gc_schedule
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
    with gc_schedule(3) as collect:
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        for number in range(1, 8):
            alive.append(weakref.ref(Cycle()))
            for _ in range(3000):
                _ = [[] for _ in range(3)]  # enough new objects for Python's own collections
            collect(number)
            left = sum(ref() is not None for ref in alive)
            assert left == number % 3, number
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_zero_leaves_it_to_python() -> None:
    before = gc.get_freeze_count()
    with gc_schedule(0) as collect:
        assert gc.isenabled() and gc.get_freeze_count() == before
        collect(5)


def test_what_was_off_stays_off() -> None:
    gc.disable()
    with pytest.raises(ZeroDivisionError), gc_schedule(1):
        raise ZeroDivisionError
    assert not gc.isenabled() and gc.get_freeze_count() == 0


def collections(world: Any, folder: str, interval: int) -> list[int]:
    """The steps after which a run collects."""
    from tests.train import runs

    seen, real = [], gc.collect

    @contextmanager
    def noted(interval: int) -> Iterator[Callable[[int], None]]:
        with gc_schedule(interval) as collect:

            def step(number: int) -> None:
                gc.collect = lambda *a: seen.append(number)  # type: ignore[assignment]
                collect(number)
                gc.collect = real

            yield step

    with patch.object(loop, "gc_schedule", noted):
        runs.run(world, folder, {"train": {"steps": 7, "gc_interval": interval}})
    return seen


def test_all_ranks_of_a_run_collect_after_the_same_steps(pool: Pool, tmp_path: Path) -> None:
    answers = pool.run(2, "tests.train.test_gc_schedule:collections", str(tmp_path), 3)
    assert answers == [[3, 6], [3, 6]]
