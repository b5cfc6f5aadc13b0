"""How a process learns which rank it is, and how ranks become a `World`. The only reader of the environment.

`detect_launch` understands torchrun, mpirun (Open MPI, MPICH and its relatives) and srun; a process
started by none of them is a run of one rank.  `start` chooses the device, meets the other ranks
(`rendezvous`), sets what the device needs and opens the process group.  One rank opens nothing.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist

from megallama.comm.c10d import C10d
from megallama.comm.errors import ContactLost, LaunchError
from megallama.comm.group import Assembly, Group, Solo
from megallama.comm.groups import Groups, Partition, build_groups
from megallama.comm.limits import files_needed, raised_limit, too_many
from megallama.comm.rendezvous import Arrival, meet, open_star, open_store, port_file
from megallama.comm.shared_memory import MAX_SHM_BYTES, SharedMemory
from megallama.comm.star import CRASHED, FREE_CHANNEL, Listener, Star, StarGroup
from megallama.config.schema import RunConfig
from megallama.config.words import counted
from megallama.plan.topology import Topology

_LAUNCHERS = ("mpirun", "mpiexec", "hydra_pmi_proxy", "mpiexec.hydra", "prterun", "prted", "orted", "slurmstepd")


@dataclass(frozen=True)
class Launch:
    """Which rank this process is and where rank 0 is met."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = "alone"  # alone | torchrun | openmpi | mpich | slurm
    host: str = "localhost"
    master_addr: str = "127.0.0.1"
    master_port: int = 0  # 0: rank 0 takes a free port and publishes it under `key` (one node only)
    key: str = ""  # what the processes of this run, and no others on this machine, have in common
    store_kept: bool = False  # the launcher keeps the store (torchrun's agent), not rank 0
    attempt: int = 0  # restarts before this one

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise LaunchError(
                f"{self.launcher} says this is rank {self.rank} of {counted(self.world_size, 'rank')}; "
                f"ranks count from 0 to {self.world_size - 1}: check RANK and WORLD_SIZE (or what your launcher sets)"
            )


def detect_launch(env: Mapping[str, str] | None = None) -> Launch:
    """Read from `env` (default: this process's environment) how this process was started.

    Slurm comes last: mpirun and torchrun inside an allocation inherit its variables.
    Raises: LaunchError for values that are no numbers and for what cannot be known.
    """
    env = os.environ if env is None else env
    if env.get("RANK") and env.get("WORLD_SIZE"):
        return _torchrun(env)
    if env.get("OMPI_COMM_WORLD_RANK"):
        names = [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
        return _mpi(env, "openmpi", names, env.get("PMIX_NAMESPACE", ""))
    # srun --mpi=pmi2 sets PMI_RANK too, but not MPI_LOCALRANKID: that is Slurm's launch
    if env.get("PMI_RANK") and (env.get("MPI_LOCALRANKID") or not env.get("SLURM_PROCID")):
        return _mpi(env, "mpich", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"), "")
    if env.get("SLURM_PROCID"):
        return _slurm(env)
    return Launch(host=socket.gethostname())


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name) or str(default)
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f"{name}={text!r} in the environment is not a number; unset it or correct it") from None


def _torchrun(env: Mapping[str, str]) -> Launch:
    rank, size = _number(env, "RANK", 0), _number(env, "WORLD_SIZE", 1)
    return Launch(
        rank,
        size,
        _number(env, "LOCAL_RANK", rank),
        _number(env, "LOCAL_WORLD_SIZE", size),
        "torchrun",
        socket.gethostname(),
        env.get("MASTER_ADDR") or "127.0.0.1",
        _number(env, "MASTER_PORT", 29500),
        store_kept=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=_number(env, "TORCHELASTIC_RESTART_COUNT", 0),
    )


def _mpi(env: Mapping[str, str], launcher: str, names: Sequence[str], job: str) -> Launch:
    """`names` of the rank, size, local rank and local size; `job` is the same in all processes of the run."""
    rank, size = _number(env, names[0], 0), _number(env, names[1], 1)
    local_rank, local_size = _number(env, names[2], rank), _number(env, names[3], size)
    nodes = hosts(env.get("SLURM_JOB_NODELIST", ""))
    if local_size == size:
        nodes = ["127.0.0.1"]
    elif not env.get("MASTER_ADDR") and not nodes:
        raise LaunchError(
            f"mpirun started {size} ranks on several nodes and nothing says where rank 0 is; "
            f"set MASTER_ADDR to its host and MASTER_PORT to a free port there for every rank "
            f"({'-x MASTER_ADDR=host' if launcher == 'openmpi' else '-genv MASTER_ADDR host'})"
        )
    addr, port = _address(env, nodes, local_size == size, job or env.get("SLURM_JOB_ID", ""))
    key = f"{launcher}-{job or _launcher_process()}"
    return Launch(rank, size, local_rank, local_size, launcher, socket.gethostname(), addr, port, key)


