"""Which ranks are the next world: whole replicas, in the order of the layout, the root's first."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megallama.comm.flight_record import GENERATION
from megallama.comm.launch import detect_launch
from megallama.plan.plan import make_plan
from megallama.plan.topology import Topology
from megallama.recovery.flight_reader import FlightReader
from megallama.recovery.link import Links
from megallama.recovery.membership import Members, wait, waits
from megallama.train import setup, supervised
from tests.small import CPU, small_config


def members(topology: Topology, least: int = 1, **more: Any) -> Members:
    about = {"seats": [*range(topology.world_size)], "dp": [topology.strides["dp"], topology.dp], "hosts": ["a"],
             "min_replicas": least, "replicas": [""] * (topology.dp + 1), "folder": "/run", "launch": {}}  # fmt: skip
    return Members(about | more, Links())


@pytest.mark.parametrize("order", ["tp-cp-dp-pp", "dp-tp-cp-pp", "tp-pp-cp-dp"])
@pytest.mark.parametrize("cp", [1, 2], ids="cp {}".format)
def test_every_rank_keeps_its_place_in_a_replica(cp: int, order: str) -> None:
    """Whichever two are lost: who goes on has the same stage and the same part of it as before, once for each."""
    topology, unit = Topology(tp=2, cp=cp, pp=2, dp=3, order=order), 4 * cp
    for lost in combinations(range(1, 3 * unit), 2):
        seats, text = members(topology).next_world({*range(3 * unit)} - {*lost})
        fewer = Topology(tp=2, cp=cp, pp=2, dp=len(seats) // unit, order=order)
        for rank, seat in enumerate(seats):
            was, now = topology.coords(seat), fewer.coords(rank)
            assert all(was[axis] == now[axis] for axis in ("tp", "cp", "pp"))
        replicas = {topology.coords(rank)["dp"] for rank in lost}
        assert len({*seats}) == len(seats) >= unit * (3 - len(replicas)) and seats[0] == 0 and not {*seats} & {*lost}
        assert f"{fewer.dp} of 3 replicas" in text and f"{1 - fewer.dp / 3:.0%} of the launched ranks idle" in text


def test_the_first_replica_is_made_whole() -> None:
    """With a rank of one that is broken anyway, else of the last."""
    topology = Topology(tp=2, dp=3)
    assert members(topology).next_world({0, 2, 3, 4, 5})[0] == [0, 5, 2, 3]
    assert members(topology).next_world({0, 3, 4, 5})[0] == [0, 3, 4, 5]
    assert members(topology).next_world({0, 2, 4})[0] == []
    seats, text = members(topology).next_world({0, 2, 3, 4, 5})
    assert "of launched ranks 0, 5, 2, 3 as ranks 0-3; lost: 1; waiting without work: 4; 33%" in text


def test_so_many_replicas_go_on_as_the_batch_can_be_dealt_to() -> None:
    counts = ["none", "", "", "12 is not a multiple of 3", "5 of 12", ""]
    five = members(Topology(dp=5), replicas=counts)
    assert five.next_world({0, 1, 3, 4})[0] == [0, 1]
    seats, why = members(Topology(dp=5), least=3, replicas=counts).next_world({0, 1, 3, 4})
    assert seats == [] and why == (
        "the run cannot go on without launched rank 2: 4 of 5 replicas are whole, run.min_replicas=3; 5 of 12"
    )


def test_why_a_run_cannot_go_on_with_so_many_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its batch, and the room for a larger share of the optimizer's state: of all ranks of a host on CPUs."""
    plan = make_plan(small_config(batch={"global_batch_size": 8}, run={"min_replicas": 1, "max_replacements": 9}), 4)
    world: Any = SimpleNamespace(rank=0, hosts=["a"] * 4, device=CPU)
    assert [bool(why) for why in setup._replicas(plan, world)] == [True, False, False, True, False]
    assert "batch.global_batch_size=8 is not a multiple of" in setup._replicas(plan, world)[3]
    two = replace(plan, topology=Topology(dp=2)).memory(0).persistent
    one = replace(plan, topology=Topology(dp=1)).memory(0).persistent
    assert one < 2 * two, "a rank of one replica needs more, but there is one of them"
    monkeypatch.setattr(setup, "room", lambda device: {"physical memory": 2 * two - 1})
    why = setup._replicas(plan, world)
    assert not why[1] and "the state of 2 ranks" in why[2] and "physical memory on a is" in why[2]


