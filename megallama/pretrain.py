"""Train a LLaMA: the one entry point, alone, under torchrun, srun or mpirun.

    python -m megallama.pretrain CONFIG.toml [section.key=value ...]

Exit status: 0 all steps are done; 2 an error in what was asked for, found before anything was
changed; 3 too many steps in a row were not finite; 4 any other failure once training had begun: the
checkpoints are there, and the log says how far they go; 5 bits of weights changed by themselves;
75 saved and stopped early (a signal, or train.stop_after_*): the same command continues; 1 anything
else, before training had begun.
"""

from __future__ import annotations

import gc
import hashlib
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megallama.comm.flight_record import GENERATION, LAUNCHER, FlightRecord
from megallama.config.errors import ConfigError, InternalError, LaunchError, LostError, MegallamaError, drop_output
from megallama.train.log import Logger, finish_output
from megallama.train.signals import FAILED, FINISHED, SAVED, SignalFlag  # what takes time comes after it
from megallama.train.supervised import is_wanted, make_again, place_of, start_supervisor

if TYPE_CHECKING:
    from megallama.checkpoint.starts import Starts
    from megallama.comm.launch import Launch, World
    from megallama.config.schema import Config
    from megallama.plan.plan import Plan

CRASHED, BAD_REQUEST, NOT_FINITE = 1, 2, 3
UNREAD = 141  # as the shell has it, where whoever read the output has gone


def process(again: bool = False) -> int:
    """What a launcher, or `again` a supervisor, starts: `main`, watched if wanted; the exit status."""
    record = make_again() if again else start_supervisor() if is_wanted(sys.argv[1:]) else None
    status = main(record=record)
    finish_output()
    return status


def main(argv: Sequence[str] | None = None, record: FlightRecord | None = None) -> int:
    """Run with these arguments (default: the command line's); the exit status. `record`: for supervisors."""
    record = record or FlightRecord()
    with SignalFlag() as signals:
        status = _run(list(sys.argv[1:] if argv is None else argv), signals, record)
        signals.leaving(status, for_good=argv is None or status == SAVED)
        record.ends(status, {FINISHED: "finished", SAVED: "stopped as asked"}.get(status, "failed"))
        return status


def _run(arguments: Sequence[str], signals: SignalFlag, record: FlightRecord) -> int:
    if not arguments or {"-h", "--help"} & set(arguments):
        try:
            print((__doc__ or "").strip(), flush=True)
        except BrokenPipeError:
            drop_output()
            return UNREAD
        return FINISHED if arguments else BAD_REQUEST
    gc.disable()  # to look for garbage in what is imported takes a seventh of the time
    from megallama.checkpoint.folder import FolderLock  # imports torch: after --help
    from megallama.checkpoint.starts import Starts
    from megallama.comm.launch import detect_launch, start
    from megallama.train.loop import TrainingLoop
    from megallama.train.setup import set_up

    gc.enable()
    log, starts = Logger(0, 1), None
    try:
        known: dict[str, Any] = {"generation": record.words[GENERATION], "place": record.told("place")}
        launch = detect_launch(parent=record.words[LAUNCHER], **known)
        log = Logger(launch.rank, launch.world_size, launched=launch.launched)
        record.tell("about", place_of(launch))
        signals.before_leaving(partial(_say, log, record))
        if launch.world_size == 1:
            signals.listen(signals.leave)
        config, plan, needs = _request(arguments, launch, signals, log)
        if launch.rank == 0:
            starts = Starts(FolderLock(Path(str(config.checkpoint.folder)), log.info), config, launch.world_size)
            signals.before_leaving(starts.ended_early)
        with start(launch, config.run, listener=signals, record=record, **needs) as world:
            try:
                # beside the engine, where nothing else knows its name
                tasks_of = import_module("megallama.evaluation.harness").tasks_of if config.eval.tasks else None
                with set_up(config, plan, world, log, signals, starts, tasks_of) as setup:  # opens a good request's log
                    return TrainingLoop(setup).run()
            except Exception as error:
                return _failed(error, world, log, signals, Path(config.run.folder), starts)
            finally:
                log.close()
    except MegallamaError as error:
        signals.leaving(error.status)
        status = starts.ended_early(str(error), error.status) if starts else error.status
        lost = isinstance(error, LostError)
        record.ends(CRASHED if lost else status, str(error), echo=error.shared or lost)
        log.error(str(error), aloud=log.rank == 0 or not error.shared)
        return status


