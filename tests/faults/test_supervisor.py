"""The supervisor beside every rank: who is named, how fast everybody leaves, and what is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megallama.train.supervised import is_wanted
from tests.faults.ranks import QUIET, Ranks

HOST = socket.gethostname()
BOUND = ["run.timeout_seconds=3", "data.timeout_seconds=3", "train.steps=1000000", "log.interval=1"]


def supervised(size: int, folder: Path, *arguments: str, **more: Any) -> Ranks:
    return Ranks(size, [*BOUND, *arguments], folder, supervised=True, **more)


def end(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "run" / "exit.json").read_text()))


def nobody_is_left(folder: Path) -> bool:
    done = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True)
    return done.stdout == ""


@pytest.mark.parametrize("gloo", [False, True], ids=["shared memory", "gloo"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_frozen_rank_is_named_and_all_leave(tmp_path: Path, victim: int, gloo: bool) -> None:
    layout = ["parallel.tp=2", f"run.shared_memory={str(not gloo).lower()}"]
    ranks = supervised(2, tmp_path, *layout)
    ranks.until("step 3/")
    os.kill(ranks.trainer(victim), signal.SIGSTOP)
    began = time.monotonic()
    assert ranks.wait() == [4, 4]
    assert 2.5 < time.monotonic() - began < 15
    other = 1 - victim
    cause = end(tmp_path)["cause"]
    assert f"rank {victim} ({HOST}) holds up the others: its process is stopped (SIGSTOP); step " in cause
    waits = rf"\n  rank {other} \({HOST}\) waits for 3\.\d s in \w+ \d+ of group (tp|world) \(ranks 0-1"
    assert re.search(waits, cause)
    assert f"error: {cause}" in ranks.said(0) and "Traceback" not in ranks.said(0) + ranks.said(1)
    log = (tmp_path / "run" / "run.log").read_text()
    assert f"error: {cause}\nstacks of rank" in log
    own = log.partition(f"stacks of rank {other}:\n")[2].partition("stacks of rank")[0]
    assert "most recent call first" in own and "c10d.py" in own  # where the other one waits
    assert f"stacks of rank {victim}:\nit does not answer" in log
    assert f"last communications of rank {other} (number" in log
    assert end(tmp_path) | {"time": 0} == {
        "status": 4, "rank": victim, "cause": cause, "host": HOST, "step": end(tmp_path)["step"], "time": 0,
    }  # fmt: skip
    assert nobody_is_left(tmp_path)


def test_a_rank_that_leaves_a_collective_out_is_named(tmp_path: Path) -> None:
    ranks = supervised(2, tmp_path, "parallel.tp=2", fault="leaves_one_out", victim=1)
    assert ranks.wait() == [4, 4]
    assert f"rank 1 ({HOST}) holds up the others: it is in another communication" in end(tmp_path)["cause"] or (
        re.search(rf"rank 1 \({HOST}\) holds up the others: it has begun \d+ communications", end(tmp_path)["cause"])
    )


def test_a_rank_that_holds_the_interpreter_is_named_with_its_stack(tmp_path: Path) -> None:
    ranks = supervised(2, tmp_path, fault="holds_the_interpreter", victim=1)
    assert ranks.wait() == [4, 4]
    text = f"rank 1 ({HOST}) holds up the others: it is not where the others wait for it; step 3, "
    assert text in end(tmp_path)["cause"]
    stacks = (tmp_path / "run" / "run.log").read_text().partition("stacks of rank 1:\n")[2]
    assert "rank_numbers" in stacks.partition("stacks of rank")[0]


@pytest.mark.parametrize(("victim", "number"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSEGV)])
def test_a_killed_rank_is_named_with_its_signal(tmp_path: Path, victim: int, number: signal.Signals) -> None:
    ranks = supervised(2, tmp_path)
    ranks.until("step 3/")
    os.kill(ranks.trainer(victim), number)
    began = time.monotonic()
    assert ranks.wait() == ([-number, 4] if victim == 0 else [4, -number])
    assert time.monotonic() - began < 15
    text = f"rank {victim} ({HOST}) failed first: killed by {number.name} ({number.value})"
    assert end(tmp_path)["cause"] == text and end(tmp_path)["rank"] == victim
    assert text in ranks.said(0) + ranks.said(1)
    assert nobody_is_left(tmp_path)


def test_a_rank_that_ends_as_if_all_were_well_is_named(tmp_path: Path) -> None:
    ranks = supervised(2, tmp_path, fault="leaves_without_a_word", victim=1)
    assert ranks.wait() == [4, 0]
    text = f"rank 1 ({HOST}) failed first: left with status 0, and did not say why"
    assert end(tmp_path)["cause"] == text and text in ranks.said(0)


def test_an_exception_is_the_cause_and_its_traceback_on_the_screen(tmp_path: Path) -> None:
    ranks = supervised(2, tmp_path, fault="fails_in_a_step", victim=1)
    assert ranks.wait() == [4, 4]
    assert end(tmp_path)["cause"] == f"rank 1 ({HOST}) failed first: ValueError: planted"
    assert "Traceback" in ranks.said(1) and "rank 1" in ranks.said(0) and "Traceback" not in ranks.said(0)


def test_a_killed_supervisor_is_named_and_takes_its_rank_along(tmp_path: Path) -> None:
    ranks = supervised(2, tmp_path)
    ranks.until("step 3/")
    os.kill(ranks.processes[1].pid or 0, signal.SIGKILL)
    assert ranks.wait() == [4, -9]
    text = f"rank 1 ({HOST}) failed first: its supervisor (process {ranks.processes[1].pid}) was killed"
    assert text in ranks.said(0) and end(tmp_path)["cause"] == text
    assert nobody_is_left(tmp_path)


def test_a_frozen_supervisor_is_named_and_training_goes_on(tmp_path: Path) -> None:
    ranks = supervised(2, tmp_path)
    ranks.until("step 3/")
    os.kill(ranks.processes[0].pid or 0, signal.SIGSTOP)  # the root
    ranks.until("the supervisor of rank 0 has been silent for 3 s", rank=1)
    steps = ranks.said(0).count("step ")
    time.sleep(0.5)
    assert ranks.said(0).count("step ") > steps
    os.kill(ranks.trainer(0), signal.SIGSTOP)  # and now its rank: the other decides alone
    ranks.until(f"rank 0 ({HOST}) holds up the others: its process is stopped", rank=1)
    ranks.processes[1].join(20)
    assert ranks.wait(0) == [None, 4]


def test_signals_reach_the_rank_and_its_status_the_launcher(tmp_path: Path) -> None:
    ranks = supervised(2, tmp_path)
    ranks.until("step 3/")
    os.kill(ranks.processes[1].pid or 0, signal.SIGUSR1)
    assert ranks.wait() == [75, 75]
    assert "stopped: SIGUSR1 on 1 rank" in ranks.said(0)
    assert end(tmp_path)["status"] == 75 and end(tmp_path)["cause"] == "stopped as asked"


def launched(size: int, folder: Path) -> subprocess.Popen[bytes]:
    """A shell that has started the ranks as torchrun would, once they have made three steps."""
    settings = [f"run.folder={folder / 'run'}", *QUIET, *BOUND, "train.stop_after_minutes=1"]  # a failed test ends too
    command = " ".join([sys.executable, "-m", "megallama.pretrain", *settings])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    env = os.environ | {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = " ".join(f"RANK={rank} LOCAL_RANK={rank} {command} &" for rank in range(size))
    with open(folder / "out", "wb") as out:
        launcher = subprocess.Popen(["sh", "-c", f"{ranks} wait"], env=env, stdout=out, stderr=out)
    deadline = time.monotonic() + 60
    while "step 3/" not in (folder / "out").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return launcher


def all_leave(launcher: subprocess.Popen[bytes], folder: Path) -> str:
    """Kill it; what was said by the time at which nobody is left."""
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 60
    while not nobody_is_left(folder):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return (folder / "out").read_text()


def test_a_killed_launcher_leaves_no_orphan_and_no_step_is_lost(tmp_path: Path) -> None:
    text = all_leave(launched(1, tmp_path), tmp_path)
    assert "warning: torchrun is gone; rank 0 saves and stops" in text and "stopped: SIGTERM on 1 rank; saved" in text
    assert end(tmp_path)["status"] == 75


def test_a_killed_launcher_and_a_frozen_rank_leave_no_orphan(tmp_path: Path) -> None:
    launcher = launched(2, tmp_path)
    trainers = subprocess.run(["pgrep", "-f", f"^{sys.executable} -m .*{tmp_path}"], capture_output=True, text=True)
    os.kill(int(trainers.stdout.split()[0]), signal.SIGSTOP)
    text = all_leave(launcher, tmp_path)
    assert text.count("torchrun is gone") == 2 and text.count("holds up the others") == 1
    assert end(tmp_path)["status"] == 4


def test_a_rank_that_is_stopped_while_it_leaves_is_not_waited_for(tmp_path: Path) -> None:
    """And one that saves slowly is."""
    bound = ["run.timeout_seconds=1.5", "data.timeout_seconds=1.5", "train.steps=3"]
    ranks = supervised(2, tmp_path, *bound, fault="saves_slowly_and_stops_while_it_leaves")
    ranks.until("finished: 3 steps")
    began = time.monotonic()
    assert ranks.wait(30) == [4, 0]
    assert 1.5 < time.monotonic() - began < 6
    text = f"rank 0 ({HOST}) holds up the others: its process is stopped (SIGSTOP); step 3"
    assert f"error: {text}" in ranks.said(0) and text in (tmp_path / "run" / "run.log").read_text()
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
    assert end(tmp_path)["status"] == 4 and nobody_is_left(tmp_path)


def test_a_slow_rank_is_named(tmp_path: Path) -> None:
    ranks = supervised(2, tmp_path, "log.interval=10", fault="works_slowly", victim=1)
    ranks.until(f"warning: rank 1 ({HOST}) is slow: its own work takes ")
    os.kill(ranks.processes[0].pid or 0, signal.SIGTERM)
    assert ranks.wait() == [75, 75]
    assert "rank 0" not in "".join(line for line in ranks.said(0).splitlines() if "is slow" in line)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["slowest_rank"] == 1 and last["slowest_excess"] > 1.1


def test_without_a_supervisor_nothing_is_there(tmp_path: Path) -> None:
    ranks = supervised(1, tmp_path, "run.supervisor=false", "train.steps=2")
    assert ranks.wait() == [0]
    assert not (tmp_path / "run" / "status").exists() and not (tmp_path / "run" / "exit.json").exists()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["run.toml"], True),
        (["train.steps=3"], True),
        (["run.supervisor=false"], False),
        (["--run.supervisor=False"], False),
        (["run.supervisor=false", "run.supervisor=true"], True),
        (["--help"], False),
        ([], False),
    ],
)
def test_who_is_supervised(words: list[str], wanted: bool) -> None:
    assert is_wanted(words) is wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("[run]\nsupervisor = false\n", False), ("[run]\nsupervisor = true\n", True), ("[run", True), ("run = 3", True)],
)
def test_who_is_supervised_by_a_file(tmp_path: Path, text: str, wanted: bool) -> None:
    (tmp_path / "run.toml").write_text(text)
    assert is_wanted([str(tmp_path / "run.toml")]) is wanted
    assert is_wanted([str(tmp_path / "run.toml"), f"run.supervisor={str(not wanted).lower()}"]) is not wanted