def test_who_is_needed_for_anything_to_go_on() -> None:
    assert members(Topology(dp=3)).next_world({1, 2}) == (
        [], "the run cannot go on without launched rank 0: its supervisor decides"
    )  # fmt: skip
    all_of_them = members(Topology(dp=3), least=0, replicas=[])
    assert all_of_them.next_world({0, 1, 2}) == ([0, 1, 2], "") and all_of_them.next_world({0, 2})[0] == []
    assert all_of_them.begin([0, 1, 2]) is None


def test_what_a_rank_is_told_makes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    own = members(Topology(dp=3), launch={"master_addr": "n1", "master_port": 7, "attempt": 2})
    place = own.begin([0, 2])
    env = {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}
    launch = detect_launch(env, generation=1, place=place)
    assert (launch.rank, launch.world_size, launch.local_rank, launch.launched) == (1, 2, 2, 2)
    assert (launch.master_addr, launch.master_port, launch.attempt) == ("n1", 7, 2)
    monkeypatch.setattr(sys, "argv", ["-c", "root", "1,2,3", "4", "1", "megallama.pretrain", "a.toml"])
    assert own.lost() == [1] and own.answer({"seat": 1, "arguments": ["a.toml"]}) == {"why": ""}
    assert own.answer({"seat": 2, "arguments": ["a.toml"]}) == own.answer({"seat": 7, "arguments": ["a.toml"]}) == {}
    assert "and not with ['b.toml']" in own.answer({"seat": 1, "arguments": ["b.toml"]})["why"]


def test_a_rank_waits_until_it_has_a_place_or_all_is_over(tmp_path: Path) -> None:
    root, own, record = Links(), Links(), FlightReader()
    root.token, place = "secret", {"seat": 3, "seats": [], "folder": str(tmp_path)}
    record.tell("place", place)
    assert waits(record) == place and wait(record, place, own, []) is None  # there is no word of the root yet
    (tmp_path / "status").mkdir()
    port = root.listen("127.0.0.1")
    (tmp_path / "status" / "root").write_text(f'{{"address": "127.0.0.1", "port": {port}, "token": "secret"}}')
    signals = [15]
    heard = []
    for _ in range(100):
        assert wait(record, place, own, signals) is None
        heard += root.poll()
        if len(heard) > 1:
            break
    assert [*root.waiting()] == [3] and heard[1][1] == {"signals": [15]}
    for seats in ([0, 1], [0, 3]):
        root.send({"generation": len(seats) + seats[1], "place": {"seats": seats, "folder": str(tmp_path)}})
        while record.words[GENERATION] != len(seats) + seats[1]:
            assert wait(record, place, own, []) is None
        assert (waits(record) is None) == (3 in seats) == (own.sockets() == [])
    root.poll()
    assert root.waiting() == {}
    wait(record, place, own, [])
    while not root.waiting():
        root.poll()
    root.send({"end": 75})
    found = [status for _ in range(100) if (status := wait(record, place, own, [])) is not None]
    assert found[0] == 75


@pytest.mark.parametrize("over", [False, True])
def test_a_run_that_is_over_is_asked_for_nothing(over: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its port may be a stranger's by now."""
    asked = []
    monkeypatch.setattr(supervised, "_ask", lambda path, hello: asked.append(path))
    monkeypatch.setattr(sys, "argv", ["train", f"run.folder={tmp_path}"])
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    if over:
        (tmp_path / "exit.json").write_text("{}")
    supervised._ask_for_a_place(FlightReader())
    assert asked == ([] if over else [tmp_path / "status" / "root"])
