"""The errors a user can cause. `pretrain.main` prints them without a traceback and exits with their status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class MegallamaError(Exception):
    """Something the user can put right; the message says what is wrong, the values, and what to write instead."""

    shared = False  # True: every rank raises it alike, so one of them says it
    status = 2  # with which a run ends that raises it: nothing was changed (see README, "Stopping and resuming")


class ConfigError(MegallamaError):
    """A configuration that cannot be used; the message lists every problem found, one per line."""


def exit_status(run: Callable[[], int | None]) -> int:
    """The status of a tool: what it returns (0 for None), 2 for an error, told on standard error, 130 for Ctrl-C.

    141, as the shell has it, where whoever read the output has gone (``| head``).
    """
    try:
        status = run() or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that the flush at the end of the process says nothing
        return 141
    except MegallamaError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return 130
