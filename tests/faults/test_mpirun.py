"""A rank of mpirun dies: mpirun ends the others, and the run has said by then which rank it was, and where."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.comm.test_world import environment
from tests.faults.ranks import QUIET, Ranks
from tests.faults.test_supervisor import BOUND, HOST, end, nobody_is_left

GRACE = 1.0  # seconds that Open MPI leaves between SIGTERM and SIGKILL


def plays_open_mpi(ranks: Ranks) -> None:
    """Once a process has died, the others with all of their groups are asked to leave, and soon made to."""
    deadline = time.monotonic() + 60
    while all(process.exitcode is None for process in ranks.processes):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for number in (signal.SIGCONT, signal.SIGTERM, signal.SIGKILL):
        for process in ranks.processes:
            if process.exitcode is None:
                os.killpg(process.pid or 0, number)
        until = time.monotonic() + GRACE * (number == signal.SIGTERM)
        while time.monotonic() < until and any(process.exitcode is None for process in ranks.processes):
            time.sleep(0.01)


def check(folder: Path, victim: int, cause: str, said: str) -> None:
    assert cause in said
    assert end(folder) | {"time": 0, "step": 0} == {
        "status": 4, "rank": victim, "cause": cause, "host": HOST, "step": 0, "time": 0,
    }  # fmt: skip
    assert nobody_is_left(folder)


@pytest.mark.parametrize("who", ["trainer", "supervisor"])
@pytest.mark.parametrize("victim", [0, 1])
def test_the_rank_that_dies_under_open_mpi_is_named(tmp_path: Path, victim: int, who: str) -> None:
    job = f"test-{os.getpid()}-{victim}-{who}"
    ranks = Ranks(2, BOUND, tmp_path, supervised=True, launcher="openmpi", env={"PMIX_NAMESPACE": job})
    ranks.until("step 3/")
    supervisor = ranks.processes[victim].pid or 0
    os.kill(ranks.trainer(victim) if who == "trainer" else supervisor, signal.SIGKILL)
    began = time.monotonic()
    plays_open_mpi(ranks)
    statuses = ranks.wait(5)
    assert time.monotonic() - began < 5 and None not in statuses
    how = "killed by SIGKILL (9)" if who == "trainer" else f"its supervisor (process {supervisor}) was killed"
    cause = f"rank {victim} ({HOST}) failed first: {how}"
    check(tmp_path, victim, cause, ranks.said(0) + ranks.said(1))


def test_the_rank_that_dies_under_mpirun_is_named(tmp_path: Path) -> None:
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if mpirun is None:
        pytest.skip("no mpirun found: pip install mpich (or any MPI) to run this test")
    settings = [f"run.folder={tmp_path / 'run'}", *QUIET, *BOUND, "train.stop_after_minutes=1"]
    command = [mpirun, "-n", "2", sys.executable, "-m", "megallama.pretrain", *settings]
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    with open(tmp_path / "out", "wb") as out:
        launcher = subprocess.Popen(command, env=environment(**as_root), stdout=out, stderr=out)
    deadline = time.monotonic() + 60
    while "step 3/" not in (tmp_path / "out").read_text():
        assert launcher.poll() is None and time.monotonic() < deadline, (tmp_path / "out").read_text()
        time.sleep(0.05)
    found = subprocess.run(["pgrep", "-f", f"^{sys.executable} -m .*{tmp_path}"], capture_output=True, text=True)
    environments = {int(pid): Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in found.stdout.split()}
    words = {b"PMI_RANK=1", b"OMPI_COMM_WORLD_RANK=1"}
    (victim,) = (pid for pid, words_of in environments.items() if words & {*words_of})
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    assert launcher.wait(5) not in (0, None)
    while not nobody_is_left(tmp_path):
        assert time.monotonic() - began < 5
        time.sleep(0.05)
    check(tmp_path, 1, f"rank 1 ({HOST}) failed first: killed by SIGKILL (9)", (tmp_path / "out").read_text())
