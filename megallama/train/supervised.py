"""A supervisor beside every rank: how it is started, and what the rank tells it about the run.

The launcher's process becomes the supervisor, small and without torch, and its child trains: so it learns of its
death, and gets the launcher's signals.  A thread would stand still with the process, under a lock, in a page fault.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import json
import os
import re
import secrets
import signal
import socket
import sys
import time
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megallama.comm.flight_record import ENDED, GENERATION, LAUNCHER, PORT, SPARE, SUPERVISOR, TRAINER, FlightRecord
from megallama.train.log import Logger
from megallama.train.signals import SIGNALS, STACKS

if TYPE_CHECKING:
    from megallama.comm.launch import Launch, World
    from megallama.plan.plan import Plan

_PARENT_DEATH, _SUBREAPER = 1, 36  # of prctl
_MEETS = ("master_addr", "master_port", "key", "one_node", "store_kept", "attempt")  # how ranks meet
_ASK = 30.0  # seconds in which a run finds out that a rank which asks has been lost
_CODE = "import sys; sys.path.insert(0, sys.argv[1]); from megallama.recovery.supervisor import main; main()"


def is_wanted(arguments: Sequence[str]) -> bool:
    """run.supervisor, from a command line that nobody has checked yet."""
    if not arguments or {"-h", "--help"} & set(arguments):
        return False
    return said_of(arguments, "supervisor", "true").lower() != "false"


def said_of(arguments: Sequence[str], name: str, default: str) -> str:
    """What a command line, or its file, says of run.`name`."""
    said = [m[1] for word in arguments if (m := re.fullmatch(rf"(?:--)?run\.{name}=(.*)", word))]
    if not said and arguments and "=" not in arguments[0]:
        with suppress(OSError, ValueError, AttributeError):  # what is wrong with it is said later
            with open(arguments[0], "rb") as file:
                said = [str(tomllib.load(file).get("run", {}).get(name, default))]
    return said[-1] if said else default


def start_supervisor() -> FlightRecord:
    """The record. This process becomes the supervisor; its child returns, and dies with it.

    With run.max_replacements the child makes one trainer after the other, each of which returns.
    """
    files = FlightRecord.create(), os.memfd_create("megallama-stacks", 0)
    record, several = FlightRecord(*files), said_of(sys.argv[1:], "max_replacements", "0") != "0"
    record.words[LAUNCHER], record.words[SUPERVISOR] = os.getppid(), os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # what comes waits for the supervisor
    child = os.fork()
    if child:
        ctypes.CDLL(None).prctl(_SUBREAPER, int(several))  # of a dead child's children
        root = str(Path(__file__).resolve().parents[2])
        own = [",".join(map(str, files)), str(child), str(int(several)), "megallama.pretrain"]
        try:  # the package alone: nothing of what this process has imported
            os.execv(sys.executable, [sys.executable, "-S", "-s", "-c", _CODE, root, *own, *sys.argv[1:]])
        except OSError as error:
            os.kill(child, signal.SIGKILL)
            sys.exit(f"error: no supervisor could be started: {error}; write run.supervisor=false")
    if several and said_of(sys.argv[1:], "min_replicas", "0") != "0":
        _ask_for_a_place(record)
    return _trainer_of(record, several)


def make_again() -> FlightRecord:
    """`start_supervisor` for a dead maker of trainers. argv: root, files, the launcher's."""
    files = map(int, sys.argv[2].split(","))
    sys.argv[:3] = []
    return _trainer_of(FlightRecord(*files), several=True)


def _trainer_of(record: FlightRecord, several: bool) -> FlightRecord:
    _die_with(record.words[SUPERVISOR])
    if several:
        _become_trainers(record)
    else:
        record.words[TRAINER] = os.getpid()
    faulthandler.register(STACKS, file=record.stacks, all_threads=True)
    return record


def _die_with(parent: int) -> None:
    """From here on the kernel kills this process when its parent has gone."""
    ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def _become_trainers(record: FlightRecord) -> None:
    """Return in a trainer, and, when that has ended and the supervisor wants it, in the next.

    What takes long is imported before. No thread runs, no GPU is touched: trainers start as if first.
    """
    gc.disable()  # as in `pretrain`, which enables it
    for name in ("megallama.train.loop", "torch.fx.experimental.symbolic_shapes"):  # a first backward imports this
        importlib.import_module(name)
    gc.freeze()  # no trainer need look through what is imported
    spare, words = True, record.words
    while True:
        generation, place = words[GENERATION], record.told("place")
        record.begin_again()
        if place is None or place["seat"] in place["seats"]:
            maker = os.getpid()
            if not (trainer := os.fork()):
                _die_with(maker)
                words[TRAINER] = os.getpid()
                return
            if spare and (spare := _is_spare(record)):
                continue  # in place of a dead one
            words[ENDED] = os.waitpid(trainer, 0)[1] + 1
            os.kill(words[SUPERVISOR], signal.SIGCHLD)
        while words[GENERATION] == generation:
            time.sleep(0.02)


def _is_spare(record: FlightRecord) -> bool:
    """False in this process; True in another as warm, once this has died and the supervisor wants it."""
    if child := os.fork():
        os.waitpid(child, 0)
        return False
    between = os.getpid()
    if os.fork():
        os._exit(0)  # then the supervisor is the other's parent, as it is the maker's
    while os.getppid() == between:
        time.sleep(0.001)
    _die_with(record.words[SUPERVISOR])
    record.words[SPARE] = own = os.getpid()
    while record.words[SPARE] != -own:
        time.sleep(0.05)
    return True


