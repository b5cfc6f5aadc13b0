"""What a run needs, made once and in this order: data, kernels, the folder's lock, model, state."""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megallama.checkpoint.disk import DamagedError, opened, read_file, write_durably
from megallama.checkpoint.folder import before, known
from megallama.checkpoint.manager import CheckpointManager
from megallama.checkpoint.memory import MemoryCopies
from megallama.checkpoint.starts import Starts
from megallama.checkpoint.writer import NotFiniteError
from megallama.comm.launch import World
from megallama.config.describe import literal
from megallama.config.errors import ConfigError, DataError, MegallamaError, counted
from megallama.config.rules import check, unusual
from megallama.config.schema import BatchConfig, Config, LrScheduleConfig, OptimizerConfig, current
from megallama.data.sources import Data, TrainDataset, open_sources
from megallama.kernels.processors import Processor
from megallama.kernels.select import OPERATIONS, Kernels
from megallama.optim.lr import learning_rate
from megallama.plan.plan import Plan
from megallama.train import continued
from megallama.train.assemble import DTYPES, Worker, assemble, initialize, kernels_of, same_kernels
from megallama.train.log import Logger, human_bytes, human_count
from megallama.train.progress import Progress, TrainingStopped
from megallama.train.signals import FAILED, SAVED, SignalFlag
from megallama.train.speed import slow_format
from megallama.train.step import Task
from megallama.train.supervised import introduce
from megallama.train.trace import StepTracer

GIB = 2**30
USED = 0.5  # of the memory at hand: as much as a plan may take without having been asked for
RankNeeds = tuple[str, int, int, dict[str, int]]  # host, bytes: certain, by estimate, `room`
TasksOf = Callable[[Config, Data, Callable[[str], None]], Sequence[Task]]
ORDER = ("data.train", "data.mixture_schedule", "data.synthetic", "train.seed", "batch.seq_length")


@dataclass(frozen=True)
class Setup:
    """Everything the loop needs, on one rank."""

    config: Config
    plan: Plan
    world: World
    log: Logger
    signals: SignalFlag
    data: Data
    manager: CheckpointManager
    worker: Worker
    tracer: StepTracer  # of the rank's groups
    progress: Progress
    copies: MemoryCopies | None  # in memory that outlives this process; None: not made
    computes_with: str  # what bits depend on besides layout and versions
    named: Mapping[str, str]  # for resumed runs: operation -> implementation
    tasks: Sequence[Task]
    tasks_of: TasksOf | None
    phase: int  # of train.phases, from 0
    last_step: int = 0  # of the phase or the run, or of the data; known once the state is restored
    goes_on: bool = False  # after that, in another phase

    @property
    def train_data(self) -> TrainDataset | None:
        return self.data.train if isinstance(self.data.train, TrainDataset) else None

    def used(self) -> dict[str, dict[str, float]]:
        """What has been used of each source so far; nothing is known of synthetic data."""
        return self.train_data.consumption(self.progress.samples) if self.train_data else {}

    def tell_sources(self) -> None:
        for name, used in self.used().items():
            tokens = counted(human_count(used["tokens"]), "token")
            self.log.info(f"data source {name}: {used['epochs']:.4f} epochs, {tokens} used")


def set_deterministic(on: bool) -> None:
    """Allow only deterministic kernels, or any; an operation without one raises.

    cuBLAS also needs CUBLAS_WORKSPACE_CONFIG (`comm.launch.cuda_environment`): torch may not say so.
    """
    if torch.are_deterministic_algorithms_enabled() != on:  # it takes seconds: it imports a compiler
        torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # all buffers get written
    torch.backends.cudnn.deterministic = on
    torch.backends.cudnn.benchmark = False  # autotuning picks kernels by chance


