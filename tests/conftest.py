"""Fixtures shared by all rooms."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: several ranks share few cores

if TYPE_CHECKING:
    from tests.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Worker processes for tests over gloo: `pool.run(ranks, "module:function", *args)`."""
    from tests.pool import Pool  # imports torch, which not every test needs

    workers = Pool()
    yield workers
    workers.close()
