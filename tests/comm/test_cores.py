"""Ranks on GPUs keep to their part of the CPU cores near them: over imitations of /sys and of what a launcher left."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megallama.comm import cores, launch
from megallama.comm.cores import cores_near, keep_near
from megallama.comm.launch import Launch, start
from megallama.config.errors import ranges
from megallama.config.schema import RunConfig
from tests.cuda.test_start import Nvml


class Machine:
    """A node with GPUs: its /sys, what each rank may use, and what it was bound to."""

    def __init__(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, nodes: Sequence[str], gpus: Sequence[int | None],
        threads: int = 2,
    ) -> None:  # fmt: skip
        """nodes: lists of CPUs; gpus: the NUMA node of each; threads: of a core, the second half of the numbers."""
        self.sys, self.at = root / "sys", 0
        for number, cpus in enumerate(nodes):
            self.write(f"devices/system/node/node{number}/cpulist", cpus)
        self.all = sorted({cpu for text in nodes for cpu in self.numbers(text)})
        cores_ = max(1, len(self.all) // threads)
        for cpu in self.all:
            siblings = ",".join(str(c) for c in self.all if c % cores_ == cpu % cores_)
            self.write(f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", siblings)
        for number, node in enumerate(gpus):
            if node is not None:
                self.write(f"bus/pci/devices/0001:{16 + number:02x}:1f.0/numa_node", str(node))
        self.may = {rank: set(self.all) for rank in range(len(gpus))}
        self.set: dict[int, set[int]] = {}
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: self.set.get(self.at, self.may[self.at]))
        monkeypatch.setattr(os, "sched_setaffinity", self.bind)
        monkeypatch.setattr(os, "cpu_count", lambda: len(self.all))
        monkeypatch.setattr(torch.cuda, "get_device_properties", self.properties)

    @staticmethod
    def numbers(text: str) -> list[int]:
        return [
            c for run in text.split(",") for a, _, b in [run.partition("-")] for c in range(int(a), int(b or a) + 1)
        ]

    def write(self, path: str, text: str) -> None:
        file = self.sys / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")

    def properties(self, device: torch.device) -> SimpleNamespace:
        """Where the GPU of this number is: domain 1, bus 0x10 and more, device 0x1f."""
        return SimpleNamespace(pci_domain_id=1, pci_bus_id=16 + (device.index or 0), pci_device_id=31, uuid="GPU-1")

    def bind(self, thread: int, cpus: Sequence[int]) -> None:
        assert cpus and set(cpus) <= self.may[self.at], "what it was given is never widened"
        self.set[self.at] = set(cpus)

    def settle(self, ranks: int) -> list[tuple[int, str]]:
        """Every rank in turn: how many share its CPUs, and its line in the log."""
        near = []
        for self.at in range(ranks):
            near.append(cores_near(torch.device("cuda", self.at), self.sys))
        here = {rank: (str(sorted(self.may[rank])), ranges(near[rank])) for rank in range(ranks)}
        said = []
        for self.at in range(ranks):
            said.append(keep_near(near[self.at], self.at, here, self.sys))
        return said


def test_eight_gpus_on_two_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fourth of its socket for each, both threads of a core together; GPUs in an order of their own."""
    machine = Machine(tmp_path, monkeypatch, ["0-47,96-143", "48-95,144-191"], [1, 1, 0, 0, 1, 1, 0, 0])
    said = machine.settle(8)
    starts = [48, 60, 0, 12, 72, 84, 24, 36]
    for rank, first in enumerate(starts):
        assert machine.set[rank] == {*range(first, first + 12), *range(first + 96, first + 108)}
    assert said[0] == (1, "CPU cores 48-59, 144-155 near its GPU, its part of those of 4 ranks; memory by first use")
    assert {sharing for sharing, _ in said} == {1}
    assert set.union(*machine.set.values()) == set(machine.all)


def test_one_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where parts cannot be equal they differ by a core, and none is left over or given twice."""
    machine = Machine(tmp_path, monkeypatch, ["0-9"], [0] * 4, threads=1)
    machine.settle(4)
    assert [sorted(machine.set[rank]) for rank in range(4)] == [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]


def test_one_rank_takes_the_socket_of_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, monkeypatch, ["0-3", "4-7"], [1], threads=1)
    said = machine.settle(1)
    assert machine.set == {0: {4, 5, 6, 7}}
    assert said == [(1, "CPU cores 4-7 near its GPU, shared by 1 rank; memory by first use")]


@pytest.mark.parametrize("node", [-1, None, 7], ids=["minus one", "no file", "node without CPUs"])
def test_where_sys_says_nothing_nothing_is_done(
    node: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path, monkeypatch, ["0-7"], [node, node])
    said = machine.settle(2)
    assert machine.set == {}
    assert said == [(2, "CPU cores 0-7, as it was started; none of these 8 known to be near its GPU")] * 2


def test_a_gpu_without_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, monkeypatch, ["0-7"], [0])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="old"))
    assert machine.settle(1)[0][0] == 1 and machine.set == {}


def test_what_slurm_gave_each_rank_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own part for each, also where that is far from the GPU: this is said."""
    machine = Machine(tmp_path, monkeypatch, ["0-7", "8-15"], [1, 0, 1, 0], threads=1)
    machine.may = {rank: set(range(4 * rank, 4 * rank + 4)) for rank in range(4)}
    said = machine.settle(4)
    assert machine.set == {}
    far = "CPU cores 0-3, as it was started; none of these 4 known to be near its GPU"
    near = "CPU cores 4-7, as it was started; 4 of these 4 known to be near its GPU"
    assert said[0] == (1, far) and said[1] == (1, near)


