"""Starts of a run that end in one way or another, in the processes of the pool."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch

from megallama.comm.launch import World
from megallama.config.errors import DataError, MegallamaError
from megallama.plan.plan import make_plan
from megallama.train.log import Logger
from megallama.train.loop import TrainingLoop
from megallama.train.setup import set_up
from megallama.train.signals import SignalFlag
from tests.small import small_config
from tests.train.runs import _plant

FAILURES = {"crash": RuntimeError("the last rank is broken\nand more"), "bad request": DataError("no such token")}


def run(world: World, folder: str, end: str) -> list[Any]:
    """Two steps; status, error, and what was said. `end`: "good", "bad steps", of `FAILURES`, or killed before:
    "killed", "asked" to stop and killed, "asked after a loss" of another rank and killed."""
    torch.set_num_threads(1)
    config = small_config(run={"folder": folder, "peak_tflops": 1.0}, train={"steps": 2})
    log, lines = Logger(world.rank, world.world_size), list[str]()
    log.info = lines.append  # type: ignore[method-assign, assignment]
    signals = SignalFlag()

    def fail(loader: Any) -> Any:
        raise FAILURES[end]

    try:
        with set_up(config, make_plan(config, world.world_size), world, log, signals) as setup:
            loop = TrainingLoop(setup)
            if end == "killed":
                setup.manager.starts._own = {}  # and no word of it
            elif end.startswith("asked"):
                left = [1] if end == "asked after a loss" and world.star else []
                with patch.object(world.star, "left", left):
                    signals.asked("SIGTERM")
                setup.manager.starts._own = {}
            elif end == "bad steps":
                _plant(loop, "nan", {0, 1})
            elif end == "bad request" or end == "crash" and world.rank == world.world_size - 1:
                loop._one_step = fail  # type: ignore[method-assign]
            return [loop.run() if end in ("good", "bad steps", *FAILURES) else 0, "", lines]
    except (MegallamaError, RuntimeError) as error:
        return [getattr(error, "status", 1), str(error), lines]
    finally:
        log.close()
