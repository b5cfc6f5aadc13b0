"""Ranks that keep the others waiting: at files, which may take long, and in a step, which may not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

import megallama.train.loop as loop_module
import megallama.train.setup as setup_module
from megallama.comm.launch import World
from megallama.plan.plan import make_plan
from megallama.train.log import Logger
from megallama.train.signals import SignalFlag
from tests.small import small_config


def run(world: World, folder: str, sections: dict[str, dict[str, Any]], where: str, seconds: float) -> dict[str, Any]:
    """Train; the last rank sleeps in `where`: open_sources, evaluate, save or train_step (the third one)."""
    torch.set_num_threads(1)
    config = small_config(**{**sections, "run": {"folder": folder, "peak_tflops": 1.0, **sections["run"]}})
    log = Logger(world.rank, world.world_size, Path(folder))
    owner: Any = {"_save": loop_module.TrainingLoop, "open_sources": setup_module}.get(where, loop_module)
    real, calls = getattr(owner, where), [0]

    def slow(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == (3 if where == "train_step" else 1):
            time.sleep(seconds)
        return real(*arguments, **named)

    if world.rank == world.world_size - 1:
        setattr(owner, where, slow)
    began = time.monotonic()
    try:
        with setup_module.set_up(config, make_plan(config, world.world_size), world, log, SignalFlag()) as setup:
            return {"status": loop_module.TrainingLoop(setup).run(), "error": "", "seconds": 0.0}
    except RuntimeError as error:
        return {"status": None, "error": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - began}
    finally:
        setattr(owner, where, real)
        log.close()
