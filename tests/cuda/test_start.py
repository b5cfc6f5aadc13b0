"""How ranks start on GPUs: the environment before CUDA is touched, process groups, who connects when."""

from __future__ import annotations

import ast
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import megallama
from megallama.comm import launch
from megallama.comm.c10d import C10d
from megallama.comm.flight_record import FlightRecord
from megallama.comm.launch import Launch, World, cuda_environment, start
from megallama.comm.rendezvous import Arrival
from megallama.config.errors import LaunchError
from megallama.config.schema import RunConfig
from megallama.plan.topology import Topology
from megallama.pretrain import main
from tests.small import small_config

ONE_QUEUE, WORKSPACE = ("CUDA_DEVICE_MAX_CONNECTIONS", "1"), ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
CASES: list[tuple[int, bool, dict[str, str]]] = [
    (1, False, {}),
    (1, True, dict([WORKSPACE])),
    (2, False, dict([ONE_QUEUE])),
    (2, True, dict([ONE_QUEUE, WORKSPACE])),
]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (ONE_QUEUE[0], WORKSPACE[0], "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that what a test sets is taken back
        monkeypatch.delenv(name)


@pytest.mark.parametrize(("tp", "deterministic", "wanted"), CASES)
def test_what_cuda_shall_find_follows_from_the_configuration(
    tp: int, deterministic: bool, wanted: dict[str, str]
) -> None:
    config = small_config(parallel={"tp": tp}, train={"deterministic": deterministic})
    assert cuda_environment(config) == wanted


TOUCHES = ("is_available", "device_count", "current_device", "get_device_properties", "get_device_name", "init")


def test_the_environment_is_there_when_cuda_is_first_touched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[str, str | None]] = []

    def touch(name: str) -> Callable[..., bool]:
        def touched(*args: object, **named: object) -> bool:
            seen.append((name, os.environ.get(WORKSPACE[0])))
            raise LaunchError("seen")

        return touched

    for name in TOUCHES:
        monkeypatch.setattr(torch.cuda, name, touch(name))
    small = ["model.hidden_size=32", "model.num_layers=2", "model.num_heads=4", "model.ffn_hidden_size=48"]
    rest = ["model.vocab_size=61", "data.synthetic=true", f"run.folder={tmp_path}", "train.deterministic=true"]
    for device in ("cuda", "auto"):
        monkeypatch.delenv(WORKSPACE[0], raising=False)
        seen.clear()
        assert main([*small, *rest, f"run.device={device}"]) == 2
        assert seen == [("is_available", ":4096:8")]


class Nvml:
    """As much of torch.cuda as a start uses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.init: list[tuple[Any, ...]] = []
        self.new: list[tuple[Any, ...]] = []
        properties = SimpleNamespace(uuid="GPU-1", name="H100", total_memory=80 << 30)
        fakes: dict[str, Callable[..., Any]] = {
            "is_available": lambda: True, "device_count": lambda: 8, "set_device": lambda device: None,
            "get_device_name": lambda device: "H100", "get_device_properties": lambda device: properties,
        }  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(launch, "StreamRecord", lambda record, device: record)
        monkeypatch.setattr(dist, "init_process_group", lambda *args, **named: self.init.append((args, named)))
        monkeypatch.setattr(dist, "new_group", lambda *args, **named: self.new.append((args, named)) or "pg")
        monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
        monkeypatch.setattr(launch, "_gather", self._gather)

    @staticmethod
    def _gather(where: Launch, own: Arrival, *rest: Any) -> tuple[list[Arrival], dist.Store]:
        others = [replace(own, rank=rank) for rank in range(own.world_size)]
        return others, dist.HashStore()


def test_what_was_set_is_said_and_what_was_there_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    Nvml(monkeypatch)
    monkeypatch.setenv(ONE_QUEUE[0], "8")
    with start(Launch(), RunConfig(device="cuda"), cuda=dict([ONE_QUEUE, WORKSPACE])) as world:
        assert world.notes[:2] == [
            "CUDA_DEVICE_MAX_CONNECTIONS=8 (found in the environment, not 1)",
            "CUBLAS_WORKSPACE_CONFIG=:4096:8",
        ]
    assert (os.environ[ONE_QUEUE[0]], os.environ[WORKSPACE[0]]) == ("8", ":4096:8")


def test_a_run_on_cpus_sets_nothing() -> None:
    with start(Launch(), RunConfig(device="cpu"), cuda=dict([ONE_QUEUE, WORKSPACE])) as world:
        assert not any("CUDA" in note or "CUBLAS" in note for note in world.notes)
    assert ONE_QUEUE[0] not in os.environ and WORKSPACE[0] not in os.environ


def test_nccl_makes_its_groups_without_a_device_and_gloo_makes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A communicator for each pair of ranks, and nothing that wants an interface or a socket to every rank."""
    fake, warmed = Nvml(monkeypatch), list[str]()
    monkeypatch.setattr(C10d, "warm_up", lambda self: warmed.append(self.name))
    with start(Launch(1, 8), RunConfig(device="cuda", shared_memory=True)) as world:
        world.groups(Topology(tp=2, pp=2, dp=2), num_kv_heads=1)
        names = [type(group).__name__ for group in world.opened]
    ((args, named),) = fake.init
    assert args[:2] == ("nccl", None) and named == {}
    assert len(fake.new) == 6  # pp twice, one for each direction
    for args, named in fake.new:
        assert named == {"use_local_synchronization": True} and len(args) == 2
    assert names == ["C10d"] * 6 and warmed == ["world", "tp", "dp", "pp", "embedding", "kv"]
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    keywords = [
        f"{path.name}: {node.arg}"
        for path in Path(megallama.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.keyword) and node.arg == "device_id"
    ]
    assert keywords == []


