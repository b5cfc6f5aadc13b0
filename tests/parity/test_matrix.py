"""The layout does not show: every row of the matrix against one rank, in float64 and in float32."""

from __future__ import annotations

import pytest

from tests.parity.matrix import FURTHER, LIMITS, MAX_RANKS, VALUES, Comparison, Layout, matrix, pairs, possible
from tests.pool import Pool

ROWS = matrix()
IN_STEPS = {"fp64": 10, "fp32": 6}  # what is wrong in both shows in float64, to ten digits


@pytest.fixture(scope="module")
def comparison(pool: Pool) -> Comparison:
    """Shares the runs of one rank between the rows."""
    return Comparison(pool)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("layout", [*ROWS, *FURTHER], ids=str)
def test_every_layout_gives_one_ranks_numbers(comparison: Comparison, layout: Layout, dtype: str) -> None:
    loss, norm = comparison.deviations(layout, dtype, IN_STEPS[dtype])
    assert loss <= LIMITS[dtype]
    assert norm <= LIMITS[dtype]


def test_the_rows_hold_every_pair_that_can_occur() -> None:
    held = set().union(*map(pairs, ROWS))
    assert held == set().union(*map(pairs, possible()))
    assert max(row.ranks for row in ROWS) == MAX_RANKS
    for name, values in VALUES.items():
        assert {getattr(row, name) for row in ROWS} == set(values), name
