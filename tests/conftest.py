"""Fixtures shared by all rooms."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: several ranks share few cores
for _number in (signal.SIGHUP, signal.SIGQUIT):  # under nohup they are ignored, and so in all processes of the tests
    signal.signal(_number, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background
    signal.signal(signal.SIGINT, signal.default_int_handler)

if TYPE_CHECKING:
    from tests.pool import Pool


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A run that saved and stopped ignores signals from then on, in the process of its test too: given back here."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Worker processes for tests over gloo: `pool.run(ranks, "module:function", *args)`."""
    from tests.pool import Pool  # imports torch, which not every test needs

    workers = Pool()
    yield workers
    workers.close()