@contextmanager
def set_up(
    config: Config, plan: Plan, world: World, log: Logger, signals: SignalFlag, starts: Starts | None = None,
    tasks_of: TasksOf | None = None,
) -> Iterator[Setup]:  # fmt: skip
    """Set up a run; within, its folder is locked, and errors are told to the others."""
    if len({*world.hosts}) > 1:  # at once: their supervisors do not know one another before
        introduce(world, plan, log, _replicas(plan, world))
    phase, tokens = continued.phase_at_start(plan.config, world)
    plan = _recomputing(plan.phases(tokens)[0], tokens, world, log)
    config, progress = plan.config, Progress(plan.config, phase)
    set_deterministic(config.train.deterministic)
    data = world.on_all("data", lambda: open_sources(config))
    for text in data.notes:
        log.info(text)
    tasks = _tried(world, plan.phases(tokens), data, log, tasks_of) if tasks_of else ()
    assert config.checkpoint.folder is not None, "filled in when a configuration is loaded"
    group, folder = world.host_group("checkpoint"), Path(config.checkpoint.folder)
    path = data.tokenizer.path if data.tokenizer else None
    marks, record = data.special_ids, world.record
    manager = CheckpointManager(config, folder, group, path, log.info, marks=marks, record=record, starts=starts)
    _check_beginning(config, data, manager, world)
    memory = plan.worst(plan.topology.coords(world.rank)["pp"], tokens)
    own = (world.hosts[world.rank], memory.persistent, memory.total, room(world.device))
    warnings = [*world.on_all("memory", lambda: check_room(world.group.gather_values(own))), *unusual(config)]
    kernels, named = _choose_kernels(config, plan, world, log)
    for line in warnings:
        log.info(f"warning: {line}")
    signals.before_leaving(manager.starts.over)
    signals.before_leaving(lambda why, status: manager.release())
    signals.asked = lambda name: manager.starts.over(name, SAVED) if world.whole else None  # or another did it
    setup: Setup | None = None
    try:
        manager.acquire(counted=True)
        config = manager.keep_settings()
        plan = replace(plan, config=config)
        worker, tracer = world.on_all("model", lambda: _build(plan, world, log, kernels, manager))
        cuda, threads = world.device.type == "cuda", counted(torch.get_num_threads(), "thread")
        device = torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability()
        computes_with, copies = f"{device}, {threads}, {kernels}", _memory_copies(config, world, worker, log)
        setup = Setup(
            config, plan, world, log, signals, data, manager, worker, tracer, progress, copies, computes_with, named,
            tasks, tasks_of, phase,
        )  # fmt: skip
        yield (setup := _restore(setup))
        manager.starts.over("", SAVED)
    except BaseException as error:
        if setup and (action := setup.worker.runtime.observer.action):
            log.note(f"this rank stood in {action} of its pipeline")
        trained, not_finite = progress.step > progress.first_step, (TrainingStopped, NotFiniteError)
        if isinstance(error, MegallamaError) and trained and not isinstance(error, not_finite):
            error.status = FAILED
        text = f"{type(error).__name__}: {error}"
        manager.starts.over(*(world.failed(error) or (text, getattr(error, "status", FAILED))))
        if manager.saving:  # all ranks know: now a save under way may end, if none has left
            seconds = config.checkpoint.finish_seconds
            log.info(f"{text}; the save under way may take up to {seconds:g} s more")
            manager.wait(seconds, lambda: world.whole)
        raise
    finally:
        manager.release()


def _tried(world: World, plans: Sequence[Plan], data: Data, log: Logger, tasks_of: TasksOf) -> Sequence[Task]:
    """Those of eval.tasks, before anything is made; they fit the shortest phase too. Raises: MegallamaError."""
    at = {plan.config.batch.seq_length: plan.config for plan in plans}
    for length in dict.fromkeys((min(at), plans[0].config.batch.seq_length)):
        tasks = world.on_all("eval.tasks", partial(tasks_of, at[length], data, log.info))
    digests = world.group.gather_values([task.digest for task in tasks])
    if other := [rank for rank, own in enumerate(digests) if own != digests[0]]:
        where = f"rank {other[0]} on {world.hosts[other[0]]}"
        raise DataError(f"eval.tasks: {where} has other items than rank 0; copy its files and packages there")
    return tasks


