"""Several NCCL ranks on one GPU, each with a host id of its own: rows of the parity matrix against one rank.

`benchmarks/gpu_nccl.py` runs all rows, in bf16 and fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.parity.matrix import Comparison, Layout
from tests.pool import Pool

LIMITS = {"fp64": (1e-10, 1e-10), "bf16": (5e-3, 5e-2)}  # of loss, of gradient norm
ROWS = [
    Layout(tp=2),
    Layout(dp=2, accumulation=1),
    Layout(tp=2, pp=2, sequence_parallel=False, tied=True),
    Layout(pp=2, chunks=2, dp=2, recompute="full", documents=True),
    Layout(tp=2, pp=2, chunks=2, schedule="zb-v", recompute="none", kv_heads=1, uneven=True),
]


@pytest.fixture(scope="module")
def comparison() -> Iterator[Comparison]:
    if not torch.cuda.is_available():
        pytest.skip(f"no CUDA device: torch {torch.__version__} finds none")
    pool = Pool("cuda")
    yield Comparison(pool)
    pool.close()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("layout", ROWS, ids=str)
def test_nccl_ranks_give_one_ranks_numbers(comparison: Comparison, layout: Layout, dtype: str) -> None:
    loss, norm = comparison.deviations(layout, dtype)
    assert loss <= LIMITS[dtype][0] and norm <= LIMITS[dtype][1]


def test_the_measurement_before_a_run_goes_over_nccl() -> None:
    pool = Pool("cuda")
    try:
        results = pool.run(4, "tests.recovery.measuring:run", ("a", "a", "b", "b"), None, None)
    finally:
        pool.close()
    kinds = [line[:22].strip() for line in results[0][1] if " x median " in line]
    assert kinds[-5:] == ["copy", "host to device", "device to host", "all-reduce in a node", "between two nodes"]