def _ask_for_a_place(record: FlightRecord) -> None:
    """Where its run goes on without this rank, it waits there for a place, and starts none.

    Raises: SystemExit with 2 where that run has it, or was started otherwise.
    """
    from megallama.comm.launch import detect_launch
    from megallama.config.errors import LaunchError
    from megallama.config.schema import RunConfig

    with suppress(LaunchError):  # which a trainer says
        launch = detect_launch(parent=record.words[LAUNCHER])
        folder = Path(said_of(sys.argv[1:], "folder", RunConfig().folder)).resolve()
        hello = {"seat": launch.rank, "name": launch.host, "arguments": sys.argv[1:], "asks": True}
        over = not launch.rank or (folder / "exit.json").exists()
        refused = None if over else _ask(folder / "status" / "root", hello)
        if refused:
            text = f"rank {launch.rank} ({launch.host}) has no place in the run that goes on in {folder}: {refused}"
            os.write(2, f"error: {text}\n".encode())
            record.ends(2, text)
            sys.exit(2)
        if refused is not None:
            os.write(2, f"rank {launch.rank} ({launch.host}) waits for a place in the run in {folder}\n".encode())
            record.tell("place", {"seat": launch.rank, "seats": [], "folder": str(folder)})


def _ask(path: Path, hello: dict[str, object]) -> str | None:
    """Why there is no place for a rank, empty if there is; None where no run goes on."""
    deadline = time.monotonic() + _ASK
    while time.monotonic() < deadline:
        try:
            root = json.loads(path.read_text(encoding="ascii"))
            link = socket.create_connection((root["address"], root["port"]), 2.0)
        except (OSError, ValueError, KeyError):
            return None
        with link, suppress(OSError, ValueError):  # no answer while the rank is thought to be there
            link.sendall(json.dumps(hello | {"token": root["token"]}).encode() + b"\n")
            return str(json.loads(link.makefile().readline())["why"])
        time.sleep(0.5)
    return "as far as is known that rank is there"


def place_of(launch: Launch) -> dict[str, Any]:
    """Which rank this is, and what the ranks of its `launch` and no others have in common."""
    who = {"rank": launch.rank, "ranks": launch.world_size, "host": launch.host, "launcher": launch.launcher}
    return who | {"launch": {name: getattr(launch, name) for name in _MEETS}}


def introduce(world: World, plan: Plan, log: Logger, replicas: Sequence[str]) -> None:
    """Tell this rank's supervisor of the run and of how it reaches the others; every rank calls it.

    replicas: rank 0's, why the run cannot go on with so many, by their number from 0; empty where it can.
    """
    config, record, arrivals = plan.config, world.record, world.arrivals
    if not record.watched:
        return
    folder = Path(config.run.folder).resolve()
    place, launch, topology = record.told("place") or {}, world.launch, plan.topology
    hosts = [*dict.fromkeys([*place.get("hosts", ()), *world.hosts])]  # a host keeps its number
    work = [*map(plan.work_of, range(world.world_size))]
    about = {
        **place_of(launch), "folder": str(folder), "hosts": hosts,
        "host_of": [hosts.index(host) for host in world.hosts], "seats": place.get("seats") or [*range(len(work))],
        "records": [a.record for a in arrivals] or [[record.words[SUPERVISOR], record.file, record.stacks]],
        "stage": [*map([*dict.fromkeys(work)].index, work)],  # or with other micro-batches
        "finish_seconds": config.checkpoint.finish_seconds, "max_replacements": config.run.max_replacements,
        "min_replicas": config.run.min_replicas, "replicas": [*replicas], "dp": [topology.strides["dp"], topology.dp],
        "timeout_seconds": config.run.timeout_seconds,
        "address": "127.0.0.1" if launch.one_node else launch.master_addr, "port": 0, "token": "",
    }  # fmt: skip
    made: list[object] = [0, ""]
    if world.rank == 0:
        try:
            token = _new_status_folder(folder / "status")
            (folder / "exit.json").unlink(missing_ok=True)
            made = [_listening(record, about) if len(hosts) > 1 or config.run.min_replicas else 0, ""]
            root = {"address": about["address"], "port": made[0], "token": token}
            (new := folder / "status" / "new").touch(0o600, exist_ok=False)
            new.write_text(json.dumps(root), encoding="ascii")
            new.replace(folder / "status" / "root")  # never half of it
        except OSError as error:
            made[1] = f"{error.filename}: {error.strerror}"
    about["port"], problem = world.group.gather_values(made)[0]
    if not problem:
        try:
            about["token"] = (folder / "status" / "token").read_text(encoding="ascii")
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}"
    if problem:
        log.warn(f"the supervisors of several hosts cannot meet, and `megallama status` is blind ({problem})")
    record.tell("about", about)


def _new_status_folder(folder: Path) -> str:
    """An empty folder with a new token in it that only this user can read."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*"):
        with suppress(OSError):
            if old.name != "root":  # by which ranks find this run
                old.unlink()
    token = secrets.token_hex(16)
    (folder / "token").touch(0o600, exist_ok=False)
    (folder / "token").write_text(token, encoding="ascii")
    return token


def _listening(record: FlightRecord, about: dict[str, object]) -> int:
    """The port on which rank 0's supervisor listens from now on; 0 if it does not."""
    record.tell("about", about | {"port": -1})
    deadline = time.monotonic() + 5
    while not record.words[PORT] and time.monotonic() < deadline:
        time.sleep(0.02)
    return record.words[PORT]
