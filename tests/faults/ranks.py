"""Ranks of `pretrain.main` as processes of their own, forked from a server that has torch imported."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.faults.hosts import enter
from tests.faults.test_bad_input import GOOD

QUIET = [*GOOD, "precision.dtype=fp32", "log.tensorboard=false", "run.threads=1"]

WORDS = {  # of a launcher: rank, ranks, rank on this node, ranks on this node
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "openmpi": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
}


class Ranks:
    """`size` processes that run `main`; rank `victim` calls the function `fault` of this file first.

    terminal: what they write to, instead of a file each; `controlling`: it is the one whose end is a SIGHUP.
    hosts: where each of them runs, by the names of `tests.faults.hosts`; `env`: more of the environment.
    supervised: each has a supervisor, as under a launcher; `processes` are the supervisors then.
    launcher: whose words the environment has, torchrun's or openmpi's; it is played by the test.
    """

    def __init__(
        self, size: int, arguments: Sequence[str], folder: Path, fault: str = "", victim: int = 0, *,
        terminal: str = "", controlling: bool = False, hosts: Sequence[str] = (), env: dict[str, Any] | None = None,
        supervised: bool = False, launcher: str = "torchrun",
    ) -> None:  # fmt: skip
        context = self._context = multiprocessing.get_context("forkserver")
        # what torch imports in its first backward pass (0.2 s) is imported before too, once for all ranks
        preload = ["torch", "torch.fx.experimental.symbolic_shapes", "megallama.train.loop", "tests.faults.ranks"]
        context.set_forkserver_preload(preload)
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port = server.getsockname()[1]
        self.outputs = [folder / f"out.{rank}" for rank in range(size)]
        self.processes, self._what = [], list[Any]()
        options = [*QUIET, f"run.folder={folder / 'run'}", *arguments]
        for rank, output in enumerate(self.outputs):
            own = dict(zip(WORDS[launcher], (rank, size, rank, size), strict=True))
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.port, **(env or {})}
            planted, host = fault if rank == victim else "", hosts[rank] if hosts else ""
            what = (options, own if size > 1 else {}, terminal or str(output), controlling, planted, host, supervised)
            self._what.append(what)
            self.processes.append(context.Process(target=_rank, args=what, daemon=True))
            self.processes[-1].start()

    def start_again(self, rank: int, *more: str) -> None:
        """Start the command of a rank that has ended once more, with `more` arguments."""
        self.processes[rank].join()
        options, *rest = self._what[rank]
        self.processes[rank] = self._context.Process(target=_rank, args=([*options, *more], *rest), daemon=True)
        self.processes[rank].start()

    def wait(self, seconds: float = 60.0) -> list[int | None]:
        """Exit statuses; None for who has not left within `seconds`."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        statuses = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return statuses

    def until(self, text: str, rank: int = 0, seconds: float = 60.0) -> None:
        """Wait for a rank to have said `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.said(rank):
            assert time.monotonic() < deadline, self.said(rank)
            time.sleep(0.02)

    def trainer(self, rank: int) -> int:
        """The process that trains, of a supervised rank."""
        return _child_of(self.processes[rank].pid or 0)

    def made(self, rank: int) -> int:
        """The same where ranks are replaced: `trainer` is the process that makes it."""
        return _child_of(self.trainer(rank))

    def said(self, rank: int) -> str:
        """What a rank has printed."""
        return self.outputs[rank].read_text(errors="replace") if self.outputs[rank].exists() else ""


def _child_of(pid: int) -> int:
    deadline = time.monotonic() + 20
    while not (children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return int(children[0])


def _rank(
    arguments: list[str], env: dict[str, Any], output: str, controlling: bool, fault: str, host: str, supervised: bool
) -> None:
    os.setsid()
    if host:
        enter(host)
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI", "RANK", "WORLD_"))]:
        del os.environ[name]
    os.environ.update({name: str(value) for name, value in env.items()})
    how = os.O_RDWR if controlling else os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY
    file = os.open(output, how, 0o644)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pretrain = importlib.import_module("megallama.pretrain")
    if fault:
        globals()[fault]()
    if supervised:
        sys.argv[1:] = arguments
        os._exit(pretrain.process())
    os._exit(pretrain.main(arguments))


def _instead(module: str, name: str, act: Any) -> None:
    setattr(importlib.import_module(module), name, act)


def dies_before_the_groups() -> None:
    _instead("torch.distributed", "init_process_group", lambda *a, **k: os._exit(9))


def dies_between_the_groups() -> None:
    _instead("torch.distributed", "new_group", lambda *a, **k: os._exit(9))


def _asked_for(seconds: float, number: int) -> Any:
    def act(*arguments: Any, **named: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(seconds)

    return act


def asked_before_the_groups() -> None:
    _instead("torch.distributed", "init_process_group", _asked_for(40, signal.SIGTERM))


def asked_while_data_are_opened() -> None:
    _instead("megallama.train.setup", "open_sources", _asked_for(40, signal.SIGHUP))


def asked_before_anything() -> None:
    detect = importlib.import_module("megallama.comm.launch").detect_launch

    def act(**known: int) -> Any:
        os.kill(os.getpid(), signal.SIGUSR2)
        return detect(**known)

    _instead("megallama.comm.launch", "detect_launch", act)


def asked_while_the_model_is_built() -> None:
    _instead("megallama.train.setup", "assemble", _asked_for(40, signal.SIGTERM))


def killed_while_the_model_is_built() -> None:
    _instead("megallama.train.setup", "assemble", _asked_for(40, signal.SIGKILL))


def waits_before_there_is_a_trainer() -> None:
    """Its maker does; one that is made again does not."""
    _instead("megallama.train.supervised", "_become_trainers", lambda record: time.sleep(100))


def waits_when_they_have_met() -> None:
    """All but the ranks' first messages."""
    waits_while_it_is_set_up(-1, 0)


