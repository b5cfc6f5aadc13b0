"""The measurement before a run: who is measured with whom, what is called slow, with clocks that the test sets."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megallama import cli
from megallama.comm.group import ContactLost, Group
from megallama.config.errors import LaunchError
from megallama.recovery import preflight as module
from megallama.recovery.preflight import LINK, Rate, judged, measure, pairings
from tests.pool import Pool
from tests.threads import run_threads

CPU = torch.device("cpu")
HOSTS = tuple(f"node{rank // 2}" for rank in range(8))


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5, 7, 8, 9, 10, 33, 256])
def test_rounds_are_of_pairs_that_do_not_meet(nodes: int) -> None:
    rounds = pairings(nodes)
    pairs = [pair for pairs in rounds for pair in pairs]
    for found in rounds:
        ends = [node for pair in found for node in pair]
        assert len(ends) == len(set(ends)) == nodes - nodes % 2
    assert len(pairs) == len(set(pairs)) and all(a < b < nodes for a, b in pairs)
    if nodes <= 8:
        assert sorted(pairs) == [*combinations(range(nodes), 2)]
    else:
        others = [sum(node in pair for pair in pairs) for node in range(nodes)]
        assert min(others) >= 2 and max(others) <= 3 and len(rounds) <= 3


def measured(
    monkeypatch: pytest.MonkeyPatch, seconds: Callable[[Rate], float], hosts: tuple[str, ...] = HOSTS, size: int = 8
) -> tuple[list[str], list[Rate], list[int]]:
    """Lines and outliers where every piece of work takes so long, and how often each was timed by rank 0."""
    counts: dict[str, int] = {}

    def timed(what: Rate, work: Callable[[], Any], device: torch.device) -> float:
        if what.where.startswith("rank 0 "):
            counts[what.kind] = counts.get(what.kind, 0) + 1
        return seconds(what)

    def rank(group: Group) -> list[Rate]:
        split = getattr(group, "split", None)
        return measure(group, hosts, CPU, lambda name, parts: split(parts, name) if split else group, 60.0)

    monkeypatch.setattr(module, "timed", timed)
    monkeypatch.setattr(torch, "rand", lambda *sizes, **kind: torch.zeros(1).expand(sizes))  # takes no memory
    everywhere = run_threads(size, rank)
    assert all(rates == everywhere[0] for rates in everywhere)
    return *judged(everywhere[0], 10.0), [*counts.values()]


def test_with_equal_times_nothing_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    lines, slow, counts = measured(monkeypatch, lambda what: 0.25)
    assert slow == [] and not any("slow" in line for line in lines)
    parts = [line.split() for line in lines]
    assert [words[words.index("x") - 1] for words in parts] == ["8", "8", "8", "8", "4", "4"]
    assert len(counts) == 4 and all((count - 2) % 2 == 1 for count in counts), "two to warm up, an odd number to count"
    assert lines[-1].startswith(LINK) and "lowest" in lines[-1]


def test_small_differences_are_none_and_the_limit_is_where_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(what: Rate) -> float:
        return {"rank 1": 1.09, "rank 2": 1.05, "rank 5": 1 / 0.89}.get(what.where[:6], 1.0)

    _, slow, _ = measured(monkeypatch, seconds)
    assert {rate.where for rate in slow} == {"rank 5 on node2"} and len(slow) == 4


def test_a_slow_rank_is_named_by_what_it_is_slow_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(what: Rate) -> float:
        return 3.0 if what.where.startswith("rank 5 ") and what.kind == "copy" else 1.0

    lines, slow, _ = measured(monkeypatch, seconds)
    assert [(rate.kind, rate.where, rate.hosts) for rate in slow] == [("copy", "rank 5 on node2", ("node2",))]
    assert [line for line in lines if "slow" in line] == ["  slow: rank 5 on node2, 0.04474 GB/s, 67% below"]


def test_of_a_node_and_of_its_links_the_slowest_rank_counts_and_the_node_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def seconds(what: Rate) -> float:
        return 2.0 if "node3" in what.hosts and not what.where.startswith("rank") else 1.0

    _, slow, _ = measured(monkeypatch, seconds)
    assert [(rate.kind, rate.where) for rate in slow] == [
        ("all-reduce in a node", "node3"), (LINK, "links of node3"),
    ]  # fmt: skip


def test_of_what_ranks_do_together_the_slowest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(what: Rate) -> float:
        return 2.0 if threading.current_thread().name == "rank-5" and what.kind == "all-reduce in a node" else 1.0

    _, slow, _ = measured(monkeypatch, seconds)
    assert [(rate.kind, rate.where) for rate in slow] == [("all-reduce in a node", "node2")]


def test_messages_between_nodes_really_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a group whose messages last until the receiver has asked: two ranks that both send first would wait."""
    monkeypatch.setattr(torch, "rand", lambda *sizes, **kind: torch.ones([min(size, 8) for size in sizes]))
    hosts = ("a", "a", "b", "c", "c")

    def rank(group: Group) -> list[Rate]:
        return measure(group, hosts, CPU, lambda name, parts: group.split(parts, name), 0.01)  # type: ignore[attr-defined]

    everywhere = run_threads(5, rank, timeout=20)
    assert all(rates == everywhere[0] for rates in everywhere)
    assert sorted(rate.where for rate in everywhere[0] if rate.kind == LINK) == ["a - b", "a - c", "b - c"]
    assert [rate.where for rate in everywhere[0] if rate.kind == "all-reduce in a node"] == ["a", "c"]


