"""Which rank am I? Every launcher's environment, without processes."""

from __future__ import annotations

import pytest

from megallama.comm.launch import Launch, detect_launch, first_node
from megallama.config.errors import LaunchError, MegallamaError

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "n0",
    "MASTER_PORT": "29501", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2",
}  # fmt: skip
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-a-17@1",
}  # fmt: skip
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}
SLURM = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "2",
    "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[03-04],gpu7", "SLURM_JOB_NODELIST": "node[01-04],gpu7",
}  # fmt: skip


def facts(launch: Launch) -> tuple[object, ...]:
    return launch.launcher, launch.rank, launch.world_size, launch.local_rank, launch.one_node


def test_alone() -> None:
    launch = detect_launch({})
    assert facts(launch) == ("alone", 0, 1, 0, True)
    assert facts(detect_launch({"RANK": "", "SLURM_JOB_ID": "3"})) == ("alone", 0, 1, 0, True)
    empty = {"RANK": "", "WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "", "PMI_RANK": "", "SLURM_PROCID": ""}
    assert facts(detect_launch(empty)) == ("alone", 0, 1, 0, True)
    assert detect_launch({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "", "MASTER_PORT": ""}).master_port == 29500


def test_torchrun() -> None:
    launch = detect_launch(TORCHRUN)
    assert facts(launch) == ("torchrun", 5, 8, 1, False)
    assert (launch.master_addr, launch.master_port, launch.store_kept, launch.attempt) == ("n0", 29501, True, 2)
    by_hand = detect_launch({"RANK": "1", "WORLD_SIZE": "2"})
    assert facts(by_hand) == ("torchrun", 1, 2, 1, True)
    assert (by_hand.master_addr, by_hand.master_port, by_hand.store_kept) == ("127.0.0.1", 29500, False)
    named = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "n0"}  # nothing says that n0 is this machine
    assert not detect_launch(named).one_node and detect_launch(named | {"MASTER_ADDR": "localhost"}).one_node
    assert detect_launch(named | {"LOCAL_WORLD_SIZE": "2"}).one_node


def test_openmpi() -> None:
    launch = detect_launch(OPENMPI)
    assert facts(launch) == ("openmpi", 1, 4, 1, True)
    assert (launch.master_addr, launch.master_port, launch.key) == ("127.0.0.1", 0, "openmpi-prterun-a-17@1")


def test_openmpi_on_several_nodes() -> None:
    several = {**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(LaunchError, match="set MASTER_ADDR to its host .*-x MASTER_ADDR=host"):
        detect_launch(several)
    arguments = detect_launch({**several, "MASTER_ADDR": "n0"})
    again = detect_launch({**several, "MASTER_ADDR": "n0", "OMPI_COMM_WORLD_RANK": "2"})
    other = detect_launch({**several, "MASTER_ADDR": "n0", "PMIX_NAMESPACE": "prterun-a-18@1"})
    assert arguments.master_addr == "n0" and 20000 <= arguments.master_port < 32000
    assert arguments.master_port == again.master_port == 26516 != other.master_port  # known to every version
    allocated = detect_launch({**several, "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_JOB_ID": "3"})
    assert allocated.master_addr == "n7" and allocated.launcher == "openmpi"


def test_mpich() -> None:
    launch = detect_launch(MPICH)
    assert facts(launch) == ("mpich", 3, 4, 3, True)
    assert launch.master_port == 0 and launch.key.startswith("mpich-")
    assert launch.key == detect_launch({**MPICH, "PMI_RANK": "0", "MPI_LOCALRANKID": "0"}).key
    arguments = detect_launch({**MPICH, "MASTER_ADDR": "n0"})
    assert (arguments.master_addr, arguments.master_port, arguments.one_node) == ("n0", 29500, True)


def test_mpich_in_an_allocation_of_several_nodes() -> None:
    several = {**MPICH, "MPI_LOCALNRANKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "n[7-8]"}
    one, other = (detect_launch({**several, "SLURM_JOB_ID": job}) for job in ("3", "4"))
    assert (one.launcher, one.master_addr, one.one_node) == ("mpich", "n7", False)
    assert 20000 <= one.master_port < 32000 and 20000 <= other.master_port != one.master_port
    with pytest.raises(LaunchError, match="mpirun started 4 ranks on several nodes .*-genv MASTER_ADDR host"):
        detect_launch({**MPICH, "MPI_LOCALNRANKS": "2"})


def test_slurm() -> None:
    launch = detect_launch(SLURM)
    assert facts(launch) == ("slurm", 5, 7, 2, False)
    assert launch.master_addr == "node03" and launch.master_port == 28665
    assert detect_launch({**SLURM, "SLURM_STEP_NODELIST": "node03"}).one_node
    assert detect_launch({**SLURM, "SLURM_JOB_ID": "4712"}).master_port != launch.master_port
    arguments = detect_launch({**SLURM, "MASTER_ADDR": "a", "MASTER_PORT": "5"})
    assert (arguments.master_addr, arguments.master_port) == ("a", 5)


def test_slurm_on_one_node_takes_a_free_port() -> None:
    launch = detect_launch({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "3"})
    assert facts(launch) == ("slurm", 1, 2, 1, True)
    assert (launch.master_addr, launch.master_port, launch.key) == ("127.0.0.1", 0, "slurm-0-3-0")


def test_sbatch_without_srun_is_an_error() -> None:
    with pytest.raises(LaunchError, match="SLURM_NTASKS=4, but srun did not start this process; .* write 'srun python"):
        detect_launch({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"})
    assert facts(detect_launch({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"})) == ("slurm", 0, 1, 0, True)


def test_slurm_comes_last() -> None:
    assert detect_launch({**SLURM, **TORCHRUN}).launcher == "torchrun"
    assert detect_launch({**SLURM, **OPENMPI}).launcher == "openmpi"
    assert detect_launch({**SLURM, **MPICH}).launcher == "mpich"
    pmi2 = {**SLURM, "PMI_RANK": "5", "PMI_SIZE": "7"}  # srun --mpi=pmi2
    assert detect_launch(pmi2).launcher == "slurm"


def test_values_that_make_no_sense() -> None:
    with pytest.raises(LaunchError, match="WORLD_SIZE='two' in the environment is not a number"):
        detect_launch({"RANK": "0", "WORLD_SIZE": "two"})
    with pytest.raises(LaunchError, match="rank 4 of 4 ranks; ranks count from 0 to 3"):
        detect_launch({"RANK": "4", "WORLD_SIZE": "4"})
    assert issubclass(LaunchError, MegallamaError)


@pytest.mark.parametrize(
    ("text", "first", "alone"),
    [
        ("", "", True),
        ("a", "a", True),
        ("c-1", "c-1", True),
        ("n[07]", "n07", True),
        ("node[01-04,07]", "node01", False),
        ("a,b[9-10],c-1", "a", False),
        ("c-1,b[9-10]", "c-1", False),
        ("r[1-2]n[01,03]-ib", "r1n01-ib", False),
        ("n[098-101]", "n098", False),
    ],
)
def test_node_lists(text: str, first: str, alone: bool) -> None:
    assert first_node(text) == (first, alone)
