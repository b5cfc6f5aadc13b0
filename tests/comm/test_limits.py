"""Open files are counted before they are opened, and what does not suffice is refused with numbers."""

from __future__ import annotations

import resource

import pytest

from megallama.comm.group import partitions
from megallama.comm.launch import Launch, files_needed, raised_limit, too_many
from megallama.plan.topology import Topology
from tests.pool import Pool


@pytest.mark.parametrize("axes", [{"dp": 4}, {"tp": 2, "pp": 2}, {"tp": 2, "dp": 2}], ids=str)
def test_what_is_opened_is_counted(pool: Pool, axes: dict[str, int]) -> None:
    for opened, counted in pool.run(4, "tests.comm.operations:open_files", axes):
        assert opened <= counted <= opened + 30, (opened, counted)


def test_two_thousand_ranks() -> None:
    parts = partitions(Topology(tp=4, pp=8, dp=64), 8).values()
    sizes = [len(ranks) for part in parts for ranks in part if 0 in ranks]
    assert sizes == [2048, 4, 64, 8, 2, 1]
    one, other = (Launch(rank, 2048) for rank in (0, 1))
    gpu = files_needed(other, sizes, 200, cuda=True, shared=True)
    assert sum(gpu.values()) < 1024  # no rank but the first is connected with all others
    first = files_needed(one, sizes, 200, cuda=True, shared=True)
    assert (first["the store"], first["connections with rank 0"]) == (4100, 2056)
    assert first["data, checkpoints and logs"] == 208
    cpu = files_needed(other, sizes, 200, cuda=False, shared=False)
    assert cpu["gloo"] == 2048 + 4 + 64 + 8 + 2 + 5 * 3
    text = too_many({"open already": 6, "gloo": 2141}, 1024, "rank 7 (node1)")
    assert text.startswith("rank 7 (node1) will have 2,147 files open (open already 6, gloo 2,141), but its limit is")
    assert "raise the hard limit of open files (ulimit -Hn" in text and text.endswith("to 2,147 or more")
    assert too_many({"gloo": 1024}, 1024, "") == ""


def test_the_soft_limit_is_raised() -> None:
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, old[1]))
        assert raised_limit() == old[1] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)
