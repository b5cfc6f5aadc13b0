"""A step again, from the checkpoint before it: was it the data, the numbers' format, or the machine?

The same bits again: then the step is what its data and its state make of it, in fp64 too (data) or not (numerics).
Other bits mean hardware only with the ranks, device, kernels and versions of the run, and deterministic kernels.
Everywhere else a second replay, with the samples in another order, and one in fp64 show how far rounding moves them.
"""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import megallama
from megallama.checkpoint.folder import known
from megallama.checkpoint.manifest import Manifest, read_manifest
from megallama.comm.launch import World, cuda_environment, detect_launch, start
from megallama.config.errors import ConfigError, counted
from megallama.config.rules import check
from megallama.config.schema import Config, ParallelConfig
from megallama.plan.plan import make_plan
from megallama.train.log import Logger
from megallama.train.loop import TrainingLoop
from megallama.train.metrics import read_metrics
from megallama.train.progress import Spikes
from megallama.train.setup import set_up
from megallama.train.signals import SignalFlag

Numbers = tuple[float, float]  # loss, gradient norm
NAMES = ("loss", "grad_norm")
WIDTH = 4.0  # times what two replays differ by: inside nothing can be said
_LINE = re.compile(r" step (\d+): loss (\S+), grad norm (\S+)$", re.M)


def replay(folder: Path, step: int) -> list[str]:
    """Launch and run it on all ranks: the numbers and the verdict, on rank 0. Raises: MegallamaError."""
    launch = detect_launch()
    before, made = _checkpoints(folder, step)
    config = Config.model_validate(made.config)
    cuda = cuda_environment(config)
    with start(launch, config.run, config_hash=f"replay {step}", cuda=cuda) as world:
        lines = replay_with(world, folder, step, before, made)
    return lines if launch.rank == 0 else []


def _checkpoints(folder: Path, step: int) -> tuple[Path, Manifest]:
    """The checkpoint to begin at, and the manifest that tells how the step was made: the next one's, if it is there."""
    place = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    found = sorted((brief.step, path) for brief, path in known(place))
    before, after = [path for n, path in found if n < step], [path for n, path in found if n >= step]
    if not before:
        held = ", ".join(str(number) for number, _ in found) or "none"
        raise ConfigError(
            f"no checkpoint before step {step} in {place} (steps there: {held}); checkpoint.keep_last and keep_every "
            "say which are kept: choose a later step, or keep more in the next run"
        )
    return before[-1], read_manifest((after or before[-1:])[0])


def recorded(run: Path) -> dict[int, Numbers]:
    """Loss and gradient norm of every step that metrics.jsonl and rank 0's own file have, with all bits."""
    out: dict[int, Numbers] = {}
    for file in (run / "logs").glob("rank-0000.log"):
        for number, loss, norm in _LINE.findall(file.read_text(errors="replace")):
            out[int(number)] = float(loss), float(norm)
    for record in read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else ():
        if record.get("kind") == "train":  # null: it was not finite
            out[record["step"]] = tuple(math.nan if record[n] is None else record[n] for n in NAMES)  # type: ignore[assignment]
    return out


def replay_with(world: World, folder: Path, step: int, before: Path, made: Manifest) -> list[str]:
    """As `replay`, with ranks that have met."""
    config = Config.model_validate(made.config)
    run = folder if (folder / "metrics.jsonl").exists() else Path(config.run.folder)
    was = recorded(run)
    if step not in was:
        raise ConfigError(f"{run} has no record of step {step}: neither metrics.jsonl nor logs/ name it")
    fits = world.world_size % (config.parallel.unit) == 0
    config = config if fits else config.model_copy(update={"parallel": ParallelConfig()})
    if problems := check(config, world.world_size, need_data=False):
        raise ConfigError("; ".join(problems))
    scratch = Path(world.group.gather_values(tempfile.mkdtemp(prefix="replay-", dir=run) if not world.rank else "")[0])
    with ExitStack() as stack:
        if world.rank == 0:
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
            (scratch / "checkpoints").mkdir()
            (scratch / "checkpoints" / before.name).symlink_to(before.resolve())
        world.group.barrier()
        run_it = partial(_run, config, world, scratch, step, made)
        again, computes_with = run_it()
        then = {**made.versions, "ranks": made.saved_by_ranks, "layout": "the run's"}
        then |= {"device and kernels": made.counters.get("computes_with")}
        now = {"torch": torch.__version__, "megallama": megallama.__version__, "ranks": world.world_size}
        now |= {"layout": "the run's" if fits else "tp=1, pp=1", "device and kernels": computes_with}
        differs = [f"{name}: {then.get(name)}, now {value}" for name, value in now.items() if then.get(name) != value]
        strict = not differs and (config.train.deterministic or world.device.type == "cpu")
        second, _ = run_it(reverse=not strict)
        exact, _ = (again, "") if config.precision.dtype == "fp64" else run_it(exact=True)
        world.group.barrier()
    earlier = [was[n] for n in sorted(was) if n < step and math.isfinite(sum(was[n]))]
    usual = earlier[-Spikes.WINDOW :] or [was[step]]
    typical = median(loss for loss, _ in usual), median(norm for _, norm in usual)
    verdict = judge(was[step], again[step], second[step], exact[step], typical, strict)
    first = next((n for n in sorted(again) if n in was and str(was[n]) != str(again[n])), None)
    rows = {"recorded": was[step], "again": again[step], "once more": second[step], "in fp64": exact[step]}
    lines = [f"step {step}, {counted(len(again), 'step')} after {before}, on {counted(world.world_size, 'rank')}"]
    lines += [f"{name:<10} loss {loss!r:<22} grad norm {norm!r}" for name, (loss, norm) in rows.items()]
    lines += [f"other than in the run: {what}" for what in differs]
    lines += [f"the first step whose bits differ is {first}"] if first is not None else []
    return [*lines, verdict, ""]