def _check_beginning(config: Config, data: Data, manager: CheckpointManager, world: World) -> None:
    """What a fresh start asks for in vain is known before anything is made: by rank 0."""
    starts = world.on_all("checkpoints", lambda: world.rank == 0 and manager.starts_fresh())
    other = config.checkpoint.continue_from
    world.on_all("data", lambda: starts and other is None and continued.end_of_data(config, data))
    world.on_all(f"cannot continue from {other}", lambda: starts and other and manager.check_other(Path(other)))
    if (path := config.checkpoint.weights_from) is not None:
        what = f"cannot load weights from {path}"
        world.on_all(what, lambda: manager.check_weights(Path(path)) if starts else None)


def _recomputing(plan: Plan, tokens: int, world: World, log: Logger) -> Plan:
    """The plan; where `memory.recompute` was left open, with "none" if that leaves memory everywhere.

    The bits are the same. A run goes on with what its checkpoint has, as long as the memory is there.
    """
    config = plan.config
    if "recompute" in config.memory.model_fields_set:
        return plan
    saved = before(config)
    mode = saved.config.get("memory", {}).get("recompute", "selective") if saved else "none"
    wider = replace(plan, config=config.changed(memory={"recompute": "none"}))
    need = wider.worst(plan.topology.coords(world.rank)["pp"], tokens).total
    told = (mode, world.hosts[world.rank], need, room(world.device))

    def fits(ranks: list[Any]) -> bool:
        limits = {(host, name): limit for _, host, _, has in ranks for name, limit in has.items()}
        sums = {at: sum(r[2] for r in ranks if r[1] == at[0] and at[1] in r[3]) for at in limits}
        return ranks[0][0] == "none" and all(sums[at] <= USED * limit for at, limit in limits.items())

    if not world.group.gather_values(told, fits):
        return plan
    log.info(f'memory.recompute was left open: "none", of which {need / GIB:.3g} GiB are expected on this rank')
    return wider


def _replicas(plan: Plan, world: World) -> list[str]:
    """Why the run cannot go on with 0, 1, ... replicas on such hosts, or "", where rank 0 needs it."""
    if world.rank or not plan.config.run.min_replicas:
        return []
    topology, host, limits = plan.topology, world.hosts[0], room(world.device)
    sharing, out = world.hosts.count(host) if world.device.type == "cpu" else 1, ["no replica is whole"]
    for dp in range(1, topology.dp):
        fewer = replace(plan, topology=replace(topology, dp=dp))
        ranks = fewer.topology.world_size
        out.append("; ".join(check(plan.config, ranks, need_data=False)))
        if not out[-1]:
            need = max(fewer.memory(stage).persistent for stage in range(topology.pp))
            try:
                check_room([(host, need, 0, limits)] * min(sharing, ranks))
            except ConfigError as error:
                out[-1] = str(error)
    return [*out, ""]


def _choose_kernels(config: Config, plan: Plan, world: World, log: Logger) -> tuple[Kernels, dict[str, str]]:
    """The same on all ranks, and what checkpoints have of them; now the log has files."""
    named, resumed = _named_kernels(config, world)
    kernels = world.on_all("kernels", lambda: kernels_of(config, world.device, named))
    same_kernels(world.group, kernels)
    world.on_all("run folder", lambda: log.open(Path(config.run.folder)))
    if len({*world.hosts}) == 1:
        introduce(world, plan, log, _replicas(plan, world))
    for text in [*str(plan).splitlines(), *world.notes, f"kernels: {kernels}"]:
        log.info(text)
    for choice in kernels.choices:  # aloud where something installed does not work
        (log.info if choice.broken else log.note)(f"kernel for {choice}")
    cpu = world.device.type == "cpu"
    taken = {c.operation: c.selected for c in kernels.choices if cpu and OPERATIONS[c.operation].named}
    if others := [f"{name}: {was}, now {taken[name]}" for name, was in resumed.items() if was != taken[name]]:
        log.warn(f"bits will differ from those of the run so far, which was made with {'; '.join(others)}")
    in_fp32 = taken.get("matrix product") in dict(OPERATIONS["matrix product"].named)
    if world.rank == 0 and not in_fp32 and (slow := slow_format(world.device, DTYPES[config.precision.dtype])):
        log.warn(f'{slow}; write precision.dtype="fp32"')
    return kernels, taken


