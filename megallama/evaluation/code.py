"""Programs that a model wrote, each in a process with limits: no security boundary.

python -I code.py SECONDS < PROGRAM: the process confines itself, then runs what it reads.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from math import comb
from statistics import fmean
from typing import Any

MEMORY, FILE = 2**30, 2**20  # bytes: of the process, of each file
CLOCK = 6  # times the CPU seconds, if it sleeps
PASSED = 42  # the status after the last line of a program, which one that exits has not
NEW_USER, NEW_PID, NEW_NET = 0x10000000, 0x20000000, 0x40000000  # of unshare(2)
NOBODY, PARENT_DEATH = 65534, 1  # of prctl(2)


def compute(references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,)) -> Any:
    """pass@k of programs, each before the tests of its question (Chen et al. 2021, arXiv:2107.03374, equation 1).

    Raises: OSError if no process can be confined.
    """
    if not passes(""):
        raise OSError("no process can be confined here, so no program is run; try another container")
    pairs = zip(predictions, references, strict=True)
    right = [[passes(f"{program}\n{tests}") for program in programs] for programs, tests in pairs]
    of = {m: [1 - comb(len(own) - sum(own), m) / comb(len(own), m) for own in right if len(own) >= m] for m in k}
    return {f"pass@{m}": fmean(values) for m, values in of.items() if values}, right


def passes(program: str, seconds: int = 3) -> bool:
    """Whether it comes to its end, within so much CPU time."""
    command, nowhere = [sys.executable, "-I", __file__, str(seconds)], subprocess.DEVNULL
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, suppress(subprocess.TimeoutExpired):
        ended = subprocess.run(
            command, cwd=folder, env={"OPENBLAS_NUM_THREADS": "1"}, start_new_session=True, stdout=nowhere,
            stderr=nowhere, input=program.encode(errors="replace"), timeout=seconds * CLOCK,
        )  # fmt: skip
        return ended.returncode == PASSED
    return False


def confine(seconds: int) -> None:
    """Go on with limits and, where the kernel allows, without a network or other processes."""
    libc, root = ctypes.CDLL(None), os.getuid() == 0
    libc.unshare(NEW_NET | NEW_PID | (0 if root else NEW_USER))
    if child := os.fork():
        libc.prctl(PARENT_DEATH, signal.SIGKILL)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)
    limits = {resource.RLIMIT_CPU: seconds, resource.RLIMIT_AS: MEMORY, resource.RLIMIT_FSIZE: FILE}
    for what, most in (limits | {resource.RLIMIT_NPROC: 0, resource.RLIMIT_CORE: 0}).items():
        resource.setrlimit(what, (most, most))
    if root:  # whom the limit of processes does not bind: another real user, without capabilities
        with suppress(OSError):  # a user's container, where it binds root
            os.setresuid(NOBODY, 0, 0)
        libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    libc.prctl(PARENT_DEATH, signal.SIGKILL)  # after the changes of identity, which would undo it
    with suppress(OSError):
        os._exit(bool(os.fork()))  # the limit does not bind: nothing is run


if __name__ == "__main__":
    source = sys.stdin.buffer.read()
    confine(int(sys.argv[1]))
    program = compile(source, "program", "exec", dont_inherit=True)  # annotations are no strings
    exec(program, {"__name__": "__main__"})  # noqa: S102 - what this file is for
    os._exit(PASSED)
