"""Dead and stuck ranks are replaced in place: the run goes on, and no bit of its result differs."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from megallama.checkpoint.disk import HEAD
from megallama.recovery.copy_files import SHM, name_of
from tests.faults.hosts import Hosts
from tests.faults.ranks import Ranks
from tests.faults.test_hosts import hosts as hosts  # the fixture
from tests.faults.test_hosts import over

STEPS = 40
RUN = [f"train.steps={STEPS}", "log.interval=1", "run.timeout_seconds=6", "data.timeout_seconds=6", "log.plot=false"]
REPLACE = ["run.max_replacements=9", "run.max_failed_starts=0"]


def run(folder: Path, *arguments: str, size: int = 2, **more: Any) -> Ranks:
    folder.mkdir(exist_ok=True)
    return Ranks(size, [*RUN, *arguments], folder, supervised=True, **more)


def result(folder: Path, steps: int = STEPS) -> tuple[list[float], list[bytes]]:
    """Losses of all steps, and the bits of the state at the end."""
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [*range(1, steps + 1)]
    state = folder / "run" / "checkpoints" / f"step-{steps:08d}"
    files = sorted([*(state / "model").glob("*.safetensors"), *(state / "optimizer").glob("*.safetensors")])
    assert len(files) > 1
    return [r["loss"] for r in records], [file.read_bytes() for file in files]


@pytest.fixture(scope="module")
def want(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], list[bytes]]:
    """Of the run to which nothing happens."""
    folder = tmp_path_factory.mktemp("plain")
    assert run(folder, "parallel.tp=2").wait() == [0, 0]
    return result(folder)


def maker(ranks: Ranks, rank: int) -> int:
    """The process that makes the trainers of a rank."""
    return ranks.trainer(rank)


def trainer(ranks: Ranks, rank: int) -> int:
    return ranks.made(rank)


def step_of(ranks: Ranks) -> int:
    return max((int(step) for step in re.findall(r"step (\d+)/", ranks.said(0))), default=0)


def reach(ranks: Ranks, step: int) -> None:
    ranks.until(f"step {step}/")


def test_a_killed_and_a_frozen_rank_are_replaced_from_memory(tmp_path: Path, want: Any) -> None:
    ranks = run(tmp_path, "parallel.tp=2", *REPLACE, "checkpoint.memory_interval=1")
    for step, victim, number in ((3, 1, signal.SIGKILL), (10, 0, signal.SIGKILL), (17, 0, signal.SIGSTOP)):
        reach(ranks, step)
        os.kill(trainer(ranks, victim), number)
    assert ranks.wait(90) == [0, 0]
    assert result(tmp_path) == want
    said = ranks.said(0)
    for number, text in ((1, "rank 1"), (2, "rank 0"), (3, "rank 0")):
        again = rf"all ranks start again \(replacement {number} of 9\)"
        assert re.search(rf"error: {text} \(\S+\) .*\n(.*\n)*?{again}", said), said
    resumed = [int(step) for step in re.findall(r"resumed after step (\d+), .* from memory", said)]
    assert len(resumed) == said.count("start again") and resumed == sorted(resumed)
    assert all(step >= at - 1 for step, at in zip(resumed, (3, 10, 17), strict=False)), resumed
    goodput = json.loads((tmp_path / "run" / "goodput.json").read_text())
    assert goodput["restarts"] == len(resumed) and goodput["step"] == STEPS
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["status"] == 0


def test_so_it_is_in_a_later_phase(tmp_path: Path) -> None:
    """The copy is one of the second phase; the newest checkpoint is of the end of the first, step 3."""
    ends = ["{until_tokens=192}", "{until_tokens=1472, seq_length=32, rope_theta=500}"]  # 3 and 10 steps
    words = ["parallel.tp=2", f"train.phases=[{','.join(ends)}]", *RUN[1:], "train.steps=13"]
    for name, more in (("plain", []), ("killed", [*REPLACE, "checkpoint.memory_interval=1"])):
        (folder := tmp_path / name).mkdir()
        ranks = Ranks(2, [*words, *more], folder, supervised=True)
        if more:
            reach(ranks, 7)
            os.kill(trainer(ranks, 1), signal.SIGKILL)
        assert ranks.wait(90) == [0, 0]
    assert result(tmp_path / "killed", 13) == result(tmp_path / "plain", 13)
    (resumed,) = re.findall(r"resumed after step (\d+), .* from memory", said := ranks.said(0))
    assert int(resumed) >= 6, said


def test_a_start_with_no_step_to_make_says_where_the_run_is(tmp_path: Path) -> None:
    for _ in range(2):
        assert run(tmp_path, "parallel.tp=2", "train.steps=3").wait(90) == [0, 0]
        said = json.loads((tmp_path / "run" / "exit.json").read_text())
        assert (said["status"], said["step"], said["cause"]) == (0, 3, "finished")


def test_without_copies_the_newest_checkpoint_is_taken(tmp_path: Path, want: Any) -> None:
    ranks = run(tmp_path, "parallel.tp=2", *REPLACE, "checkpoint.interval=5", "checkpoint.resume=fresh")
    reach(ranks, 8)
    ranks.until("saved ")  # behind the training's back, which a busy machine may hold up
    os.kill(trainer(ranks, 0), signal.SIGKILL)
    assert ranks.wait(90) == [0, 0]
    assert result(tmp_path) == want
    assert re.search(r"resumed after step (5|10), .* from \S+/step-0000000?(5|10)", ranks.said(0))  # and not anew


def test_after_so_many_the_run_ends(tmp_path: Path) -> None:
    ranks = run(tmp_path, "run.max_replacements=1", "checkpoint.memory_interval=2", "train.steps=100000")
    reach(ranks, 3)
    os.kill(trainer(ranks, 1), signal.SIGKILL)
    ranks.until("from memory")
    ranks.until("step 9/")
    os.kill(trainer(ranks, 1), signal.SIGKILL)
    assert ranks.wait(60) == [4, -9]
    assert "failed first: killed by SIGKILL (9)" in json.loads((tmp_path / "run" / "exit.json").read_text())["cause"]


def test_a_fault_that_comes_again_ends_the_run_by_the_count_of_starts(tmp_path: Path) -> None:
    """In its first step, every time: no start makes one."""
    arguments = ["run.max_replacements=50", "run.max_failed_starts=2", "checkpoint.memory_interval=1"]
    ranks = run(tmp_path, *arguments, fault="fails_at_once", victim=1)
    assert ranks.wait(90) == [2, 2]
    assert "2 starts in a row ended before a step was finished" in ranks.said(0)
    assert ranks.said(0).count("all ranks start again") == 2


def test_who_makes_the_trainers_is_replaced_too(tmp_path: Path, want: Any) -> None:
    """By its spare, or, where that has died too, by one that starts from nothing; the copies are the supervisor's."""
    ranks = run(tmp_path, "parallel.tp=2", *REPLACE, "checkpoint.memory_interval=1")
    reach(ranks, 3)
    supervisor = ranks.processes[1].pid
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children")
    (first, spare), other, gone = map(int, children.read_text().split()), maker(ranks, 0), trainer(ranks, 1)
    os.kill(first, signal.SIGKILL)
    ranks.until("from memory")
    assert maker(ranks, 0) == other and maker(ranks, 1) == spare and not Path(f"/proc/{gone}/stat").exists()
    reach(ranks, 12)
    second = [int(pid) for pid in children.read_text().split()]
    assert len(second) == 2 and second[0] == spare
    for pid in reversed(second):
        os.kill(pid, signal.SIGKILL)
    assert ranks.wait(90) == [0, 0]
    assert result(tmp_path) == want
    said = ranks.said(0)
    cause = r"rank 1 \(\S+\) failed first: the process that makes its trainers: killed by SIGKILL \(9\)"
    for number in (1, 2):
        assert re.search(rf"{cause}\nall ranks start again \(replacement {number} of 9\)", said), said
    resumed = [int(step) for step in re.findall(r"resumed after step (\d+), .* from memory", said)]
    assert len(resumed) == 2 and all(step >= at - 1 for step, at in zip(resumed, (3, 12), strict=True)), resumed


