"""What goes wrong with checkpoints, and how all ranks come to know it.

Every phase of a save or a load ends with `agree`: each rank tells the others how it fared, so
either all go on or all raise the same error, which names the rank that failed and why.
"""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Callable
from typing import Any

from megallama.comm.group import Assembly
from megallama.config.errors import MegallamaError

_log = logging.getLogger(__name__)
_log.addHandler(logging.NullHandler())  # without a run's `Logger` nothing is said twice


class CheckpointError(MegallamaError):
    """A checkpoint that cannot be written or used; the message names the folder and what to do."""


class DamagedError(CheckpointError):
    """Bytes of a checkpoint are not what was saved: the message names the file and the block."""


class InternalError(RuntimeError):
    """A fault of the program on some rank, whose log has the traceback: nothing the user can put right."""

    shared, status = True, 1


class NotFiniteError(CheckpointError):
    """What was to be saved holds inf or nan, and was not: the message names the tensor and the rank."""

    status = 3


def agree(group: Assembly, what: str, work: Callable[[], Any], *, collect: bool = False) -> list[Any]:
    """Run `work` on this rank; the JSON values it returned on every rank, in rank order.

    collect: the values go to rank 0 alone; what the others get is not to be looked at. Raises, on
    every rank alike: DamagedError or NotFiniteError if any rank has one, else the kind of
    MegallamaError that the first rank that failed had, with its status.  Of what is none, an
    OSError (a full disk, say) becomes a CheckpointError with status 1, all others an InternalError;
    their traceback is logged before anything is exchanged. `what` begins the message.
    """
    value, failure, cause = None, None, None
    try:
        value = work()
    except Exception as caught:  # noqa: BLE001 - whatever it is, the other ranks must not wait for us
        cause, failure = caught, _told(caught)
        if not isinstance(caught, MegallamaError):
            _log.error("%s failed", what, exc_info=caught)
    values: list[Any] = []

    def summary(told: list[Any]) -> list[Any]:
        values.extend(value for value, _ in told)
        return [
            [] if collect else values,
            [[rank, *bad] for rank, (_, bad) in enumerate(told) if bad is not None],
        ]

    everyone, failed = group.gather_values([value, failure], summary)
    if not failed:
        return values if collect else everyone
    # a kind that this rank does not know is what it is an example of
    failed = [(r, getattr(sys.modules.get(module), name, MegallamaError), *f) for r, (module, name), *f in failed]
    failed.sort(key=lambda f: not issubclass(f[1], DamagedError))  # damage first: it decides the kind of the error
    rank, kind, text, status, host = failed[0]
    who = f"rank {rank} on {host}: " if group.size > 1 else ""
    others = f" (and {len(failed) - 1} more ranks: {[f[0] for f in failed[1:9]]})" if len(failed) > 1 else ""
    error = kind.__new__(kind, f"{what}: {who}{text}{others}")  # whatever else its __init__ asks for
    error.shared, error.status = True, status
    raise error from cause


def _told(error: Exception) -> list[Any]:
    """Kind, text and status of what `agree` raises for it, and where it happened."""
    kind, text, status = type(error), str(error), getattr(error, "status", InternalError.status)
    if not isinstance(error, MegallamaError):
        kind = CheckpointError if isinstance(error, OSError) else InternalError
        text, status = f"{type(error).__name__}: {error}", InternalError.status
    return [[kind.__module__, kind.__qualname__], text, status, socket.gethostname()]