def _slurm(env: Mapping[str, str]) -> Launch:
    rank = _number(env, "SLURM_PROCID", 0)
    size = _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS", 1))
    if size > 1 and not env.get("SLURM_STEP_ID"):
        raise LaunchError(
            f"SLURM_NTASKS={size}, but srun did not start this process; in an sbatch script write "
            f"'srun python -m megallama.pretrain ...', or --ntasks=1 for one rank"
        )
    nodes = hosts(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "")
    tasks = _tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or "")
    one_node = len(nodes) <= 1
    node = _number(env, "SLURM_NODEID", 0)
    local_size = size if one_node else tasks[node] if node < len(tasks) else _number(env, "SLURM_NTASKS_PER_NODE", 1)
    job = "-".join(env.get(name) or "0" for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    addr, port = _address(env, ["127.0.0.1"] if one_node else nodes, one_node, job)
    local_rank = _number(env, "SLURM_LOCALID", rank)
    return Launch(rank, size, local_rank, local_size, "slurm", socket.gethostname(), addr, port, f"slurm-{job}")


def _address(env: Mapping[str, str], nodes: Sequence[str], one_node: bool, job: str) -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT as given; else the first node, and a port made from the job's name.

    On one node the port may be 0: rank 0 publishes a free one.
    """
    addr = env.get("MASTER_ADDR") or nodes[0]
    if env.get("MASTER_PORT") or (one_node and not env.get("MASTER_ADDR")):
        return addr, _number(env, "MASTER_PORT", 0)
    # below the range from which the kernel hands out ports by itself
    return addr, 20000 + int(hashlib.sha256(job.encode()).hexdigest(), 16) % 12000 if job else 29500


def hosts(nodelist: str) -> list[str]:
    """Slurm's node list as names: node[01-03,07],login -> node01, node02, node03, node07, login."""
    names: list[str] = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        parts = re.split(r"\[([^\]]*)\]", item)  # text, bracket, text, bracket, text ...
        choices = [[text] if i % 2 == 0 else _numbers(text) for i, text in enumerate(parts)]
        names += ["".join(choice) for choice in product(*choices)]
    return names


def _numbers(text: str) -> list[str]:
    out: list[str] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        out += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return out


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's short form: 2(x3),1 -> 2, 2, 2, 1."""
    counts: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(times or 1)
    return counts


def _launcher_process() -> str:
    """The nearest ancestor that is an MPI launcher (its children are the ranks on this node), or the parent."""
    pid = os.getppid()
    with suppress(OSError):
        while pid > 1:
            name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
            if name in _LAUNCHERS:
                return f"{pid}-{rest.split()[19]}"  # with its start time: pids come back
            pid = int(rest.split()[1])
    return str(os.getppid())


@dataclass
class World:
    """All ranks of a run as one of them sees it; made by `start`, ended by `close` (or `with`)."""

    launch: Launch
    device: torch.device
    group: Group
    hosts: tuple[str, ...]  # of every rank
    notes: list[str] = field(default_factory=list)  # what was set in this process, for the log
    timeout: timedelta = timedelta(seconds=1800)  # of groups that are opened
    star: Star | None = None  # None with one rank
    crowded: bool = False  # the ranks of this machine share fewer cores than they are
    shared_memory: bool = False  # groups on one machine use it
    opened: list[C10d] = field(default_factory=list)
    channel: int = FREE_CHANNEL  # of the next host group

    @property
    def rank(self) -> int:
        return self.launch.rank

    @property
    def world_size(self) -> int:
        return self.launch.world_size

    @property
    def whole(self) -> bool:
        """Whether no rank has left, as far as this one has heard."""
        return self.star is None or not self.star.gone

    def groups(self, topology: Topology, num_kv_heads: int) -> Groups:
        """Open this rank's process groups; every rank calls it with the same arguments."""
        return build_groups(topology, self.rank, num_kv_heads, self._make)

    def host_group(self, name: str) -> Assembly:
        """A further group of all ranks for small values, to be used by one part of the program alone.

        Checkpoints talk through theirs from a background thread while training goes on; `bound` does not touch it.
        """
        if self.star is None:
            return Solo(name, self.rank)
        self.channel += 1
        return StarGroup(self.star, self.channel, name, self.timeout)

    def _make(self, name: str, partition: Partition) -> Group:
        ranks = next(ranks for ranks in partition if self.rank in ranks)
        if len(ranks) == 1:
            return Solo(name, self.rank)
        if name == "world":
            return self.group
        down = None
        if name == "pp" and self.device.type == "cuda":
            down = dist.new_group(ranks, self.timeout, use_local_synchronization=True)
        group = dist.new_group(ranks, self.timeout, use_local_synchronization=True)
        return self._open(group, name, ranks, down)

    def _open(
        self, group: dist.ProcessGroup, name: str, ranks: tuple[int, ...], down: dist.ProcessGroup | None = None
    ) -> Group:
        together = len({self.hosts[rank] for rank in ranks}) == 1
        if not (self.shared_memory and together and self.device.type == "cpu"):
            self.opened.append(C10d(group, name, ranks, self.rank, self.device, down))
            return self.opened[-1]
        shared = SharedMemory(group, name, ranks, self.rank, self.device)
        self.opened.append(shared)
        refused = shared.connect(self.crowded, self.timeout)
        through = f"gloo ({refused})" if refused else f"shared memory, gloo above {MAX_SHM_BYTES >> 20} MiB"
        self.notes.append(f"group {name}: {through}")
        return shared

    def bound(self, seconds: float) -> None:
        """From here on a wait for another rank fails after this long, in all groups but those of `host_group`."""
        self.timeout = timedelta(seconds=seconds)
        for group in self.opened:
            group.bound(self.timeout)

    @contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """Within, a rank may keep the others waiting this long; then all are together, and bound as before."""
        before = self.timeout.total_seconds()
        self.bound(seconds)
        yield
        self.group.barrier()
        self.bound(before)

    def failed(self, error: BaseException) -> tuple[str, int] | None:
        """Tell the other ranks that this one leaves; 'rank 3 (node7) failed first: ...', status, if another was first.

        Who has lost contact waits a moment to hear from whom: that is the echo of a failure, and decided by its type.
        """
        if self.star is None or getattr(error, "shared", False):
            return None
        lost = isinstance(error, (ContactLost, dist.DistError))
        line = (str(error).strip().splitlines() or ["no message"])[0]
        verb = "lost contact with another rank first" if lost else "failed first"
        mine = f"rank {self.rank} ({self.launch.host}) {verb}: {type(error).__name__}: {line}"
        if not (lost and self.star.first(5.0)):
            self.star.end(mine, getattr(error, "status", CRASHED), mine=True)
        first = self.star.first(0.0)
        return first if first is not None and first[0] != mine else None

    def close(self) -> None:
        """End the process groups. After a failure, collectives of the other ranks break."""
        star, self.star = self.star, None
        if star is not None:
            while self.opened:
                self.opened.pop().close()
            dist.destroy_process_group()
            star.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.failed(error)
        self.close()


def start(
    launch: Launch, run: RunConfig, config_hash: str = "", store: dist.Store | None = None, *,
    problem: str = "", listener: Listener | None = None, groups: Sequence[int] = (), files: int = 0,
) -> World:  # fmt: skip
    """Bring the ranks together on their devices.

    `config_hash` must be the same on every rank; it says in a few characters what each was started
    with. `store` is one that all ranks have open already; by default rank 0 or the launcher keeps it.
    `problem`: why this rank cannot take part; `listener` hears why the run ends; `groups`: sizes of the groups
    that this rank will be in; `files`: of data and checkpoints that it will open.
    Raises: LaunchError on every rank that arrived: a rank that never came within
    run.init_timeout_seconds, different numbers of ranks, configurations, torch versions or devices, a rank
    started twice, a port that is taken, CUDA asked for and absent, more processes than GPUs, too few open files.
    """
    notes: list[str] = []
    device, gpu = torch.device("cpu"), ""
    try:
        if not problem:
            device, gpu = _device(launch, run, notes)
    except LaunchError as error:
        problem = str(error)
    if launch.world_size == 1:
        if problem:
            raise LaunchError(problem)
        _set_threads(run, 1, notes)
        return World(launch, device, Solo("world", 0), (launch.host,), notes)

    problem = problem or _open_files(launch, device.type == "cuda", run.shared_memory, groups, files)
    cores = hashlib.sha256(str(sorted(os.sched_getaffinity(0))).encode()).hexdigest()[:8]
    mine = Arrival(
        launch.rank, launch.world_size, launch.host, os.getpid(), torch.__version__, device.type, gpu, cores,
        config_hash, problem,
    )  # fmt: skip
    star = Star(launch.rank, launch.world_size, launch.host, listener)
    try:
        arrivals, store = _meet(launch, mine, run.init_timeout_seconds, star, store)
        sharing = [a for a in arrivals if (a.host, a.cores) == (mine.host, mine.cores)]
        _set_threads(run, len(sharing), notes)
        if launch.local_size == launch.world_size and device.type == "cpu":
            _one_node_network(notes)
        timeout = timedelta(seconds=run.io_timeout_seconds)
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.PrefixStore("group", store)
        dist.init_process_group(backend, None, timeout, launch.world_size, launch.rank, store)
        notes.append(f"{launch.launcher}: {counted(launch.world_size, 'rank')} over {backend}")
        assert dist.group.WORLD is not None
        world = World(
            launch, device, Solo("world", launch.rank), tuple(a.host for a in arrivals), notes, timeout, star,
            crowded=len(sharing) > len(os.sched_getaffinity(0)), shared_memory=run.shared_memory,
        )  # fmt: skip
        world.group = world._open(dist.group.WORLD, "world", tuple(range(launch.world_size)))
        return world
    except BaseException:
        star.close()
        raise


def _open_files(launch: Launch, cuda: bool, shared: bool, groups: Sequence[int], files: int) -> str:
    """What is wrong if this rank may not open all files it will need."""
    first, ranks = launch.rank == 0, launch.world_size
    keeper = first and not launch.store_kept
    need = files_needed(ranks, groups, files, first=first, keeper=keeper, cuda=cuda, shared=shared)
    return too_many(need, raised_limit(), f"rank {launch.rank} ({launch.host})")


def _meet(
    launch: Launch, mine: Arrival, seconds: float, star: Star, store: dist.Store | None
) -> tuple[list[Arrival], dist.Store]:
    """All ranks' arrivals and this attempt's part of the store."""
    leader = launch.rank == 0
    published = port_file(launch.key) if launch.master_port == 0 else None
    try:
        if store is None:
            keeper = leader and not launch.store_kept
            store = open_store(launch.master_addr, launch.master_port, published, keeper, launch.rank, seconds)
        store = dist.PrefixStore(f"megallama/{launch.attempt}", store)
        open_star(star, store, mine, launch.master_addr, seconds)
        return meet(star, mine, seconds), store
    finally:
        if leader and published is not None:
            published.unlink(missing_ok=True)


def _device(launch: Launch, run: RunConfig, notes: list[str]) -> tuple[torch.device, str]:
    """This rank's device, ready for use, and the GPU's identity if no other rank may use it."""
    if run.device == "cpu" or (run.device == "auto" and not torch.cuda.is_available()):
        if keep_memory():
            notes.append("freed memory stays in the process (mallopt: no mmap, no trim, 256 MiB steps)")
        return torch.device("cpu"), ""
    # one queue: kernels start in the order of their launch, so a collective launched before a GEMM runs under it
    if os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1") == "1":
        notes.append("CUDA_DEVICE_MAX_CONNECTIONS=1")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"torch {torch.__version__} finds no usable GPU" if built else f"torch {torch.__version__} is a CPU build"
        raise LaunchError(
            f"run.device=cuda, but on rank {launch.rank} ({launch.host}) {why}; use run.device=cpu, or "
            f"{'check nvidia-smi and CUDA_VISIBLE_DEVICES' if built else 'install a CUDA build of torch'}"
        )
    count = torch.cuda.device_count()
    # Slurm can show each task only its own GPU: then every local rank has device 0
    if launch.local_rank >= count > 1:
        raise LaunchError(
            f"rank {launch.rank} is process {launch.local_rank} of {launch.host}, which has {counted(count, 'GPU')}; "
            f"start at most {counted(count, 'process')} there"
        )
    device = torch.device("cuda", launch.local_rank % count)
    torch.cuda.set_device(device)
    notes.append(f"device {device}: {torch.cuda.get_device_name(device)}")
    # NCCL_HOSTID is how one asks NCCL on purpose to let ranks share a GPU
    shared = "NCCL_HOSTID" in os.environ
    return device, "" if shared else str(torch.cuda.get_device_properties(device).uuid)


def _set_threads(run: RunConfig, sharing: int, notes: list[str]) -> None:
    """run.threads, or this process's share of the cores that `sharing` ranks may all use."""
    cores = len(os.sched_getaffinity(0))
    threads = run.threads or max(1, cores // sharing)
    torch.set_num_threads(threads)
    of = f"{counted(cores, 'core')} for {counted(sharing, 'rank')}"
    notes.append(f"{counted(threads, 'CPU thread')} per rank ({of})")


def _one_node_network(notes: list[str]) -> None:
    """Gloo looks for the interface of the host name, which may be none or a slow one; here loopback is right."""
    if "GLOO_SOCKET_IFNAME" not in os.environ and "lo" in (name for _, name in socket.if_nameindex()):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        notes.append("GLOO_SOCKET_IFNAME=lo (all ranks are on this node)")


def keep_memory() -> bool:
    """Tell glibc to keep freed memory; whether it could. Call before the first large tensor.

    By default glibc returns every large tensor to the kernel and faults it in again, page by page,
    in the next step: 100,000 and more faults per training step.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    no_mmap, no_trim, top_pad = mallopt(-4, 0), mallopt(-1, 2**31 - 1), mallopt(-2, 256 << 20)
    return bool(no_mmap and no_trim and top_pad)