def test_a_request_to_stop_reaches_the_trainers_of_later(tmp_path: Path) -> None:
    ranks = run(tmp_path, *REPLACE, "checkpoint.memory_interval=1", "train.steps=100000")
    reach(ranks, 3)
    os.kill(trainer(ranks, 1), signal.SIGKILL)
    ranks.until("start again")
    os.kill(ranks.processes[0].pid or 0, signal.SIGUSR1)  # while there may be none
    assert ranks.wait(60) == [75, 75]
    step = re.findall(r"saved at step (\d+)", ranks.said(0))
    stopped = "stopped before training began: SIGUSR1" in ranks.said(0)
    assert stopped or (tmp_path / "run" / "checkpoints" / f"step-{int(step[-1]):08d}").exists()


def test_ranks_of_two_hosts_are_replaced(hosts: Hosts, tmp_path: Path) -> None:
    arguments = ["parallel.tp=2", *RUN, *REPLACE, "checkpoint.memory_interval=1", "run.init_timeout_seconds=20"]
    ranks = over(hosts, arguments, tmp_path / "two", supervised=True)
    reach(ranks, 3)
    os.kill(trainer(ranks, 1), signal.SIGKILL)
    ranks.until("from memory")
    reach(ranks, 9)
    os.kill(trainer(ranks, 0), signal.SIGKILL)
    assert ranks.wait(90) == [0, 0]
    assert ranks.said(0).count("from memory") == 2
    plain = over(hosts, ["parallel.tp=2", *RUN], tmp_path / "plain")
    assert plain.wait(60) == [0, 0]
    assert result(tmp_path / "two") == result(tmp_path / "plain")


