"""The grid of ranks."""

from __future__ import annotations

from itertools import chain

import pytest

from megallama.config.errors import ConfigError
from megallama.plan.topology import AXES, Topology


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 3, 4, 1), (8, 4, 2, 2), (4, 1, 5, 3)])
@pytest.mark.parametrize("order", ["tp-cp-dp-pp", "tp-dp-pp-cp", "pp-dp-cp-tp"])
def test_grid(sizes: tuple[int, int, int, int], order: str) -> None:
    t = Topology(*sizes, order=order)
    ranks = range(t.world_size)
    assert [sum(i * t.strides[axis] for axis, i in t.coords(r).items()) for r in ranks] == list(ranks)
    assert len({tuple(t.coords(r).items()) for r in ranks}) == t.world_size
    for axis in AXES:
        groups = t.groups(axis)
        assert sorted(chain(*groups)) == list(ranks)
        assert groups == sorted(groups)
        for group in groups:
            assert len(group) == t.size(axis) and list(group) == sorted(group)
            assert all(t.coords(r) | {axis: 0} == t.coords(group[0]) | {axis: 0} for r in group)


def test_known_groups() -> None:
    t = Topology.fill(16, tp=2, pp=4)
    assert (t.dp, t.world_size, str(t)) == (2, 16, "tp=2 x pp=4 x dp=2 = 16 ranks")
    assert t.groups("tp")[:2] == [(0, 1), (2, 3)]
    assert t.groups("dp")[:2] == [(0, 2), (1, 3)]
    assert t.groups("pp")[1] == (1, 5, 9, 13)
    assert t.coords(13) == {"tp": 1, "cp": 0, "dp": 0, "pp": 3}


def test_many_ranks() -> None:
    t = Topology.fill(65536, tp=8, pp=16)
    assert len(t.groups("tp")) == 8192 and len(t.groups("dp")) == 128


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: Topology.fill(8, tp=3), "ranks=8 cannot be cut into tp=3 x pp=1 x cp=1 = 3; "
                                         "use a multiple of 3 ranks or smaller sizes"),
        (lambda: Topology.fill(2, tp=4), "ranks=2 cannot be cut into tp=4 x pp=1 x cp=1 = 4; "
                                         "use a multiple of 4 ranks or smaller sizes"),
    ],
)  # fmt: skip
def test_messages(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value) == message


@pytest.mark.parametrize("wrong", [{"order": "tp-pp"}, {"dp": 0}])
def test_what_the_rules_of_the_configuration_refuse(wrong: dict[str, object]) -> None:
    with pytest.raises(AssertionError):
        Topology(**wrong)  # type: ignore[arg-type]