def _named_kernels(config: Config, world: World) -> tuple[dict[str, str], dict[str, str]]:
    """What the run goes on with, or begins with by the processors' table; and the former."""
    saved, dtype = before(config) if world.rank == 0 else None, config.precision.dtype
    was = saved.counters.get("kernels", {}) if saved and saved.precision == dtype else None
    was = world.group.gather_values(was)[0]
    if was is not None or world.device.type != "cpu":
        return (was, was) if was and world.device.type == "cpu" else ({}, {})
    width, table = config.model.hidden_size, config.run.processor_table
    entry = world.on_all("processor table", lambda: Processor.here().entry(width, table))
    return entry.kernels.get(dtype, {}) if entry else {}, {}


def _build(
    plan: Plan, world: World, log: Logger, kernels: Kernels, manager: CheckpointManager
) -> tuple[Worker, StepTracer]:
    before, config = len(world.notes), plan.config
    groups = world.groups(plan.topology, config.model.num_kv_heads or 1)
    for text in world.notes[before:]:
        log.info(text)
    tracer = StepTracer(config, groups, world.device, log, world.record)
    worker = assemble(plan, tracer.groups, world.device, kernels, record=world.record)
    if config.checkpoint.interval:  # the last save needs no snapshot: nothing trains meanwhile
        manager.prepare(worker.optimizer.shards(owned_only=True))
    return worker, tracer


def go_back(setup: Setup) -> Setup:
    """From a step that was not applied to the newest checkpoint, and on with later data."""
    progress, train = setup.progress, setup.config.train
    step, first = progress.step, progress.first_step
    until = setup.config.batch.samples_after(step + train.rollback_skip_steps, step, progress.samples)
    setup.worker.optimizer.wait()
    setup = _restore(setup, until)
    progress.first_step, progress.rollbacks = min(first, progress.step), progress.rollbacks + 1
    left_out = f"samples {until - progress.left_out[str(progress.step)]} to {until - 1} are left out"
    made = f"rollback {progress.rollbacks} of at most {train.max_rollbacks}"
    setup.log.info(f"warning: step {step} is undone ({made}): the run goes on after step {progress.step}; {left_out}")
    return setup


def _restore(setup: Setup, until: int | None = None) -> Setup:
    """Newest checkpoint, given weights, or random ones: the log says which. Its phase, and that one's end.

    until: go back to the one that this run has, and on with this sample.
    """
    config, progress, log, world, manager = setup.config, setup.progress, setup.log, setup.world, setup.manager
    optimizer = setup.worker.optimizer
    shards = optimizer.shards(owned_only=False)
    newest = None if until is None else manager.newest()
    saved = _from_memory(setup, rollback=until is not None)
    if saved is None:
        saved = manager.load(newest[0], shards) if newest else manager.resume(shards)
    if saved is not None:
        assert manager.resumed is not None
        path, before = manager.resumed
        length, number = current(before)["batch"]["seq_length"], continued.phase_of(saved, config)
        world.on_all("configuration", lambda: continued.check_past(before, config, number))
        setup = continued.enter(setup, number)
        config, train = setup.config, setup.data.train
        progress.load_state_dict(saved, length)
        world.on_all("data", lambda: train.resume(saved, progress.step, progress.samples, until))
        if until is not None:
            progress.left_out[str(progress.step)], progress.samples = until - progress.samples, until
        optimizer.loaded(progress.updates)
        log.info(f"resumed after step {progress.step}, {counted(human_count(progress.tokens), 'token')}, from {path}")
        if (other := config.checkpoint.continue_from) is not None:
            log.info(f"checkpoint.continue_from={other} is not read: the run has checkpoints of its own")
    elif config.checkpoint.continue_from is not None:
        for line in continued.take_over(setup):
            log.info(line)
    elif config.checkpoint.weights_from is not None:
        manager.load_weights(Path(config.checkpoint.weights_from), shards)
        optimizer.loaded(steps=0)
        log.info(f"starting from the weights of {config.checkpoint.weights_from}")
    else:
        initialize(setup.worker, config.train.seed)
        log.info(f"starting from random weights of seed {config.train.seed}")
    if manager.resumed is not None:
        for line in changes(manager.resumed[1], config, progress.step, progress.samples, progress.begun):
            log.info(f"since then: {line}")
        world.on_all("configuration", lambda: _check_ramp(config, progress.samples, world.world_size))
    setup.tell_sources()
    return continued.with_end(setup)


