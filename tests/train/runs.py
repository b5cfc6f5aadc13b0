"""Whole training runs in the processes of the pool, and what they leave behind."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import megallama.train.step as step_module
from megallama.comm.flight_record import STEP
from megallama.comm.launch import World
from megallama.config.errors import InternalError, MegallamaError
from megallama.config.presets import PRESETS
from megallama.config.schema import ModelConfig
from megallama.plan.plan import make_plan
from megallama.train.assemble import Worker
from megallama.train.log import Logger
from megallama.train.loop import TrainingLoop
from megallama.train.metrics import TAGS
from megallama.train.setup import set_up
from megallama.train.signals import SignalFlag
from megallama.train.step import evaluate_step
from tests.small import MODEL, logits, small_config


def run(world: World, folder: str, sections: dict[str, dict[str, Any]], fault: str | None = None) -> dict[str, Any]:
    """Train; the exit status, or the error's text. `fault` is "nan:STEP:RANK" or "signal:STEP:RANK" (steps from 0),
    "truncate:STEP:RANK:FILE", "read:STEP:RANK" (its data cannot be read), "signal-in-evaluation:BATCH:RANK" or
    "late-in-evaluation:BATCH:RANK" (batches from 1 on, of all evaluations), or "read-in-evaluation:0:RANK";
    "stuck:STEP:RANK" (from then on a bit of its weights is wrong), or "scale:STEP:RANK:FACTOR" (of its gradients)."""
    torch.set_num_threads(1)
    world.record.words[STEP] = 0
    config = small_config(**{**sections, "run": {"folder": folder, "peak_tflops": 1.0, **sections.get("run", {})}})
    log, signals = Logger(world.rank, world.world_size, Path(folder)), SignalFlag()
    try:
        with signals, set_up(config, make_plan(config, world.world_size), world, log, signals) as setup:
            loop = TrainingLoop(setup)
            if fault is not None:
                kind, step, rank, *file = fault.split(":")
                if int(rank) == world.rank:
                    plant = _plant_in_evaluation if kind.endswith("evaluation") else _plant
                    plant(loop, kind, {int(s) for s in step.split(",")}, *file)
            status = loop.run()
        told = {"told": world.record.words[STEP]} if "evaluation" in str(fault) else {}  # to the supervisor
        return {"status": status, "step": setup.progress.step, "updates": setup.progress.updates, **told}
    except (MegallamaError, InternalError) as error:
        return {"error": str(error), "type": type(error).__name__, "status": error.status}
    finally:
        step_module.evaluate_step = evaluate_step
        log.close()


def run_with_another_metric(world: World, folder: str, sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Train with one more number that is summed over the ranks, added where the other ones are: two edits."""
    own = step_module.rank_numbers

    def numbers(rank: Any, *args: torch.Tensor) -> dict[str, torch.Tensor]:
        held = sum(len(stage.layers) for stage in rank.stages.values())
        return {**own(rank, *args), "layers_held": torch.tensor(float(held))}

    tags = {**TAGS, "train": [*TAGS["train"], "layers_held"]}
    with patch.object(step_module, "rank_numbers", numbers), patch.dict(TAGS, tags):
        return run(world, folder, sections)


def run_preset(world: World, folder: str, sections: dict[str, dict[str, Any]], norm_eps: float) -> dict[str, Any]:
    """Train a preset whose row says `norm_eps`, which the configuration leaves to it."""
    PRESETS["changing"] = {"norm_eps": norm_eps}
    model = {**MODEL, "preset": "changing", "norm_eps": norm_eps}
    try:
        with patch.object(ModelConfig, "model_fields_set", {"preset"}):
            return run(world, folder, {**sections, "model": model})
    finally:
        del PRESETS["changing"]


def _plant_in_evaluation(loop: TrainingLoop, kind: str, batches: set[int]) -> None:
    made = [0]

    def faulty(*args: Any) -> Any:
        made[0] += 1
        if made[0] in batches and kind.startswith("signal"):
            os.kill(os.getpid(), signal.SIGTERM)
        elif made[0] in batches:
            train = loop._config.train.model_copy(update={"stop_after_minutes": 1e-9})
            loop._config = loop._config.model_copy(update={"train": train})
        return evaluate_step(*args)

    if kind.startswith("read"):
        for source in loop.setup.data.valid:
            source.read = _unreadable  # type: ignore[method-assign]
    step_module.evaluate_step = faulty  # type: ignore[assignment]