def test_of_what_slurm_gave_the_job_each_rank_takes_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, monkeypatch, ["0-7", "8-15"], [0, 0, 1], threads=1)
    machine.may = {rank: {2, 3, 4, 5, 12, 13} for rank in range(3)}
    said = machine.settle(3)
    assert machine.set == {0: {2, 3}, 1: {4, 5}, 2: {12, 13}}
    assert [sharing for sharing, _ in said] == [1, 1, 1]


def test_a_single_rank_that_was_given_a_part_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, monkeypatch, ["0-7", "8-15"], [0], threads=1)
    machine.may = {0: {6, 7, 8, 9}}
    assert machine.settle(1) == [(1, "CPU cores 6-9, as it was started; 2 of these 4 known to be near its GPU")]
    assert machine.set == {}


def test_fewer_cores_than_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All have all of those near them: two threads of one core are no two cores."""
    machine = Machine(tmp_path, monkeypatch, ["0-1,4-5", "2-3,6-7"], [0] * 3 + [1])
    said = machine.settle(4)
    assert machine.set == dict.fromkeys(range(3), {0, 1, 4, 5}) | {3: {2, 3, 6, 7}}
    assert [sharing for sharing, _ in said] == [3, 3, 3, 1]
    assert said[0][1] == "CPU cores 0, 1, 4, 5 near its GPU, shared by 3 ranks; memory by first use"


def test_what_the_machine_refuses_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, monkeypatch, ["0-7"], [0, 0], threads=1)

    def refuse(thread: int, cpus: Sequence[int]) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    sharing, line = machine.settle(2)[1]
    assert sharing == 2
    assert line == (
        "CPU cores 0-7, as it was started, and not bound to 4-7 near its GPU: [Errno 1] Operation not permitted"
    )


def started(monkeypatch: pytest.MonkeyPatch, machine: Machine, ranks: int, **run: str) -> list[str]:
    """What is said by the last rank of a run on GPUs, all of whose ranks are here."""
    Nvml(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_properties", machine.properties)
    monkeypatch.setattr(launch, "cores_near", lambda device: cores_near(device, machine.sys))
    monkeypatch.setattr(launch, "keep_near", lambda *what: keep_near(*what, machine.sys))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    machine.at = ranks - 1
    with start(Launch(machine.at, ranks, machine.at), RunConfig.model_validate({"device": "cuda", **run})) as world:
        return world.notes


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_run_binds_says_so_and_can_be_told_not_to(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the threads of a rank counted after that."""
    machine = Machine(tmp_path, monkeypatch, ["0-15", "16-31"], [0] * 4, threads=1)
    notes = started(monkeypatch, machine, ranks, bind_cores="off")
    assert machine.set == {} and not any(note.startswith("CPU cores") for note in notes)
    assert f"{32 // ranks} CPU threads per rank (32 cores for {'1 rank' if ranks == 1 else '4 ranks'})" in notes
    notes = started(monkeypatch, machine, ranks)
    assert machine.set == {ranks - 1: set(range(16 - 16 // ranks, 16))}
    assert [note for note in notes if note.startswith(f"CPU cores {16 - 16 // ranks}-15 near")] != []
    assert f"{16 // ranks} CPU threads per rank ({16 // ranks} cores for 1 rank)" in notes


def test_a_run_on_cpus_looks_at_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "cores_near", lambda device: pytest.fail("asked"))
    before = os.sched_getaffinity(0)
    with start(Launch(), RunConfig(device="cpu")) as world:
        assert not any(note.startswith("CPU cores") for note in world.notes)
    assert os.sched_getaffinity(0) == before


def test_every_thread_that_runs_is_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The binding of a process is that of its main thread alone; one that has ended meanwhile is passed over."""
    machine, seen = Machine(tmp_path, monkeypatch, ["0-7"], [0], threads=1), []

    def bind(thread: int, cpus: Sequence[int]) -> None:
        seen.append((thread, *cpus))
        if thread == 12:
            raise ProcessLookupError

    monkeypatch.setattr(os, "sched_setaffinity", bind)
    monkeypatch.setattr(cores.os, "listdir", lambda path: {"/proc/self/task": ["11", "12", "13"]}[path])
    machine.settle(1)
    assert seen == [(thread, *range(8)) for thread in (11, 12, 13)]