def kept(folder: Path) -> list[Path]:
    """The files of a run's copies."""
    return sorted(SHM.glob(name_of(str((folder / "run").resolve()), "*")))


def resumed(ranks: Ranks) -> int:
    """After which step the last start went on from memory."""
    found = re.findall(r"resumed after step (\d+), .* from (.*)", ranks.said(0))
    assert found and found[-1][1] == "memory", ranks.said(0)
    return int(found[-1][0])


def last_step(folder: Path) -> int:
    """That any rank has finished."""
    return len((folder / "run" / "metrics.jsonl").read_text().splitlines())


def test_a_host_loses_its_memory_and_has_it_back_from_the_other(hosts: Hosts, tmp_path: Path, want: Any) -> None:
    """One supervisor is killed, its host's files wiped; both are killed, a bit of each copy of one rank is flipped."""
    arguments = [*RUN, "parallel.tp=2", "checkpoint.memory_interval=1"]
    log = tmp_path / "run" / "logs" / "rank-0001.log"
    ranks = over(hosts, arguments, tmp_path, supervised=True)
    reach(ranks, 8)
    os.kill(ranks.processes[1].pid or 0, signal.SIGKILL)
    assert ranks.wait() == [4, -9]
    names = {path.name.partition("-")[2].split("-", 2)[2]: path for path in kept(tmp_path)}
    assert [*names] == ["0", "0-buddy", "1", "1-buddy"]
    finished = last_step(tmp_path)
    for name in ("1", "0-buddy"):
        names[name].unlink()

    ranks = over(hosts, arguments, tmp_path, port=29613, supervised=True)
    reach(ranks, finished + 8)
    for process in ranks.processes:
        os.kill(process.pid or 0, signal.SIGKILL)
    assert ranks.wait() == [-9, -9]
    assert resumed(ranks) >= finished - 1
    buddy = rf"rank 0 \({hosts.names[0]}, {hosts.addresses[0]}:\d+\)"
    assert re.search(rf"the copy of step {resumed(ranks)} in memory is not here: taken from {buddy}", log.read_text())
    finished = last_step(tmp_path)
    with open(names["1"], "r+b") as file:
        for slot in (0, (names["1"].stat().st_size - 4096) // 2):
            file.seek(slot + HEAD + 100)
            bits = file.read(1)[0]
            file.seek(slot + HEAD + 100)
            file.write(bytes([bits ^ 64]))

    ranks = over(hosts, arguments, tmp_path, port=29614, supervised=True)
    assert ranks.wait() == [0, 0]
    assert resumed(ranks) >= finished - 1
    mended = rf"the copy of step {resumed(ranks)} in memory is damaged \(\S+ master\): taken from {buddy}"
    assert re.search(mended, ranks.said(1)), ranks.said(1)
    assert result(tmp_path) == want
    assert kept(tmp_path) == []
