"""Work that every rank does, and that has failed everywhere if it failed anywhere."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Callable
from typing import Any

from megallama.comm.group import Assembly
from megallama.config.errors import InternalError, MachineError, MegallamaError

_log = logging.getLogger(__name__)
_log.addHandler(logging.NullHandler())  # without a run's `Logger` nothing is said twice


def on_all_ranks(group: Assembly, what: str, work: Callable[[], Any], *, collect: bool = False) -> list[Any]:
    """Run `work` on this rank; the JSON values it returned on every rank, in rank order.

    collect: the values go to rank 0 alone; the others must not look at theirs. Raises, on every rank,
    the kind of MegallamaError that the first rank that failed had, with its status; a `decisive` kind
    before others. Of what is none, an OSError becomes a MachineError, all others an InternalError;
    their traceback is logged before anything is exchanged. The message: `what`, the rank, and why.
    """
    value, failure, cause = None, None, None
    try:
        value = work()
    except Exception as caught:  # noqa: BLE001 - whatever it is, the other ranks must not wait for us
        kind, text, status = type(caught), str(caught), getattr(caught, "status", 0)
        if not isinstance(caught, MegallamaError):
            _log.error("%s failed", what, exc_info=caught)
            kind = MachineError if isinstance(caught, OSError) else InternalError
            text, status = f"{type(caught).__name__}: {caught}", kind.status
        cause, failure = caught, [[kind.__module__, kind.__qualname__], text, status, socket.gethostname()]
    values: list[Any] = []

    def summary(results: list[Any]) -> list[Any]:
        values.extend(value for value, _ in results)
        failed = [[rank, *bad] for rank, (_, bad) in enumerate(results) if bad is not None]
        return [[] if collect else values, failed]

    everyone, failed = group.gather_values([value, failure], summary)
    if not failed:
        return values if collect else everyone
    # a kind that this rank does not know is what it is an example of
    failed = [(r, getattr(sys.modules.get(module), name, MegallamaError), *f) for r, (module, name), *f in failed]
    failed.sort(key=lambda f: not getattr(f[1], "decisive", False))
    rank, kind, text, status, host = failed[0]
    who = f"rank {rank} on {host}: " if group.size > 1 else ""
    others = f" (and {len(failed) - 1} more ranks: {[f[0] for f in failed[1:9]]})" if len(failed) > 1 else ""
    error = kind.__new__(kind, f"{what}: {who}{text}{others}")  # whatever else its __init__ asks for
    error.shared, error.status = True, status
    raise error from cause
