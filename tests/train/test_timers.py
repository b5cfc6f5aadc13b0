"""Phases add up, nest and repeat."""

from __future__ import annotations

import pytest

from megallama.train.speed import Timers


class Clock:
    """A clock that only moves when told."""

    def __init__(self) -> None:
        self.now = 100.0
        self.reads = 0

    def __call__(self) -> float:
        self.reads += 1
        return self.now


def test_phases_are_exclusive_and_add_up() -> None:
    clock = Clock()
    timers = Timers(clock=clock)
    clock.now += 1
    for _ in range(2):
        with timers.phase("forward"):
            clock.now += 2
            with timers.phase("data"):
                clock.now += 3
                with timers.phase("disk"):
                    clock.now += 4
            with timers.phase("data"):
                clock.now += 5
            clock.now += 6
    total, phases = timers.lap()
    assert total == 41
    assert phases == {"disk": 8, "data": 16, "forward": 16}
    assert timers.lap() == (0, {})


def test_a_phase_ends_with_its_exception() -> None:
    clock = Clock()
    timers = Timers(clock=clock)
    with pytest.raises(ValueError), timers.phase("a"), timers.phase("b"):
        clock.now += 1
        raise ValueError
    with timers.phase("c"):
        clock.now += 2
    assert timers.lap() == (3, {"a": 0, "b": 1, "c": 2})