def _run(
    config: Config, world: World, scratch: Path, step: int, made: Manifest, exact: bool = False, reverse: bool = False
) -> tuple[dict[int, Numbers], str]:
    """The numbers of every step up to `step`, and what they were computed with; `reverse`: the samples of each."""
    changes: dict[str, dict[str, Any]] = {
        "run": {"folder": str(scratch)},
        "checkpoint": {"folder": str(scratch / "checkpoints"), "resume": "must", "interval": 0, "weights_from": None},
        "log": {"trace_steps": None},
        "precision": {"dtype": "fp64", "fp8": "none"} if exact else {},
    }
    config, log = config.changed(**changes), Logger(world.rank, world.world_size)
    log.info = log.warn = log.note  # type: ignore[method-assign]  # to its files alone
    out: dict[int, Numbers] = {}
    with closing(log), set_up(config, make_plan(config, world.world_size), world, log, SignalFlag()) as setup:
        train, at, samples = setup.data.train, setup.progress.step, setup.progress.samples
        if more := made.counters.get("left_out", {}).get(str(at)):  # the run came back here, and took later data
            setup.progress.samples += more
            if setup.train_data:
                setup.train_data.resume(setup.train_data.state(samples), at, samples, samples + more)
        read = train.read
        if reverse:
            train.read = lambda ids: read(ids[::-1])  # type: ignore[method-assign]
        loop = TrainingLoop(setup)
        with loop._loader() as loader:
            while setup.progress.step < step:
                result = loop._one_step(loader)
                out[setup.progress.step] = result.loss, result.grad_norm
        setup.worker.optimizer.wait()
    return out, setup.computes_with


def judge(was: Numbers, again: Numbers, second: Numbers, exact: Numbers, typical: Numbers, strict: bool) -> str:
    """The verdict on a step that `was` so, by three replays; `strict`: no bit of the first two may differ from it."""
    if str(was) == str(again):  # not a number is itself here
        if gone := [name for name, *x in zip(NAMES, was, exact, typical, strict=True) if _gone(name, *x)]:
            return f"numerics: the same bits again, but {' and '.join(gone)} does not stand out in fp64"
        return "data: the same bits again, and nothing that fp64 would change: look with megallama explain"
    if strict and str(again) == str(second):
        agree = "the replays agree with one another and not with the run"
        return f"hardware: {agree}: a machine of the run computed wrongly"
    if strict:
        return "hardware: two replays differ here, with deterministic kernels: this machine is not to be trusted"
    spreads = [max(abs(a - b), abs(a - c)) for a, b, c in zip(again, second, exact, strict=True)]
    off = [abs(x - a) for x, a in zip(was, again, strict=True)]
    said = ", ".join(f"{n} is off by {o:.3g}, replays by {s:.3g}" for n, o, s in zip(NAMES, off, spreads, strict=True))
    if all(o <= WIDTH * s for o, s in zip(off, spreads, strict=True)):
        return f"not decidable: {said}: rounding explains it"
    return (
        f"unexplained: {said}: more than rounding. Whether a machine computed wrongly says a replay with the ranks, "
        "device, kernels and versions of the run, and train.deterministic=true"
    )


def _gone(name: str, was: float, exact: float, typical: float) -> bool:
    """Whether a number that stood out stands out by less than half in fp64."""
    if not math.isfinite(was):
        return math.isfinite(exact)
    return was > (1 + 10 * Spikes.WIDTH[name]) * typical and exact - typical < (was - typical) / 2
