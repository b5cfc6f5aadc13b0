"""The measurement before a run, in the processes of the pool: hosts have other names, one rank other clocks."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

from megallama.comm.launch import World
from megallama.recovery import preflight as module


def run(world: World, hosts: tuple[str, ...], slow: int | None, output: str | None) -> tuple[int, list[str]]:
    """Exit status and lines where everything that rank `slow` does takes 100 times as long."""
    real, lines = module.timed, list[str]()

    def timed(*arguments: Any) -> float:
        return real(*arguments) * (100 if world.rank == slow else 1)

    world.hosts = hosts
    start, launch = patch.object(module, "start", lambda *_: nullcontext(world)), patch.object(module, "detect_launch")
    with start, launch, patch.object(module, "timed", timed):
        return module.preflight(lines.append, 0.5, 90.0, "cpu", output), "\n".join(lines).splitlines()
