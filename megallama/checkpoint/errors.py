"""What goes wrong with checkpoints, and how all ranks come to know it.

Every phase of a save or a load ends with `agree`: each rank tells the others how it fared, so either
all go on or all raise the same error, which names the rank that failed and why.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from megallama.comm.group import Group
from megallama.config.errors import MegallamaError


class CheckpointError(MegallamaError):
    """A checkpoint that cannot be written or used; the message names the folder and what to do."""


class DamagedError(CheckpointError):
    """Bytes of a checkpoint are not what was saved: the message names the file and the block."""


def agree(group: Group, what: str, work: Callable[[], Any]) -> list[Any]:
    """Run `work` on this rank; the JSON values it returned on every rank, in rank order.

    Raises, on every rank alike: DamagedError if any rank found damage, else CheckpointError if any
    rank failed. `what` begins the message.
    """
    value, failure, damaged, cause = None, None, False, None
    try:
        value = work()
    except Exception as caught:  # noqa: BLE001 - whatever it is, the other ranks must not wait for us
        text = str(caught) if isinstance(caught, MegallamaError) else f"{type(caught).__name__}: {caught}"
        failure, damaged, cause = text, isinstance(caught, DamagedError), caught
    told = group.gather_values([value, failure, damaged, socket.gethostname() if failure else None])
    failed = [(rank, *answer[1:]) for rank, answer in enumerate(told) if answer[1] is not None]
    if not failed:
        return [answer[0] for answer in told]
    failed.sort(key=lambda f: not f[2])  # damage first: it decides the type of the error
    rank, text, damaged, host = failed[0]
    who = f"rank {rank} on {host}: " if group.size > 1 else ""
    others = f" (and {len(failed) - 1} more ranks: {[f[0] for f in failed[1:9]]})" if len(failed) > 1 else ""
    error = (DamagedError if damaged else CheckpointError)(f"{what}: {who}{text}{others}")
    error.shared = True
    raise error from cause
