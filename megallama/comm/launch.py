"""How a process learns its rank, and ranks become a `World`. The only reader of the environment.

Started by neither torchrun, mpirun (Open MPI, MPICH, its relatives) nor srun it is alone and opens nothing.
"""

import ctypes
import hashlib
import os
import platform
import re
import resource
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist

from megallama.comm.c10d import C10d
from megallama.comm.cores import cores_near, keep_near
from megallama.comm.flight_record import LIMIT, SUPERVISOR, FlightRecord
from megallama.comm.group import Assembly, ContactLost, Group, Groups, Partition, Solo, build_groups, on_all_ranks
from megallama.comm.rendezvous import CRASHED, Arrival, Listener, Star, StarGroup, open_store, port_file, rendezvous
from megallama.comm.shared_memory import MAX_SHM_BYTES, SharedMemory
from megallama.comm.stream_record import StreamRecord
from megallama.config.errors import LaunchError, counted, ranges
from megallama.config.schema import Config, RunConfig
from megallama.plan.topology import Topology


@dataclass(frozen=True)
class Launch:
    """Which rank this process is and where rank 0 is met."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    one_node: bool = True  # all ranks are on this machine
    launcher: str = "alone"  # alone | torchrun | openmpi | mpich | slurm
    host: str = field(default_factory=socket.gethostname)
    master_addr: str = "127.0.0.1"
    master_port: int = 0  # 0: rank 0 publishes a free one under `key` (one node only)
    key: str = ""  # what the processes of this run alone have in common here
    store_kept: bool = False  # the launcher keeps the store (torchrun's agent), not rank 0
    attempt: int = 0  # restarts before this one, by the launcher
    generation: int = 0  # replacements in place since then
    launched: int | None = None  # the launcher's rank, where ranks are counted anew

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise LaunchError(
                f"{self.launcher} says this is rank {self.rank} of {counted(self.world_size, 'rank')}; "
                f"ranks count from 0 to {self.world_size - 1}: check RANK and WORLD_SIZE (or what your launcher sets)"
            )


_NAMES = {  # launcher -> its variables for rank, ranks, rank on this node, ranks on this node
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "openmpi": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),  # last: others inherit them
}


def detect_launch(
    env: Mapping[str, str] | None = None, parent: int = 0, generation: int = 0, place: Mapping[str, Any] | None = None
) -> Launch:
    """Read from `env` (default: this process's environment) how this process was started.

    `parent`: the process that the launcher started has this one, if not this process; `generation`: see `Launch`.
    `place`: in a world that is not the launched one, its launched ranks (`seats`), and how they meet (`launch`).

    Raises: LaunchError for values that are no numbers and for what cannot be known.
    """
    env = {name: value for name, value in (os.environ if env is None else env).items() if value}
    # srun --mpi=pmi2 sets PMI_RANK too
    sure = {"torchrun": "WORLD_SIZE" in env, "mpich": "MPI_LOCALRANKID" in env or "SLURM_PROCID" not in env}
    launcher = next((name for name, (rank, *_) in _NAMES.items() if rank in env and sure.get(name, True)), "")
    if not launcher:
        return Launch()
    names = _NAMES[launcher]
    rank, size = _number(env, names[0], 0), _number(env, names[1] if names[1] in env else "SLURM_NTASKS", 1)
    known = names[3] in env or env.get("MASTER_ADDR", "127.0.0.1") in ("127.0.0.1", "localhost", "::1")
    local_rank, one_node = _number(env, names[2], rank), known and _number(env, names[3], size) == size
    node, key = "127.0.0.1", ""
    job = env.get("PMIX_NAMESPACE", "") if launcher == "openmpi" else ""
    if launcher == "slurm":
        if size > 1 and "SLURM_STEP_ID" not in env:
            raise LaunchError(
                f"SLURM_NTASKS={size}, but srun did not start this process; in an sbatch script write "
                f"'srun python -m megallama.pretrain ...', or --ntasks=1 for one rank"
            )
        node, one_node = first_node(env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "")))
        job = "-".join(env.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
        key = f"slurm-{job}"
    elif launcher != "torchrun":
        node = first_node(env.get("SLURM_JOB_NODELIST", ""))[0]
        key = f"{launcher}-{job or parent or os.getppid()}"  # on one node all have one parent
        job = job or env.get("SLURM_JOB_ID", "")
    address = env.get("MASTER_ADDR", "127.0.0.1" if one_node else node)
    if not address:
        raise LaunchError(
            f"mpirun started {size} ranks on several nodes and nothing says where rank 0 is; "
            f"set MASTER_ADDR to its host and MASTER_PORT to a free port there for every rank "
            f"({'-x MASTER_ADDR=host' if launcher == 'openmpi' else '-genv MASTER_ADDR host'})"
        )
    port = 29500
    if key and one_node and "MASTER_ADDR" not in env:
        port = 0
    elif job:  # below the range from which the kernel hands out ports by itself
        port = 20000 + int(hashlib.sha256(job.encode()).hexdigest(), 16) % 12000
    launch = Launch(
        rank, size, local_rank, one_node, launcher, key=key,
        master_addr=address, master_port=_number(env, "MASTER_PORT", port),
        store_kept=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=_number(env, "TORCHELASTIC_RESTART_COUNT", 0), generation=generation,
    )  # fmt: skip
    if place is None:
        return launch
    seats = place["seats"]
    return replace(launch, rank=seats.index(rank), world_size=len(seats), launched=rank, **place["launch"])


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f"{name}={text!r} in the environment is not a number; unset it or correct it") from None


def first_node(nodelist: str) -> tuple[str, bool]:
    """The first node of Slurm's list, and whether it is alone: node[01-03],login -> node01, False."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    assert first is not None, "it matches the empty text too"
    return re.sub(r"\[(\w*)[^\]]*\]", r"\1", first[0]), not re.search(r",|\[[^\]]*-", nodelist)


T = TypeVar("T")
LAST_RESORT = timedelta(seconds=60)  # more than the time-out, where supervisors see to that


@dataclass
class World:
    """All ranks of a run as one of them sees it; from `start` to `close` (or `with`)."""

    launch: Launch
    device: torch.device
    group: Group
    hosts: tuple[str, ...]  # of every rank
    notes: list[str] = field(default_factory=list)  # what was set in this process, for the log
    timeout: timedelta = timedelta(seconds=1800)  # of groups that are opened
    star: Star | None = None  # None with one rank
    oversubscribed: bool = False  # the ranks of this machine share fewer cores than they are
    shared_memory: bool = False  # groups on one machine use it
    opened: list[C10d] = field(default_factory=list)
    record: FlightRecord = field(default_factory=FlightRecord)
    arrivals: Sequence[Arrival] = ()  # none with one rank

    @property
    def rank(self) -> int:
        return self.launch.rank

    @property
    def world_size(self) -> int:
        return self.launch.world_size

    @property
    def whole(self) -> bool:
        """Whether no rank has left, as far as this one has heard."""
        return self.star is None or not self.star.left

    def groups(self, topology: Topology, num_kv_heads: int) -> Groups:
        """Open this rank's process groups; every rank calls it with the same arguments."""
        groups = build_groups(topology, self.rank, num_kv_heads, self.open_group)
        if self.device.type == "cuda":
            for group in self.opened:  # all in the order of their names: nobody waits crosswise
                group.warm_up()
        return groups

    def host_group(self, name: str) -> Assembly:
        """Another group of all ranks, for small values and one thread, beyond `bound`."""
        return StarGroup(self.star, name, self.timeout) if self.star else Solo(name, self.rank)

    def open_group(self, name: str, partition: Partition) -> Group:
        """This rank's group of `partition`; every rank calls it with the same arguments."""
        ranks = next(ranks for ranks in partition if self.rank in ranks)
        if len(ranks) == 1:
            return Solo(name, self.rank)
        if name == "world" and self.opened:
            return self.group
        made: list[Any] = [dist.group.WORLD]
        if name != "world":
            directions = 2 if name == "pp" and self.device.type == "cuda" else 1
            made = [dist.new_group(ranks, self._limit, use_local_synchronization=True) for _ in range(directions)]
        together = len({self.hosts[rank] for rank in ranks}) == 1
        if not (self.shared_memory and together and self.device.type == "cpu"):
            down = made[0] if len(made) > 1 else None
            self.opened.append(C10d(made[-1], name, ranks, self.rank, self.device, down, self.record))
            return self.opened[-1]
        shared = SharedMemory(made[-1], name, ranks, self.rank, self.device, record=self.record)
        self.opened.append(shared)
        refused = shared.connect(self.oversubscribed, self._limit)
        through = f"gloo ({refused})" if refused else f"shared memory, gloo above {MAX_SHM_BYTES >> 20} MiB"
        self.notes.append(f"group {name}: {through}")
        return shared

    @property
    def _limit(self) -> timedelta:
        """For waits: the time-out, or more where supervisors see to it."""
        return self.timeout + LAST_RESORT * self.record.watched

    def on_all(self, what: str, work: Callable[[], T]) -> T:
        """What `work` returns here, once no rank has failed in it. Raises: as `on_all_ranks`."""
        kept: list[T] = []
        on_all_ranks(self.group, what, lambda: kept.append(work()))
        return kept[0]

    def bound(self, seconds: float) -> None:
        """From here on waits for others fail after this long, but in groups of `host_group`."""
        self.timeout = timedelta(seconds=seconds)
        self.record.words[LIMIT] = int(seconds * 1e9)
        for group in self.opened:
            group.bound(self._limit)

    @contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """Within, a rank may keep the others waiting this long; then all are bound as before."""
        before = self.timeout.total_seconds()
        self.bound(seconds)
        yield
        self.group.barrier()
        self.bound(before)

    def failed(self, error: BaseException) -> tuple[str, int] | None:
        """Tell the other ranks that this one leaves; 'rank 3 (node7) failed first: ...', status, if another was first.

        Lost contact is the echo of a failure: who has lost it waits a moment to hear of that.
        """
        if self.star is None or getattr(error, "shared", False):
            return None
        lost = isinstance(error, (ContactLost, dist.DistError))
        line = (str(error).strip().splitlines() or ["no message"])[0]
        verb = "lost contact with another rank first" if lost else "failed first"
        own = f"rank {self.rank} ({self.launch.host}) {verb}: {type(error).__name__}: {line}"
        if not (lost and self.star.first(5.0)):
            self.star.end(own, getattr(error, "status", CRASHED), own=True)
        first = self.star.first(0.0)
        return first if first is not None and first[0] != own else None

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

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.failed(error)
        self.close()


def start(
    launch: Launch, run: RunConfig, config_hash: str = "", store: dist.Store | None = None, *,
    problem: str = "", listener: Listener | None = None, groups: Sequence[int] = (), files: int = 0,
    record: FlightRecord | None = None, cuda: Mapping[str, str] | None = None,
) -> World:  # fmt: skip
    """Bring the ranks together on their devices.

    `config_hash`: of what the rank was started with. `store`: open already on all ranks. `problem`: why this one
    cannot take part. `listener` hears why the run ends. `groups`: sizes of its own. `files`: of data, checkpoints.
    `cuda`: see `cuda_environment`. Raises: LaunchError, on all that arrived, with what keeps them from starting.
    """
    notes: list[str] = []
    device, gpu = torch.device("cpu"), ""
    try:
        if not problem:
            device, gpu = _device(launch, run, notes, cuda or {})
    except LaunchError as error:
        problem = str(error)
    near = cores_near(device) if device.type == "cuda" and run.bind_cores == "auto" else None
    record = StreamRecord(record or FlightRecord(), device) if device.type == "cuda" else record or FlightRecord()
    if launch.world_size == 1:
        if problem:
            raise LaunchError(problem)
        _set_threads(run, keep_near(near, 0, {0: ("", "")}), notes)
        return World(launch, device, Solo("world", 0), (launch.host,), notes, record=record)

    need = files_needed(launch, groups, files, cuda=device.type == "cuda", shared=run.shared_memory)
    problem = problem or too_many(need, raised_limit(), f"rank {launch.rank} ({launch.host})")
    cores = hashlib.sha256(str(sorted(os.sched_getaffinity(0))).encode()).hexdigest()[:8]
    own = Arrival(
        launch.rank, launch.world_size, launch.host, os.getpid(), torch.__version__, device.type, gpu, cores,
        config_hash, problem, [record.words[SUPERVISOR], record.file, record.stacks] if record.watched else [],
        ranges(near or ()),
    )  # fmt: skip
    star = Star(launch.rank, launch.world_size, launch.host, listener, record)
    arrivals, store = _gather(launch, own, run.init_timeout_seconds, star, store)
    try:
        here = {a.rank: (a.cores, a.near) for a in arrivals if a.host == own.host}
        sharing = _set_threads(run, keep_near(near, own.rank, here), notes)
        shares = sharing > len(os.sched_getaffinity(0))
        record.clock = time.thread_time_ns if shares else time.monotonic_ns
        if launch.one_node and device.type == "cpu":
            _one_node_network(notes)
        timeout, record.words[LIMIT] = timedelta(seconds=run.io_timeout_seconds), int(1e9 * run.io_timeout_seconds)
        backend = "nccl" if device.type == "cuda" else "gloo"
        limit, group = timeout + LAST_RESORT * record.watched, dist.PrefixStore("group", store)
        # without a device_id, though torch advises one: with it a group's messages share one communicator and
        # run one after another, where pairs of ranks have their own now; messages that cross could hang
        dist.init_process_group(backend, None, limit, launch.world_size, launch.rank, group)
        notes.append(f"{launch.launcher}: {counted(launch.world_size, 'rank')} over {backend}")
        world = World(
            launch, device, Solo("world", launch.rank), tuple(a.host for a in arrivals), notes, timeout, star,
            oversubscribed=shares, shared_memory=run.shared_memory, record=record, arrivals=arrivals,
        )  # fmt: skip
        world.group = world.open_group("world", [tuple(range(launch.world_size))])
        return world
    except BaseException:
        star.close()
        raise


def _gather(
    launch: Launch, own: Arrival, seconds: float, star: Star, store: dist.Store | None
) -> tuple[list[Arrival], dist.Store]:
    """All ranks' arrivals and this attempt's part of the store."""
    here = "127.0.0.1" if launch.one_node else launch.master_addr
    host, port = launch.master_addr if launch.store_kept else here, launch.master_port
    again = f"-{launch.generation}" if launch.generation else ""  # a killed one has left its port
    published = None if port else port_file(launch.key + again)
    star.record.words[LIMIT] = int(1e9 * seconds) * (launch.rank == 0)  # its end is that of all
    try:
        if store is None:
            store = open_store(host, port, published, not (launch.rank or launch.store_kept), launch.rank, seconds)
        store = dist.PrefixStore(f"megallama/{launch.attempt}/{launch.generation}", store)
        return rendezvous(star, store, own, here, seconds), store
    except BaseException:
        star.close()  # the others still come, by the file, to hear of it
        raise
    finally:
        if launch.rank == 0 and published is not None:
            published.unlink(missing_ok=True)


def cuda_environment(config: Config) -> dict[str, str]:
    """What CUDA shall find in the environment, unless the launcher has set it."""
    # one queue: kernels start in order, so a collective before a GEMM runs under it
    one_queue = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if config.parallel.tp > 1 else {}
    return one_queue | ({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if config.train.deterministic else {})


def _device(launch: Launch, run: RunConfig, notes: list[str], cuda: Mapping[str, str]) -> tuple[torch.device, str]:
    """This rank's device, ready, and the GPU's identity if no other rank may use it."""
    if run.device != "cpu":  # also for auto: to ask for a GPU is to touch it
        has = {name: os.environ.setdefault(name, value) for name, value in cuda.items()}
    if run.device == "cpu" or (run.device == "auto" and not torch.cuda.is_available()):
        if keep_memory():
            notes.append("freed memory stays in the process (mallopt: no mmap, no trim, 256 MiB steps)")
        return torch.device("cpu"), ""
    for name, value in has.items():
        notes.append(f"{name}={value}" + (f" (found in the environment, not {cuda[name]})" * (value != cuda[name])))
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
    return device, "" if "NCCL_HOSTID" in os.environ else str(torch.cuda.get_device_properties(device).uuid)


def _set_threads(run: RunConfig, bound: tuple[int, str], notes: list[str]) -> int:
    """run.threads, or a share of the cores of several ranks; how many (`keep_near`)."""
    sharing, note = bound
    notes += [note] * bool(note)
    cores = len(os.sched_getaffinity(0))
    threads = run.threads or max(1, cores // sharing)
    torch.set_num_threads(threads)
    of = f"{counted(cores, 'core')} for {counted(sharing, 'rank')}"
    notes.append(f"{counted(threads, 'CPU thread')} per rank ({of})")
    return sharing


def _one_node_network(notes: list[str]) -> None:
    """Gloo would take the interface of the host name, which may be none or a slow one."""
    if "GLOO_SOCKET_IFNAME" not in os.environ and "lo" in (name for _, name in socket.if_nameindex()):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        notes.append("GLOO_SOCKET_IFNAME=lo (all ranks are on this node)")


def keep_memory() -> bool:
    """Tell glibc to keep freed memory; whether it could. Call before the first large tensor.

    By default large tensors are faulted in again, page by page: 100,000 faults and more a step.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    no_mmap, no_trim, top_pad = mallopt(-4, 0), mallopt(-1, 2**31 - 1), mallopt(-2, 256 << 20)
    return bool(no_mmap and no_trim and top_pad)


def raised_limit() -> int:
    """The most files this process may open; the soft limit is raised to the hard one."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 1 << 62


def files_needed(launch: Launch, groups: Sequence[int], files: int, *, cuda: bool, shared: bool) -> dict[str, int]:
    """A rank's open files, by use: without room for a connection gloo ends the process."""
    groups, ranks = [size for size in groups if size > 1], launch.world_size
    return {
        "open already": len(os.listdir("/proc/self/fd")),
        "the store": 4 + ranks * (1 + cuda) * (not (launch.rank or launch.store_kept)),  # NCCL connects once more
        "connections with rank 0": 8 + (1 if launch.rank else ranks),
        "NCCL, about": 64 * len(groups) * cuda,
        "gloo": sum(size + 3 for size in groups) * (not cuda),
        "shared memory": 2 * sum(groups) * (shared and not cuda),  # mmap keeps a second one
        "data, checkpoints and logs": 8 + files,
    }


def too_many(need: Mapping[str, int], limit: int, where: str) -> str:
    """What to do where the limit does not suffice; empty where it does."""
    if (total := sum(need.values())) <= limit:
        return ""
    parts = ", ".join(f"{what} {count:,}" for what, count in need.items() if count)
    return (
        f"{where} will have {total:,} files open ({parts}), but its limit is {limit:,}; raise the hard limit of open "
        f"files (ulimit -Hn; LimitNOFILE of the service that starts the ranks) to {total:,} or more"
    )
