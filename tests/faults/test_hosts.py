"""Two hosts with a cable between them: what a run over a network meets. Skipped where network namespaces cannot be."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megallama.data.writer import IndexedWriter
from tests.faults.hosts import Hosts, why_not
from tests.faults.ranks import Ranks

BOUND = ["run.timeout_seconds=3", "data.timeout_seconds=3", "run.io_timeout_seconds=8", "run.init_timeout_seconds=6"]
ENDLESS = ["parallel.tp=2", "train.steps=1000000", *BOUND]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(f"no network namespaces: {reason}")
    with Hosts() as two:
        yield two


def over(
    hosts: Hosts, arguments: list[str], folder: Path, port: int = 29611, supervised: bool = False,
    fault: str = "", victim: int = 0, **env: str,
) -> Ranks:  # fmt: skip
    """A run of a rank on each host."""
    folder.mkdir(exist_ok=True)
    where: dict[str, Any] = {"MASTER_ADDR": hosts.addresses[0], "MASTER_PORT": port}
    where |= {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "GLOO_SOCKET_IFNAME": hosts.interface}
    planted: dict[str, Any] = {"fault": fault, "victim": victim, "supervised": supervised}
    return Ranks(2, arguments, folder, hosts=hosts.names, env=where | env, **planted)


def losses(folder: Path) -> list[float]:
    records = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "train"]


def test_a_run_over_a_network_is_that_of_one_host(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    assert over(hosts, ["parallel.tp=2", *BOUND], tmp_path / "two").wait() == [0, 0]
    assert Ranks(2, ["parallel.tp=2"], tmp_path / "one").wait() == [0, 0]
    assert losses(tmp_path / "two") == losses(tmp_path / "one") and len(losses(tmp_path / "two")) == 2


@pytest.mark.parametrize("fault", ["cut", "lose_one_way"])
def test_a_link_that_is_cut_ends_both_ranks(hosts: Hosts, tmp_path: Path, fault: str) -> None:
    ranks = over(hosts, ENDLESS, tmp_path)
    ranks.until("step 3/")
    getattr(hosts, fault)()
    began = time.monotonic()
    assert ranks.wait(90) == [4, 4]
    assert time.monotonic() - began < 60
    assert "in group tp" in ranks.said(0) or "of group tp (ranks (0, 1))" in ranks.said(0)


@pytest.mark.parametrize("fault", ["cut", "lose_one_way"])
def test_supervisors_name_the_host_that_is_cut_off(hosts: Hosts, tmp_path: Path, fault: str) -> None:
    ranks = over(hosts, ENDLESS, tmp_path, supervised=True)
    ranks.until("step 3/")
    getattr(hosts, fault)()
    began = time.monotonic()
    assert ranks.wait(90) == [4, 4]
    assert time.monotonic() - began < 20
    cut = f"rank 1 ({hosts.names[1]}) holds up the others: nothing is heard from its supervisor"
    assert cut in ranks.said(0), ranks.said(0)
    assert "rank 0 (" + hosts.names[0] in ranks.said(1) and "holds up the others" in ranks.said(1)
    assert f"  rank 0 ({hosts.names[0]}) waits for 3." in (tmp_path / "run" / "run.log").read_text()


def held_out(folder: Path) -> list[str]:
    """Settings with an evaluation after every second step."""
    with IndexedWriter(folder / "held", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(40 * 16 + 1) % 61)
    return [f'data.valid=[{{path="{folder / "held"}"}}]', "eval.interval=2", "eval.batches=1"]


def test_a_host_that_is_cut_off_is_not_waited_for_as_a_disk_is(hosts: Hosts, tmp_path: Path) -> None:
    """In an evaluation, a save, and before and after the first thing that is opened: three runs at once."""
    where = ["train.loop evaluate 60", "checkpoint.manager write_checkpoint 60", "train.setup assemble 60"]
    where += ["train.setup open_sources 60"]
    slow = ["run.io_timeout_seconds=50", "checkpoint.interval=2", "checkpoint.async_save=false", *held_out(tmp_path)]
    runs = [
        over(hosts, [*ENDLESS, *slow], tmp_path / str(i), 29611 + i, True, "stands_still", 1, PLANTED=planted)
        for i, planted in enumerate(where)
    ]
    for ranks in runs:
        ranks.until("it stands still", 1)
    time.sleep(2.5)
    hosts.cut()
    began = time.monotonic()
    for i, ranks in enumerate(runs):
        assert ranks.wait(20) == ([4, 4] if i < 2 else [1, 1]), where[i]
        cut = f"rank 1 ({hosts.names[1]}) holds up the others: nothing is heard from its supervisor"
        assert cut in ranks.said(0), ranks.said(0)
        assert f"rank 0 ({hosts.names[0]}) holds up the others: nothing is heard" in ranks.said(1)
    assert time.monotonic() - began < 9


def test_a_slow_disk_is_waited_for_longer_than_a_step_may_take(hosts: Hosts, tmp_path: Path) -> None:
    """Even where the supervisor beside it cannot write its status."""
    slow = ["parallel.tp=2", *BOUND, "run.io_timeout_seconds=50", "checkpoint.async_save=false"]
    where = "checkpoint.manager write_checkpoint 6"
    ranks = over(hosts, slow, tmp_path, supervised=True, fault="stands_still", victim=1, PLANTED=where)
    stuck = tmp_path / "run" / "status" / f".{hosts.names[1]}.json.{ranks.processes[1].pid}"
    while not stuck.parent.exists():
        time.sleep(0.01)
    os.mkfifo(stuck)  # nobody reads it
    assert ranks.wait(40) == [0, 0]
    assert "silent" not in ranks.said(0) + ranks.said(1) and "step 2/" in ranks.said(0)
    assert stuck.is_fifo()


def test_supervisors_of_two_hosts_tell_one_another(hosts: Hosts, tmp_path: Path) -> None:
    ranks = over(hosts, ENDLESS, tmp_path, supervised=True)
    ranks.until("step 3/")
    os.kill(ranks.trainer(1), signal.SIGSTOP)
    assert ranks.wait(60) == [4, 4]
    text = f"rank 1 ({hosts.names[1]}) holds up the others: its process is stopped (SIGSTOP)"
    assert text in ranks.said(0)
    killed = over(hosts, ENDLESS, tmp_path / "b", supervised=True)
    killed.until("step 3/")
    os.kill(killed.trainer(1), signal.SIGKILL)
    assert killed.wait(60) == [4, -9]
    assert f"rank 1 ({hosts.names[1]}) failed first: killed by SIGKILL (9)" in killed.said(0)


def test_who_is_killed_before_it_has_come_to_the_others_is_replaced(hosts: Hosts, tmp_path: Path) -> None:
    """Of two runs: its trainer, and the process that makes it. The others wait as for one that comes late."""
    arguments, runs = ["parallel.tp=2", "run.max_replacements=1"], list[Ranks]()
    for victim in range(2):
        where = f"comm.launch files_needed 60 {tmp_path / f'once-{victim}'}"
        folder, port = tmp_path / str(victim), 29611 + victim
        runs.append(over(hosts, arguments, folder, port, True, "stands_still", victim, PLANTED=where))
    for victim, ranks in enumerate(runs):
        ranks.until("it stands still", victim)
        os.kill(ranks.trainer(1) if victim else ranks.made(0), signal.SIGKILL)
    for victim, ranks in enumerate(runs):
        assert ranks.wait(30) == [0, 0]
        who = "the process that makes its trainers" if victim else "its trainer"
        assert f"warning: {who}: killed by SIGKILL (9); another is started (1 of 1)" in ranks.said(victim)
        assert len(losses(tmp_path / str(victim))) == 2


@pytest.mark.parametrize("victim", [0, 1])
def test_who_is_killed_once_two_hosts_have_met_is_replaced(hosts: Hosts, tmp_path: Path, victim: int) -> None:
    arguments = ["parallel.tp=2", "run.max_replacements=9"]
    ranks = over(hosts, arguments, tmp_path, supervised=True, fault="waits_when_they_have_met", victim=victim)
    time.sleep(2.0)
    os.kill(ranks.made(victim), signal.SIGKILL)
    assert ranks.wait(30) == [0, 0]
    cause = f"rank {victim} ({hosts.names[victim]}) failed first: killed by SIGKILL (9)"
    assert f"error: {cause}\nall ranks start again (replacement 1 of 9)" in ranks.said(0) + ranks.said(1)
    assert len(losses(tmp_path)) == 2


def test_a_host_that_is_gone_and_comes_back(hosts: Hosts, tmp_path: Path) -> None:
    arguments = [*ENDLESS, "checkpoint.interval=2"]
    ranks = over(hosts, arguments, tmp_path)
    ranks.until("step-00000004 (")
    hosts.cut()  # first: nobody hears of the death
    os.kill(ranks.processes[1].pid or 0, signal.SIGKILL)
    assert ranks.wait(90) == [4, -9]
    hosts.mend()
    again = over(hosts, [*arguments, "train.stop_after_steps=2"], tmp_path)
    assert again.wait() == [75, 75]
    assert "resumed after step" in again.said(0) and "quarantined" not in again.said(0)


def test_a_name_that_does_not_resolve_is_said_by_every_rank_that_needs_it(hosts: Hosts, tmp_path: Path) -> None:
    bound = [*BOUND[:-1], "run.init_timeout_seconds=2"]
    ranks = over(hosts, bound, tmp_path, MASTER_ADDR="no-such-host.invalid")
    began = time.monotonic()
    assert ranks.wait() == [2, 2]
    assert time.monotonic() - began < 45
    assert all("no-such-host.invalid:29611" in ranks.said(rank) for rank in range(2))


def test_two_jobs_on_the_same_hosts(hosts: Hosts, tmp_path: Path) -> None:
    first = over(hosts, ENDLESS, tmp_path / "a")
    first.until("step 2/")
    other = over(hosts, ["parallel.tp=2", *BOUND], tmp_path / "b", port=29612)
    assert other.wait() == [0, 0]
    same = over(hosts, ["parallel.tp=2", *BOUND], tmp_path / "c")  # the first one's port
    assert same.wait() == [2, 2]
    assert "port 29611" in same.said(0) and "is taken, perhaps by another run" in same.said(0)
    assert f"error: rank 1 ({hosts.names[1]}) came to {hosts.addresses[0]}, where all 2 ranks" in same.said(1)
    os.kill(first.processes[1].pid or 0, signal.SIGTERM)
    assert first.wait() == [75, 75]