def _memory_copies(config: Config, world: World, worker: Worker, log: Logger) -> MemoryCopies | None:
    """Where state is copied to every memory_interval steps, if a supervisor keeps it."""
    interval, tree = config.checkpoint.memory_interval, config.at(0).model_dump(mode="json")
    if not (interval and world.record.watched):
        return None
    tree["train"] |= {"stop_after_steps": 0, "stop_after_minutes": 0}
    same = hashlib.sha256(json.dumps(tree | {"checkpoint": 0, "log": 0, "run": 0}).encode()).hexdigest()[:12]
    folder = str(Path(config.run.folder).resolve())
    key = {"folder": folder, "ranks": world.world_size, "rank": world.rank, "config": same}
    shards, copies, kept = worker.optimizer.shards(owned_only=False), None, dict[str, Any]()
    buddies, size = config.checkpoint.buddy_rate > 0 and len({*world.hosts}) > 1, MemoryCopies.need(shards)
    cuda, host, problem = world.device.type == "cuda", world.hosts[world.rank], ""
    state = 0 if cuda else worker.plan.memory(worker.groups.coords["pp"]).persistent  # in the same memory
    try:
        check_room(world.group.gather_values((host, size * (1 + buddies) + state, 0, room(torch.device("cpu")))))
        kept = world.record.ask(do="open", key=key, size=size, listens=buddies)
        if not (problem := kept["problem"] and f"rank {world.rank} on {host}: {kept['problem']}"):
            with opened(Path(kept["file"]), os.O_RDWR) as file:
                copies = MemoryCopies(file, shards, key, pinned=cuda)
    except ConfigError as error:  # of all ranks
        problem = str(error)
    except (OSError, RuntimeError) as error:
        problem = f"rank {world.rank} on {host}: {error}"
    every = world.group.gather_values([problem, kept.get("end")])
    if (problem := next((text for text, _ in every if text), "")) or copies is None:
        world.record.ask(do="drop")
        log.info(f"warning: no copies in memory: {problem}; they take twice the optimizer's state")
        return None
    log.info(f"copies of the state in memory every {counted(interval, 'step')}: {human_bytes(size)} on this rank")
    copies.ends = [end for _, end in every if buddies]
    return copies


def _from_memory(setup: Setup, rollback: bool) -> dict[str, Any] | None:
    """The counters of a copy in memory that is newer than what is on disk, after its state was taken.

    Without one the run goes on from a checkpoint or anew, and earlier copies are none any more.
    """
    copies, world, manager, config = setup.copies, setup.world, setup.manager, setup.config.checkpoint
    if copies is None:
        if world.rank == 0:  # those of earlier starts do not have what this one makes
            manager.chain.unlink(missing_ok=True)
        return None
    chain, newest, counters, ask = "", None, None, world.record.ask
    if world.rank == 0:
        with suppress(DamagedError):  # then no copy in memory belongs to this run
            chain = read_file(manager.chain, 64).decode(errors="replace")
        newest = next((brief.step for brief, _ in reversed(known(manager.chain.parent))), None)
    if not rollback:
        chain, newest = world.group.gather_values([chain, newest])[0]
        now = {"chain": chain, "newest": newest, "resume": config.resume}
        met = ask(do="meet", ends=copies.ends, rate=config.buddy_rate, **now)
        for line in met.get("notes", [met["problem"]]):
            setup.log.info(line)
        counters = copies.resume(world.group, dict(met.get("own", ())), ask, setup.log.warn)
    if counters is not None:
        manager.lineage, manager.saved_step = counters.pop("lineage"), newest
        own = setup.config.at(continued.phase_of(counters, setup.config))
        manager.resumed = Path("memory"), own.model_dump(mode="json")
        return counters
    chain = world.group.gather_values(secrets.token_hex(8))[0]
    if world.rank == 0:
        write_durably(manager.chain, chain.encode())
    copies.begin(chain)
    return None


