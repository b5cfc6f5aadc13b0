"""Real processes under real launchers (and Slurm's environment): they find one another or say why not."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megallama.comm.group import Solo
from megallama.comm.launch import Launch, keep_memory, start
from megallama.config.errors import LaunchError
from megallama.config.schema import RunConfig
from megallama.plan.topology import Topology
from tests.pool import Pool

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-m", "tests.comm.program"]
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMPI_", "PMI", "MPI_", "SLURM_", "TORCHELASTIC", "GLOO_")


def environment(**extra: str) -> dict[str, str]:
    """This process's, without any launcher's traces."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    return {**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **extra}


def together(environments: Sequence[dict[str, str]], *arguments: str) -> list[tuple[int, str, str]]:
    """One process per environment, at once: status, output, errors of each."""
    processes = [
        subprocess.Popen(
            [*PROGRAM, *arguments], cwd=ROOT, env=environment(**extra), text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for extra in environments
    ]  # fmt: skip
    outputs = [process.communicate() for process in processes]
    return [(process.returncode, out, err) for process, (out, err) in zip(processes, outputs, strict=True)]


def launched(command: Sequence[str], **extra: str) -> list[dict[str, Any]]:
    """The lines that the ranks of one launcher command print."""
    done = subprocess.run(command, cwd=ROOT, env=environment(**extra), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    # two ranks may write at the same moment: find the objects, not the lines
    lines = done.stdout.replace("}{", "}\n{").splitlines()
    return sorted((json.loads(line) for line in lines if line.startswith("{")), key=lambda found: found["rank"])


def slurm(rank: int, size: int, **extra: str) -> dict[str, str]:
    values = {"PROCID": rank, "NTASKS": size, "LOCALID": rank, "STEP_ID": 0, "JOB_ID": f"1{os.getpid()}"}
    return {f"SLURM_{key}": str(value) for key, value in values.items()} | extra


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def check_two(found: list[dict[str, Any]], launcher: str) -> None:
    facts = [(f["rank"], f["size"], f["local"], f["sum"]) for f in found]
    assert facts == [(0, 2, [0, True], 1.0), (1, 2, [1, True], 1.0)]
    assert {f["launcher"] for f in found} == {launcher}
    assert found[0]["hosts"] == [socket.gethostname()] * 2
    assert f"{launcher}: 2 ranks over gloo" in found[0]["notes"]
    assert "GLOO_SOCKET_IFNAME=lo (all ranks are on this node)" in found[0]["notes"]
    cores = len(os.sched_getaffinity(0))
    assert {f["threads"] for f in found} == {max(1, cores // 2)}


def test_torchrun() -> None:
    found = launched([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                      "-m", "tests.comm.program"])  # fmt: skip
    check_two(found, "torchrun")


def test_mpirun() -> None:
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if mpirun is None:
        pytest.skip("no mpirun found: pip install mpich (or any MPI) to run this test")
    version = subprocess.run([mpirun, "--version"], text=True, capture_output=True).stdout
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    found = launched([mpirun, "-n", "2", *PROGRAM], **as_root)
    check_two(found, "openmpi" if "Open MPI" in version else "mpich")
    assert found[0]["port"] == 0


def test_slurm_environment() -> None:
    results = together([slurm(0, 2), slurm(1, 2)])
    assert [status for status, _, _ in results] == [0, 0], results
    check_two([json.loads(out) for _, out, _ in results], "slurm")


def test_a_rank_that_never_arrives_is_named_by_all_others() -> None:
    results = together([slurm(0, 3), slurm(2, 3)], "init_timeout_seconds=6")
    host = socket.gethostname()
    message = (
        f"error: rank 1 never arrived within 6 s (run.init_timeout_seconds); arrived: 0, 2 ({host}); "
        f"look at the output of the missing ranks\n"
    )
    assert [(status, err) for status, _, err in results] == [(2, message)] * 2


def test_wrong_number_of_ranks_and_different_configurations() -> None:
    port = free_port()

    def rank(number: int, size: int) -> dict[str, str]:
        return {"RANK": str(number), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    results = together([rank(0, 2), rank(1, 4)])
    host = socket.gethostname()
    message = (
        f"error: rank 0 ({host}) was started as one of 2 ranks, rank 1 ({host}) as one of 4; "
        f"start every process with the same number of ranks\n"
    )
    assert [(status, err) for status, _, err in results] == [(2, message)] * 2


def test_first_failure_is_known_to_the_other_ranks() -> None:
    results = together([slurm(rank, 3) for rank in range(3)], "bad=1")
    assert [status for status, _, _ in results] == [0, 1, 0], results
    expected = f"rank 1 ({socket.gethostname()}) failed first: ValueError: disk full"
    assert [json.loads(results[rank][1])["first"] for rank in (0, 2)] == [expected] * 2


def test_first_failure_over_groups_of_a_pool(pool: Pool) -> None:
    expected = "rank 0 (localhost) failed first: ValueError: disk full"
    assert pool.run(3, "tests.comm.operations:first_failure", 0) == [None, expected, expected]


def test_alone_needs_nothing() -> None:
    with start(Launch(host="here"), RunConfig(device="cpu", threads=1)) as world:
        assert (world.rank, world.world_size, world.hosts) == (0, 1, ("here",))
        assert isinstance(world.group, Solo) and not torch.distributed.is_initialized()
        groups = world.groups(Topology(), num_kv_heads=2)
        names = ("tp", "cp", "dp_cp", "pp", "embedding", "kv", "world")
        assert all(isinstance(getattr(groups, name), Solo) for name in names)
        assert world.failed(ValueError("nobody to tell")) is None
        assert world.notes[-1].startswith("1 CPU thread per rank (")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_and_absent() -> None:
    with pytest.raises(LaunchError, match=r"run.device=cuda, but on rank 0 \(here\) torch .*; use run.device=cpu, or"):
        start(Launch(host="here"), RunConfig(device="cuda"))


def test_freed_memory_is_kept_in_the_process() -> None:
    program = (
        "import resource, torch\n"
        "from megallama.comm.launch import keep_memory\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def work():\n"
        "    before = faults()\n"
        "    for _ in range(4): torch.ones(4_000_000)\n"
        "    return faults() - before\n"
        "print(work(), keep_memory(), min(work() for _ in range(8)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(), text=True, capture_output=True, check=True
    )
    before, kept, after = done.stdout.split()
    if kept == "False":
        pytest.skip("the C library is not glibc")
    assert int(before) > 1000 and int(after) < 100, done.stdout
    assert keep_memory()