def waits_while_it_is_set_up(before: int = 0, after: int = 1) -> None:
    """Before the ranks meet, and, once it is replaced, when they have met: in these generations."""
    launch, setup = (importlib.import_module(f"megallama.{name}") for name in ("comm.launch", "train.setup"))
    gather, sources, now = launch._gather, setup.open_sources, [0]

    def first(launch: Any, *rest: Any) -> Any:
        now[0] = launch.generation
        if launch.generation == before:
            time.sleep(100)
        return gather(launch, *rest)

    def second(config: Any) -> Any:
        if now[0] == after:
            time.sleep(100)
        return sources(config)

    launch._gather, setup.open_sources = first, second


def stands_still() -> None:
    """Whenever it comes to a function of PLANTED, for so many seconds; once, where that names a file."""
    module, name, seconds, *file = os.environ["PLANTED"].split()
    real = getattr(importlib.import_module(f"megallama.{module}"), name)

    def stands(*arguments: Any, **named: Any) -> Any:
        if not any(map(os.path.exists, file)):
            for path in file:
                Path(path).touch()
            print("it stands still", flush=True)
            time.sleep(float(seconds))
        return real(*arguments, **named)

    _instead(f"megallama.{module}", name, stands)


def dies_once_step_4_is_saved() -> None:
    """If that is within 1 s, while the line of that step in metrics.jsonl waits to be written."""
    lines = importlib.import_module("megallama.train.metrics").JsonLines
    real, saved = lines.write, Path(os.environ["PLANTED"])

    def write(self: Any, record: Any) -> None:
        until = time.monotonic() + 0.8 * (record["step"] == 4)
        while time.monotonic() < until:
            if saved.exists():
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.01)
        real(self, record)

    lines.write = write


def saves_slowly_and_stops_while_it_leaves() -> None:
    """The last save takes 3 s; then, when all is saved, the process is stopped."""
    manager = importlib.import_module("megallama.checkpoint.manager").CheckpointManager
    write, world = manager._write, importlib.import_module("megallama.comm.launch").World

    def slow(*arguments: Any) -> None:
        time.sleep(3)
        write(*arguments)

    manager._write, world.close = slow, lambda self: os.kill(os.getpid(), signal.SIGSTOP)


def has_a_bug() -> None:
    def broken(*arguments: Any, **named: Any) -> None:
        raise KeyError("no such key")

    _instead("megallama.train.setup", "assemble", broken)


def has_a_bad_disk() -> None:
    def broken(*arguments: Any, **named: Any) -> None:
        raise OSError(5, "Input/output error", "/data/web.bin")

    _instead("megallama.train.setup", "open_sources", broken)


def has_no_file() -> None:
    load = importlib.import_module("megallama.config.load").load
    _instead("megallama.config.load", "load", lambda file, overrides, **rest: load(Path("/nope/my.toml"), overrides))


def _in_step_three(act: Callable[[], object]) -> None:
    """Before a rank tells the others its numbers of the third step."""
    step, calls = importlib.import_module("megallama.train.step"), [0]
    real = step.rank_numbers

    def rank_numbers(*rest: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            act()
        return real(*rest)

    _instead("megallama.train.step", "rank_numbers", rank_numbers)


def leaves_one_out() -> None:
    """It does not take part in the reduction that ends its third step."""
    step, calls = importlib.import_module("megallama.train.step"), [0]
    real = step.consensus

    def consensus(worker: Any, *rest: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] != 3:
            return real(worker, *rest, **named)
        return step.StepConsensus({"loss": 1.0, "norm_squared": 1.0, **step.RankStatus().counts()})

    _instead("megallama.train.step", "consensus", consensus)


def holds_the_interpreter() -> None:
    """It is in C code that never gives the lock of the interpreter back."""
    _in_step_three(lambda: importlib.import_module("re").match(r"(a*)*b", "a" * 64))


def fails_in_a_step() -> None:
    """There is an exception."""

    def fail() -> None:
        raise ValueError("planted")

    _in_step_three(fail)


def leaves_without_a_word() -> None:
    """The process ends, outside Python, as if all were well."""
    _in_step_three(lambda: os._exit(0))


def works_slowly() -> None:
    """Every forward takes 20 ms more."""
    runtime = importlib.import_module("megallama.pipeline.runtime").PipelineRuntime
    real = runtime._forward

    def forward(self: Any, action: Any) -> None:
        time.sleep(0.02)
        real(self, action)

    runtime._forward = forward


def fails_at_once() -> None:
    """There is an exception before the first step is finished."""

    def fail(*rest: Any) -> None:
        raise ValueError("planted")

    _instead("megallama.train.step", "rank_numbers", fail)