def _check_ramp(config: Config, samples: int, ranks: int) -> None:
    """That the ranks can share every batch that is still to come."""
    rest = config.model_copy(update={"batch": config.batch.remaining(samples)})
    if problems := check(rest, ranks, need_data=False):
        raise ConfigError("; ".join(problems))


def room(device: torch.device, root: Path = Path("/")) -> dict[str, int]:
    """Bytes that this rank shares with others, by the name of what limits them."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return {f"{gpu.name} {gpu.uuid}": gpu.total_memory}
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"physical memory": physical, **dict(_cgroups(root))}


def _cgroups(root: Path) -> Iterator[tuple[str, int]]:
    """The limits of this process's control group and of those around it, versions 1 and 2."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
            at = top / path.lstrip("/")
            for folder in [at, *at.parents]:
                file = folder / ("memory.limit_in_bytes" if controllers else "memory.max")
                with suppress(OSError, ValueError):  # a name of the host in a container; "max"
                    if folder.is_relative_to(top):
                        yield str(file), int(file.read_text())


def check_room(needs: Sequence[RankNeeds]) -> list[str]:
    """Warnings where estimates exceed a limit. Raises: ConfigError where certain needs do."""
    warnings = []
    limits = {(host, name, limit) for host, _, _, has in needs for name, limit in has.items()}
    for host, name, limit in sorted(limits):
        sharing = [(bytes_, most) for there, bytes_, most, has in needs if there == host and name in has]
        certain, estimate = map(sum, zip(*sharing, strict=True))
        has = f"{name} on {host} is {limit / GIB:.4g} GiB"
        if certain > limit:
            raise ConfigError(
                f"the state of {counted(len(sharing), 'rank')} (weights, gradients, optimizer) takes exactly "
                f"{certain / GIB:.4g} GiB, but {has}; use more machines, fewer ranks on each, or a smaller model"
            )
        if estimate > limit:
            warnings.append(f"with activations {estimate / GIB:.4g} GiB are expected, but {has}: it may be killed")
    return warnings


def changes(saved: Mapping[str, Any], now: Config, step: int, samples: int, begun: int = 0) -> Iterator[str]:
    """A line per setting that `saved` has otherwise, and what that does to lr and data."""
    saved, default = current(saved), Config().model_dump(mode="json")
    changed = []
    for section, values in now.model_dump(mode="json").items():
        for name, value in values.items():
            was = saved.get(section, {}).get(name, default[section][name])  # may be newer than `saved`
            if was != value:
                changed.append(f"{section}.{name}")
                yield f"{section}.{name} was {literal(was)} and is {literal(value)}"
    try:
        optimizer, schedule = OptimizerConfig(**saved["optimizer"]), LrScheduleConfig(**saved["lr_schedule"])
        end = max(now.train.steps, step + 1)
        for n in range(step, end, max(1, (end - step) // 1000)):
            was = learning_rate(n, optimizer, schedule, begun)
            will = learning_rate(n, now.optimizer, now.lr_schedule, begun)
            if was != will:
                keep = ""
                if schedule.decay_steps != now.lr_schedule.decay_steps:
                    keep = f"; write lr_schedule.decay_steps={schedule.decay_steps} to keep its end where it was"
                yield f"the learning-rate curve is another one: step {n + 1} has {will:.3g} instead of {was:.3g}{keep}"
                break
        was, size = (b.size_after(samples) for b in (BatchConfig(**saved["batch"]), now.batch))
        if was != size:
            yield f"the data come in the same order, but a step takes {size} samples instead of {was}"
    except (ValidationError, KeyError, TypeError):
        yield "an earlier version wrote the checkpoint: what this does to the learning rate is not known"
    if keys := [key for key in changed if key in ORDER]:
        yield f"the order of the data from step {step + 1} on is another one, by {', '.join(keys)}"
