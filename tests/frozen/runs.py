"""Whole runs from a configuration file, in the processes of the pool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megallama.comm.launch import World
from megallama.config.errors import MegallamaError
from megallama.config.load import load
from megallama.plan.plan import make_plan
from megallama.train.log import Logger
from megallama.train.loop import TrainingLoop
from megallama.train.setup import set_up
from megallama.train.signals import SignalFlag


def run(world: World, file: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Train as the file and the overrides say; the exit status, or the error's text."""
    torch.set_num_threads(1)
    config = load(Path(file), overrides, ranks=world.world_size)
    log = Logger(world.rank, world.world_size, Path(config.run.folder))
    try:
        with set_up(config, make_plan(config, world.world_size), world, log, SignalFlag()) as setup:
            return {"status": TrainingLoop(setup).run()}
    except MegallamaError as error:
        return {"error": str(error)}
    finally:
        log.close()
