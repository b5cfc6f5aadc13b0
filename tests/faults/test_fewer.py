"""Ranks that are lost for good: the run goes on with the replicas that are left, and with all once they are back."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megallama.recovery import status
from tests.faults.hosts import Hosts
from tests.faults.ranks import Ranks
from tests.faults.test_hosts import hosts as hosts  # the fixture
from tests.faults.test_hosts import over

STEPS = 40
RUN = [f"train.steps={STEPS}", "log.interval=1", "run.timeout_seconds=6", "data.timeout_seconds=6", "log.plot=false",
       "precision.dtype=fp64", "batch.global_batch_size=24", "checkpoint.interval=5"]  # fmt: skip
FEWER = ["run.max_replacements=9", "run.max_failed_starts=0", "checkpoint.memory_interval=1"]


def run(folder: Path, *arguments: str, size: int = 4) -> Ranks:
    folder.mkdir(exist_ok=True)
    return Ranks(size, [*RUN, *arguments], folder, supervised=True)


def lose(ranks: Ranks, rank: int) -> None:
    os.kill(ranks.processes[rank].pid or 0, signal.SIGKILL)


def records(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    return lines


def weights(folder: Path) -> dict[str, Any]:
    files = (folder / "run" / "checkpoints" / f"step-{STEPS:08d}" / "model").glob("*.safetensors")
    return {name: tensor for file in sorted(files) for name, tensor in load_file(file).items()}


def end_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / "exit.json").read_text())
    return found


def test_a_lost_rank_is_done_without_until_it_is_back(tmp_path: Path) -> None:
    """Losses and weights are those of a run to which nothing happens, but for rounding."""
    ranks = run(tmp_path / "own", "run.min_replicas=2", *FEWER)
    ranks.until("saved ")
    lose(ranks, 1)
    ranks.until("3 ranks over gloo")
    ranks.start_again(1)
    assert ranks.wait(90) == [0, 0, 0, 0]
    assert "waits for a place in the run in" in ranks.said(1)
    log, pid = ranks.said(0), r"its supervisor \(process \d+\) was killed"
    assert re.search(rf"error: rank 1 \(\S+\) failed first: {pid}\nall ranks start again \(replacement 1 of 9\)\n", log)
    lost = "3 of 4 replicas, of launched ranks 0, 2, 3 as ranks 0-2; lost: 1; 25% of the launched ranks idle\n"
    assert f"the world changes: {lost}" in log
    back = "launched rank 1 can go on: all ranks save, stop and start again (replacement 2 of 9)\n"
    assert back in log and "the world changes: 4 of 4 replicas, of launched ranks 0-3\n" in log
    (stopped,) = re.findall(r"stopped: SIGUSR1 on 1 rank; saved at step (\d+), all ranks start again", log)
    resumed = re.findall(r"resumed after step (\d+), .* from (\S+)", log)
    assert [int(step) for step, _ in resumed][-1] == int(stopped), "nothing is made again"
    assert resumed[-1][1].endswith(f"/step-{int(stopped):08d}")
    assert (tmp_path / "own" / "run" / "logs" / "rank-0003.log").read_text().count("over gloo") == 3, "one file each"
    assert end_of(tmp_path / "own")["status"] == 0
    plain = run(tmp_path / "plain", size=1)  # one rank
    assert plain.wait() == [0]
    for own, want in zip(records(tmp_path / "own"), records(tmp_path / "plain"), strict=True):
        assert own["loss"] == pytest.approx(want["loss"], rel=1e-10)
        assert (own["consumed_samples"], own["lr"]) == (want["consumed_samples"], want["lr"])
    found = weights(tmp_path / "own")
    for name, tensor in weights(tmp_path / "plain").items():
        assert (found[name] - tensor).abs().max() <= 1e-10 * tensor.abs().max(), name


def test_the_other_ranks_of_a_broken_replica_wait_without_work(tmp_path: Path) -> None:
    ranks = run(tmp_path, "run.min_replicas=1", *FEWER, "parallel.tp=2", "train.steps=100000")
    ranks.until("saved ")
    lose(ranks, 3)
    ranks.until("2 ranks over gloo")
    change = "1 of 2 replicas, of launched ranks 0, 1; lost: 3; waiting without work: 2; 50% of the launched ranks"
    assert change in ranks.said(0)
    ranks.until("resumed after")
    maker = ranks.trainer(2)
    os.kill(maker, signal.SIGKILL)
    ranks.until("killed by SIGKILL (9); another is started (1 of 9)", rank=2)
    assert ranks.trainer(2) != maker
    os.kill(ranks.processes[2].pid or 0, signal.SIGUSR1)  # whom it reaches does not matter
    assert ranks.wait(30) == [75, 75, 75, -9]
    assert end_of(tmp_path)["status"] == 75
    text = "\n".join(status.lines(status.read(tmp_path / "run"), 0.0))
    assert "launched rank 2 waits without work on " in text and "launched rank 3 is lost" in text, text


def test_where_too_few_are_left_the_run_ends(tmp_path: Path) -> None:
    ranks = run(tmp_path, "run.min_replicas=2", *FEWER, "train.steps=100000", size=2)
    ranks.until("saved ")
    lose(ranks, 1)
    assert ranks.wait(30) == [4, -9]
    why = "the run cannot go on without launched rank 1: 1 of 2 replicas are whole, run.min_replicas=2"
    assert why in ranks.said(0) and why in end_of(tmp_path)["cause"]
    assert "start again" not in ranks.said(0)


def test_a_rank_that_is_there_or_was_started_otherwise_is_refused(tmp_path: Path) -> None:
    ranks = run(tmp_path, "run.min_replicas=1", *FEWER, "train.steps=100000", size=2)
    ranks.until("saved ")
    lose(ranks, 1)
    ranks.until("resumed after")
    ranks.start_again(1, "train.seed=9")
    ranks.processes[1].join(45)
    assert ranks.processes[1].exitcode == 2 and "it was started with [" in ranks.said(1)
    os.kill(ranks.processes[0].pid or 0, signal.SIGTERM)
    assert ranks.wait(30) == [75, 2]


def test_a_host_that_is_gone_is_done_without_until_it_is_back(hosts: Hosts, tmp_path: Path) -> None:
    arguments = [*RUN, *FEWER, "run.min_replicas=1", "train.steps=100000", "run.timeout_seconds=3"]
    ranks = over(hosts, [*arguments, "data.timeout_seconds=3"], tmp_path, supervised=True)
    ranks.until("saved ")
    hosts.cut()
    ranks.until("1 of 2 replicas, of launched ranks 0; lost: 1; 50% of")
    assert f"({hosts.names[1]}) holds up the others: nothing is heard from its supervisor" in ranks.said(0)
    hosts.mend()
    again(ranks)
    ranks.start_again(1)
    ranks.until("launched rank 1 can go on", seconds=30)
    ranks.until("2 of 2 replicas, of launched ranks 0, 1")
    again(ranks)
    os.kill(ranks.processes[1].pid or 0, signal.SIGTERM)
    assert ranks.wait(30) == [75, 75]


def again(ranks: Ranks) -> None:
    """Wait until trainers have resumed once more, and made steps."""
    starts, deadline = ranks.said(0).split("resumed after"), time.monotonic() + 60
    while len(now := ranks.said(0).split("resumed after")) == len(starts) or now[-1].count("| loss") < 3:
        assert time.monotonic() < deadline, ranks.said(0)
        time.sleep(0.05)