def _say(log: Logger, record: FlightRecord, why: str, status: int) -> None:
    record.ends(status, why)
    if status == SAVED:
        log.info(f"stopped before training began: {why}; nothing is to be saved, the same command starts again")
    else:
        log.error(why, aloud=log.rank == 0)


def _request(
    arguments: Sequence[str], launch: Launch, signals: SignalFlag, log: Logger
) -> tuple[Config, Plan, dict[str, Any]]:
    """Configuration, plan, and what `start` has to know of them."""
    from megallama.checkpoint.folder import begun
    from megallama.checkpoint.manifest import SHARD_BYTES
    from megallama.comm.group import partitions
    from megallama.comm.launch import cuda_environment, start
    from megallama.config.load import is_setting, load, to_toml
    from megallama.config.schema import RunConfig
    from megallama.kernels import processors
    from megallama.plan.params import num_parameters
    from megallama.plan.plan import make_plan
    from megallama.train.auto import decide

    file, ranks, decided = None if is_setting(arguments[0]) else Path(arguments[0]), launch.world_size, list[str]()
    try:
        settings, known = arguments[file is not None :], partial(decide, note=decided.append)
        config = load(file, settings, ranks=ranks, begun=begun, note=log.info, decide=known)
        for text in decided:
            log.info(text)
        if launch.generation:  # the first has begun as was said; now its state is gone on from
            config = config.changed(checkpoint={"resume": "auto"})
        plan, table = make_plan(config, ranks), processors.digest(config.run.processor_table)
    except Exception as problem:  # the others would wait; what rank 0 has too it says
        text = str(problem) if isinstance(problem, MegallamaError) else f"{type(problem).__name__}: {problem}"
        where = f"rank {launch.rank} ({launch.host}): " if launch.rank else ""
        try:
            if launch.world_size > 1:
                start(launch, RunConfig(device="cpu"), problem=where + text, listener=signals)
        except LaunchError as error:
            if isinstance(problem, MegallamaError):
                problem.shared = str(error) == text
        raise
    same = hashlib.sha256(f"{to_toml(config)}{plan.schedule}".encode()).hexdigest()[:12] + "; ".join([table, *decided])
    parts = partitions(plan.topology, config.model.num_kv_heads or 1).values()
    groups = [len(ranks) for part in parts for ranks in part if launch.rank in ranks]
    sources = len(config.data.train) + len(config.data.valid) + len(config.data.test)
    files = 2 * sources + 4 + 16 * num_parameters(config.model) // SHARD_BYTES
    return config, plan, {"config_hash": same, "groups": groups, "files": files, "cuda": cuda_environment(config)}


def _failed(
    error: Exception, world: World, log: Logger, signals: SignalFlag, folder: Path, early: Starts | None
) -> int:
    """Say what ended the run, to this rank's file and, once, on the screen; the exit status."""
    from megallama.comm.group import ContactLost

    first = world.failed(error)
    if first is not None:
        signals.leave(*first)
    status = error.status if isinstance(error, (MegallamaError, InternalError)) else CRASHED
    if status == CRASHED and signals.phase in ("training", "leaving"):
        status = FAILED
    signals.leaving(status)
    line = f"{type(error).__name__}: {error}"
    if status != BAD_REQUEST:  # of a bad request nothing is left behind
        with suppress(ConfigError):
            log.open(folder)
    status = early.ended_early(first[0] if first else line, status) if early else status
    world.record.ends(status, line, echo=first is not None or isinstance(error, ContactLost))
    if isinstance(error, (MegallamaError, InternalError)):
        log.error(str(error), aloud=world.rank == 0 or not error.shared)
    elif first is not None:
        log.warn(f"{first[0]}; this rank stopped because of it ({type(error).__name__})")
    else:
        text = "".join(traceback.format_exception(error)).rstrip()
        if isinstance(error, OSError):  # no fault of the program: on the screen a line will do
            log.note(text)
            text = line
        log.error(text, aloud=True)
    return status


if __name__ == "__main__":
    sys.exit(process())