def connecting(monkeypatch: pytest.MonkeyPatch, topology: Topology, heads: int) -> list[list[tuple[str, Any]]]:
    """Of every rank the groups that it connects, in order."""
    orders: list[list[tuple[str, Any]]] = []
    monkeypatch.setattr(dist, "new_group", lambda *args, **named: object())
    for rank in range(topology.world_size):
        own: list[tuple[str, Any]] = []
        monkeypatch.setattr(C10d, "warm_up", lambda self, own=own: own.append((self.name, self.ranks)))
        hosts = ("here",) * topology.world_size
        world = World(Launch(rank, topology.world_size), torch.device("cuda"), launch.Solo(), hosts)
        world.group = world.open_group("world", [tuple(range(topology.world_size))])
        world.groups(topology, heads)
        orders.append(own)
    return orders


def stuck(orders: Sequence[Sequence[tuple[str, Any]]]) -> dict[int, tuple[str, Any]]:
    """Where ranks stand for ever that each enter the next group when all its members have entered the one before."""
    at = defaultdict[int, int](int)
    here = {rank: order[0] for rank, order in enumerate(orders) if order}
    while ready := [one for one in set(here.values()) if all(here.get(rank) == one for rank in one[1])]:
        for rank in ready[0][1]:
            at[rank] += 1
            rest = orders[rank][at[rank] :]
            here.pop(rank)
            here |= {rank: rest[0]} if rest else {}
    return here


@pytest.mark.parametrize(
    ("axes", "heads"),
    [({"tp": 2, "pp": 2, "dp": 2}, 4), ({"tp": 4, "dp": 2}, 2), ({"pp": 4, "dp": 2}, 1), ({"tp": 2, "pp": 3}, 1)],
    ids=str,
)
def test_all_communicators_come_up_before_the_first_step_in_one_order(
    axes: dict[str, int], heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = Topology(**axes)
    orders = connecting(monkeypatch, topology, heads)
    assert stuck(orders) == {}
    names = {name for order in orders for name, _ in order}
    assert names >= {"world", *axes} and ("embedding" in names) == ("pp" in axes)
    several = next(order for order in orders if len(order) > 2)
    several[1:] = several[:0:-1]
    assert stuck(orders), "one rank in another order would have waited for ever"


def test_a_group_connects_by_one_small_sum_and_a_pipeline_by_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, Any]] = []
    work = SimpleNamespace(wait=lambda *limit: None)
    monkeypatch.setattr(dist, "all_reduce", lambda t, op, group, async_op: done.append(("sum", group)) or work)
    monkeypatch.setattr(dist, "isend", lambda t, group, group_dst, tag: done.append((f"to {group_dst}", group)) or work)
    monkeypatch.setattr(dist, "irecv", lambda t, group, group_src, tag: done.append((f"of {group_src}", group)) or work)
    for operation in ("all_reduce", "isend", "irecv"):
        monkeypatch.setattr(getattr(dist, operation), "__name__", operation, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append(("host waits", device.type)))
    cpu: Any = torch.device("cpu")
    for name, down in (("tp", None), ("pp", "down")):
        group = C10d("up", name, (3, 5, 7), 5, cpu, down, FlightRecord())  # type: ignore[arg-type]
        group._direct = False
        assert done == [], "a group connects when all are made"
        group.warm_up()
        if name == "tp":
            assert done == [("sum", "up")]
            done.clear()
    messages = [("of 0", "up"), ("to 0", "down"), ("to 2", "up"), ("of 2", "down")]
    assert done == [*messages, ("host waits", "cpu")]
