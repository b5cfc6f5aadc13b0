"""Runs that fail on purpose, in the processes of the pool."""

from __future__ import annotations

import builtins
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import megallama.checkpoint.manager as manager_module
from megallama.comm.launch import World
from megallama.config.errors import DataError
from megallama.plan.plan import make_plan
from megallama.train.log import Logger
from megallama.train.loop import TrainingLoop
from megallama.train.setup import set_up
from megallama.train.signals import SignalFlag
from tests.small import small_config


def run(
    world: World, folder: str, sections: dict[str, dict[str, Any]], kind: str, victims: Sequence[int], slow: float
) -> dict[str, Any]:
    """Fail in the step after a save that takes `slow` seconds has begun; how `run` ended, and what was there then."""
    torch.set_num_threads(1)
    config = small_config(**{**sections, "run": {"folder": folder, "peak_tflops": 1.0}})
    log = Logger(world.rank, world.world_size, Path(folder))
    write = manager_module.write_checkpoint

    def failing(loader: Any) -> Any:
        nonlocal start
        if loop.progress.step == config.checkpoint.interval and world.rank in victims:
            start = time.monotonic()
            raise DataError("planted") if kind == "DataError" else getattr(builtins, kind)("planted")
        return one_step(loader)

    def slowly(*args: Any) -> None:
        time.sleep(slow)
        write(*args)

    manager_module.write_checkpoint = slowly
    start, first = 0.0, None
    try:
        with set_up(config, make_plan(config, world.world_size), world, log, SignalFlag()) as setup:
            loop = TrainingLoop(setup)
            one_step, loop._one_step = loop._one_step, failing  # type: ignore[method-assign]
            status, error = loop.run(), None
    except BaseException as caught:  # noqa: BLE001 - told to the test
        status, error = getattr(caught, "status", None), caught
        first = world.failed(caught)
    finally:
        manager_module.write_checkpoint = write
        log.close()
    messages = {
        "type": type(error).__name__,
        "status": status,
        "seconds": time.monotonic() - start,
        "saved": sorted(os.listdir(f"{folder}/checkpoints")),
        "first": first,
    }
    setup.manager.wait(30)  # a process that stays, unlike a run's, lets it end before its groups are closed
    return messages
