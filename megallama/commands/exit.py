"""How a command ends: its exit status, whatever happened, and what is said of that."""

from __future__ import annotations

import select
import sys
from collections.abc import Callable

from megallama.config.errors import MegallamaError, drop_output


def exit_status(run: Callable[[], int | None]) -> int:
    """The status of a tool: its own (0 for None), argparse's, 2 for an error, 130 for Ctrl-C, 141 for ``| head``."""
    try:
        try:
            status = run() or 0
        except SystemExit as left:
            poll = select.poll()
            poll.register(1, 0)
            if any(event & select.POLLERR for _, event in poll.poll(0)):  # the reader has gone: argparse swallows it
                raise BrokenPipeError from None
            if isinstance(left.code, str):
                sys.stderr.write(f"{left.code}\n")
            status = left.code if isinstance(left.code, int) else int(left.code is not None)
        except (MegallamaError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
            sys.stderr.write(f"error: {text}\n")
            status = 2
        except ModuleNotFoundError as error:
            sys.stderr.write(f"error: {error}; pip install {error.name}\n")
            status = 2
        except KeyboardInterrupt:
            sys.stderr.write("\nstopped\n")
            status = 130
        sys.stdout.flush()
        sys.stderr.flush()
        return status
    except BrokenPipeError:
        drop_output()
        return 141
