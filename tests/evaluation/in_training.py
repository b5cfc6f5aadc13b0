"""Whole runs with tasks, in the processes of the pool."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from megallama.comm.flight_record import STEP
from megallama.comm.launch import World
from megallama.config.errors import MegallamaError
from megallama.evaluation.harness import tasks_of
from megallama.evaluation.scorer import Scorer
from megallama.plan.plan import make_plan
from megallama.train.log import Logger
from megallama.train.loop import TrainingLoop
from megallama.train.setup import set_up
from megallama.train.signals import SignalFlag
from tests.small import MODEL, small_config


def run(world: World, folder: str, sections: dict[str, dict[str, Any]], fault: str = "") -> dict[str, Any]:
    """Train; status, the step that a supervisor sees, and what was said, or the error. `fault`, on the last rank:
    "signal:N", a request to stop in the N-th window of micro-batches that are scored; "slow:N": it takes a second;
    "other items": its file of items has one more."""
    torch.set_num_threads(1)
    last = world.rank == world.world_size - 1
    if fault == "other items" and last:
        text = Path(sections["eval"]["tasks"][0]).read_text("utf-8")
        own = Path(folder).with_name("other") / "own.jsonl"
        own.parent.mkdir()
        own.write_text(text + text.splitlines()[0])
        sections = {**sections, "eval": {**sections["eval"], "tasks": [str(own)]}}
    settings = {"model": {**MODEL, "vocab_size": 258}, **sections}
    settings["run"] = {"folder": folder, "peak_tflops": 1.0}
    config = small_config(**settings)
    log, signals, lines = Logger(world.rank, world.world_size), SignalFlag(), list[str]()
    say, real, made = log.info, Scorer._window, [0]
    kind, _, number = fault.partition(":")

    def window(scorer: Scorer, *arguments: Any) -> Any:
        made[0] += 1
        if last and number and made[0] == int(number):
            os.kill(os.getpid(), signal.SIGTERM) if kind == "signal" else time.sleep(1.0)
        return real(scorer, *arguments)

    log.info = lambda text: (lines.append(text), say(text))[1]  # type: ignore[method-assign, func-returns-value]
    try:
        with patch.object(Scorer, "_window", window), signals:
            plan = make_plan(config, world.world_size)
            tasks = tasks_of if config.eval.tasks else None
            with set_up(config, plan, world, log, signals, None, tasks) as setup:
                status = TrainingLoop(setup).run()
        return {"status": status, "step": world.record.words[STEP], "said": lines, "windows": made[0]}
    except MegallamaError as error:
        return {"error": str(error), "type": type(error).__name__, "said": lines}
    finally:
        log.close()