def test_one_bad_cable_between_two_good_nodes_blames_none(monkeypatch: pytest.MonkeyPatch) -> None:
    _, slow, _ = measured(monkeypatch, lambda what: 9.0 if what.where == "node0 - node3" else 1.0)
    assert slow == []


def test_slow_ones_do_not_shift_what_is_usual() -> None:
    rates = [Rate("copy", "GB/s", value, f"rank {i}", (f"n{i}",)) for i, value in enumerate([5.0, 10.0, 5.0, 10.0])]
    assert [rate.where for rate in judged(rates, 10.0)[1]] == ["rank 0", "rank 2"]
    assert [rate.where for rate in judged(rates[:2], 10.0)[1]] == ["rank 0"]
    assert judged(rates, 51.0)[1] == []
    lines, _ = judged(rates, 10.0)
    assert lines == [
        "copy                      4 x median 10 GB/s, lowest 5: rank 0",
        "  slow: rank 0, 5 GB/s, 50% below", "  slow: rank 2, 5 GB/s, 50% below",
    ]  # fmt: skip


def test_ranks_that_are_measured_together_name_the_slow_one(pool: Pool, tmp_path: Path) -> None:
    hosts, output = ("one.cluster", "one.cluster", "two.cluster"), tmp_path / "rates.json"
    results = pool.run(3, "tests.recovery.measuring:run", hosts, 2, str(output))
    assert [status for status, _ in results] == [1, 1, 1]
    lines = results[0][1]
    assert results[1][1] == results[2][1] == []
    slow = [line for line in lines if line.startswith("  slow: ")]
    assert sum("rank 2 on two.cluster" in line for line in slow) == 4 and not any("rank 0" in line for line in slow)
    assert lines[-1] == "--exclude=two"
    found = json.loads(output.read_text())
    assert [rate[0] for rate in found["rates"]].count("copy") == 3 and found["exclude"] == ["two"]
    assert found["keys"] == [*Rate._fields]


def test_alone_there_is_nothing_to_compare_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "timed", lambda what, work, device: 1.0)
    assert cli.main(["preflight", "--device", "cpu", "--seconds", "1", "-o", str(tmp_path / "rates.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        "one rank alone: compare several, under srun, torchrun or mpirun",
        "no outlier of 10 % or more",
    ]
    assert json.loads((tmp_path / "rates.json").read_text())["exclude"] == []


def test_a_rank_that_is_lost_meanwhile_ends_it_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class World(SimpleNamespace):
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            return None

    def lost(*_: Any) -> list[Rate]:
        error = ContactLost("timed out")
        error.add_note("in recv from 1 of group world")
        raise error

    bounds: list[float] = []
    for first, text in (
        (("rank 1 (b) has left", 1), r"rank 1 \(b\) has left"), (None, "timed out in recv from 1 of group world"),
    ):  # fmt: skip
        world = World(group=0, hosts=(), device=CPU, open_group=0, failed=lambda error, first=first: first, rank=0)
        world.bound = bounds.append
        monkeypatch.setattr(module, "start", lambda *_, world=world: world)
        monkeypatch.setattr(module, "measure", lost)
        with pytest.raises(LaunchError, match=f"rank 0 broke off: {text}; exclude the stuck host"):
            module.preflight(print, 1.0, 10.0, "cpu", None)
    assert bounds == [60.0, 60.0]
