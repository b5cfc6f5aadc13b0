"""The last tasks of a run go to whoever has nothing to do, not behind another one."""

from __future__ import annotations

from collections import Counter, deque
from pathlib import Path

import pytest

from megallama.text.documents import Unit
from megallama.text.workers import AHEAD, Task, WorkerPool


class Process:
    """One end of a pipe: what came, and when the process has done the first of it."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.tasks, self.now = seconds, deque[Task](), 0.0

    def send(self, task: Task) -> None:
        self.tasks.append(task)


def shared(seconds: list[float], count: int) -> tuple[list[float], list[int]]:
    """When processes that take so long for a task have ended, and how many each has done."""
    pool = WorkerPool.__new__(WorkerPool)
    processes = [Process(s) for s in seconds]
    pool._tasks, pool._connections = Counter(), processes  # type: ignore[assignment]
    left = deque(Task(n, [Unit(Path("x"), 0, None, 1)], 1) for n in range(count))
    for process in processes * AHEAD:
        pool._give(process, left)  # type: ignore[arg-type]
    done: list[int] = []
    while busy := [process for process in processes if process.tasks]:
        first = min(busy, key=lambda process: process.now + process.seconds)
        first.now += first.seconds
        for process in processes:
            process.now = process.now if process.tasks else max(process.now, first.now)  # it waited
        done.append(first.tasks.popleft().number)
        pool._tasks[first] -= 1  # type: ignore[index]
        pool._give(first, left)  # type: ignore[arg-type]
    assert sorted(done) == [*range(count)] and not left
    return [process.now for process in processes], done


@pytest.mark.parametrize("seconds", [[1.0, 1.0], [1.0, 1.3, 1.7], [3.0, 1.0]], ids=["alike", "three", "one slow"])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 20, 41])
def test_no_process_has_a_task_waiting_while_another_has_none(seconds: list[float], count: int) -> None:
    """The end is where the best hand-out has it: each task to whoever is free first."""
    free = [0.0] * len(seconds)
    for _ in range(count):
        at = free.index(min(free))
        free[at] += seconds[at]
    ends, _ = shared(seconds, count)
    assert max(ends) == pytest.approx(max(free))