def _break_reading(loop: TrainingLoop, step: int) -> None:
    """From the batch of `step` on (from 0) nothing can be read."""
    first, train = loop.setup.plan.config.batch.samples_after(step), loop.setup.data.train
    read = train.read
    train.read = lambda ids: _unreadable(ids) if min(ids) >= first else read(ids)  # type: ignore[method-assign]


def _unreadable(ids: Any) -> Any:
    raise OSError(errno.EIO, os.strerror(errno.EIO), "/data/text.bin")


def _break_memory(worker: Worker, kind: str, factor: float) -> None:
    """Another bit in the last weights from here on; or, in one step, the gradients of this rank times a factor."""
    gather, run = worker.optimizer.gather, worker.runtime.run

    def stuck(**overlap: bool) -> None:
        gather(**overlap)
        worker.optimizer.wait()
        weights = worker.optimizer.syncs[0].buffers.params["layers.1.o_proj"].data.view(-1)
        weights[-1:].view(torch.uint8)[0] ^= 1

    def scaled(schedule: Any, batches: Any) -> torch.Tensor:
        worker.runtime.run = run  # type: ignore[method-assign]
        return run(schedule, [replace(batch, grad_scale=factor * batch.grad_scale) for batch in batches])

    if kind == "stuck":
        worker.optimizer.gather = stuck  # type: ignore[method-assign]
    else:
        worker.runtime.run = scaled  # type: ignore[method-assign]


def _plant(loop: TrainingLoop, kind: str, steps: set[int], file: str = "") -> None:
    one_step = loop._one_step
    if kind == "read":
        _break_reading(loop, min(steps))

    def faulty(loader: Any) -> Any:
        if loop.progress.step in steps:
            if kind == "read":
                pass
            elif kind == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            elif kind == "truncate":
                os.truncate(file, 20)
            elif kind in ("stuck", "scale"):
                _break_memory(loop.setup.worker, kind, float(file or 0))
            else:  # one element of one gradient of one rank
                sync = loop.setup.worker.optimizer.syncs[0]
                finish = sync.finish

                def poisoned() -> None:
                    sync.finish = finish  # type: ignore[method-assign]
                    finish()
                    sync.buffers.grads[sync.range_of(sync.buffers.layout.buckets[0])[0]] = torch.nan

                sync.finish = poisoned  # type: ignore[method-assign]
        return one_step(loader)

    loop._one_step = faulty  # type: ignore[method-assign]


def records(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def curve(folder: Path) -> list[tuple[int, float, float, float]]:
    """Step, loss, gradient norm and learning rate of every step."""
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in records(folder)]


def state_files(folder: Path) -> dict[str, bytes]:
    """Every tensor file of the newest checkpoint."""
    step = sorted((folder / "checkpoints").glob("step-????????"))[-1]
    return {str(p.relative_to(step)): p.read_bytes() for p in sorted(step.rglob("*.safetensors"))}


def live_memory(world: World, folder: str, sections: dict[str, dict[str, Any]], marks: list[int]) -> list[list[int]]:
    """[live tensors, their bytes, resident bytes, live objects] after each step of `marks` of one run."""
    torch.set_num_threads(1)
    config = small_config(**{**sections, "run": {"folder": folder, "peak_tflops": 1.0}})
    log = Logger(world.rank, world.world_size, Path(folder))
    seen = []

    def watched(loader: Any) -> Any:
        result = one_step(loader)
        if loop.progress.step in marks:
            setup.manager.finish()  # a save still under way holds its own
            gc.collect()
            tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors()}
            status = Path("/proc/self/status").read_text()
            resident = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))
            seen.append([len(tensors), sum(tensors.values()), resident, len(gc.get_objects())])
        return result

    with set_up(config, make_plan(config, world.world_size), world, log, SignalFlag()) as setup:
        loop = TrainingLoop(setup)
        one_step, loop._one_step = loop._one_step, watched  # type: ignore[method-assign]
        loop.run()
    log.close()
    return seen


def _tensors() -> list[torch.Tensor]:
    return [t for t in gc.get_objects() if type(t) is torch.Tensor]


def our_logits(world: World, folder: str, sections: dict[str, dict[str, Any]], tokens: torch.Tensor) -> torch.Tensor:
    """Logits [b * s, V] of the newest checkpoint, by the training code."""
    config = small_config(**{**sections, "run": {"folder": folder}})
    with set_up(config, make_plan(config, 1), world, Logger(0, 1), SignalFlag()) as setup, torch.no_grad():
        return logits(setup.worker, tokens.reshape(-1))
