"""The errors by which a command ends; notes, and how counts are said."""

import os
import sys
from collections.abc import Sequence
from itertools import groupby


class MegallamaError(Exception):
    """What the user can put right; the message says what is wrong and what to write."""

    shared = False  # True: every rank raises it alike, so one of them says it
    decisive = False  # True: where ranks fail in several ways, all raise this kind
    status = 2  # with which a run ends that raises it: nothing was changed


class ConfigError(MegallamaError):
    """A configuration that cannot be used; the message lists every problem, one per line."""


class DataError(MegallamaError):
    """Something is wrong with a corpus, a tokenizer or a data file."""


class LaunchError(MegallamaError):
    """The ranks of a run could not be brought together, or lack their device."""


class LostError(LaunchError):
    """Rank 0 has left, or never came, while ranks gathered: there is more to tell."""


class MachineError(MegallamaError):
    """The operating system of some rank refused something: a full disk, say."""

    shared, status = True, 1


class InternalError(RuntimeError):
    """A fault of the program on some rank, whose log has the traceback."""

    shared, status = True, 1


class CorruptionError(InternalError):
    """Bits have changed by themselves: a rank's machine is not to be trusted."""

    status = 5


def counted(number: int | str, noun: str, form: str = "") -> str:
    """``1 document``, ``2 documents``, ``0 micro-batches``; ``2,000 documents`` in the `form` ","."""
    text = format(number, form)
    ending = "" if text == "1" else "es" if noun.endswith(("s", "x", "tch", "sh")) else "s"
    return f"{text} {noun}{ending}"


def ranges(ranks: Sequence[int]) -> str:
    """Sorted numbers, runs of three or more shortened: 0-3, 7, 8."""
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ranks), lambda at: at[1] - at[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def say(text: str) -> None:
    """A line for whoever started a command, beside its output."""
    sys.stderr.write(f"note: {text}\n")


def drop_output() -> None:
    """Drop what is buffered: the flush at exit would complain and change the status."""
    hole = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(hole, descriptor)
