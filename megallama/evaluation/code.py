"""Programs that a model wrote, each in a process with limits and a folder of its own: no security boundary.

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
from typing import Any

MEMORY, FILE = 2**30, 2**20  # bytes: of the process, of each file
CLOCK = 6  # times the CPU seconds, if it sleeps
PASSED = 42  # the status after the last line of a program, which one that exits has not
NEW_USER, NEW_NET = 0x10000000, 0x40000000  # of unshare(2)
NOBODY, PARENT_DEATH = 65534, 1  # of prctl(2)


def compute(references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,)) -> Any:
    """pass@k of programs, each behind it the tests of its question (Chen et al. 2021, arXiv:2107.03374, equation 1)."""
    pairs = zip(predictions, references, strict=True)
    right = [[passes(f"{program}\n{tests}") for program in programs] for programs, tests in pairs]
    of = {m: [1 - comb(len(own) - sum(own), m) / comb(len(own), m) for own in right if len(own) >= m] for m in k}
    return {f"pass@{m}": sum(values) / len(values) for m, values in of.items() if values}, right


def passes(program: str, seconds: int = 3) -> bool:
    """Whether it comes to its end, within so much CPU time."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", __file__, str(seconds)], cwd=folder, env={"OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            child.communicate(program.encode(errors="replace"), timeout=seconds * CLOCK)
        except subprocess.TimeoutExpired:
            child.kill()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    return child.wait() == PASSED


def confine(seconds: int) -> None:
    """Limits of this process; no network, where the kernel lets it have one of its own."""
    libc, root = ctypes.CDLL(None), os.getuid() == 0
    libc.unshare(NEW_NET if root else NEW_USER | NEW_NET)
    limits = {resource.RLIMIT_CPU: seconds, resource.RLIMIT_AS: MEMORY, resource.RLIMIT_FSIZE: FILE}
    for what, most in (limits | {resource.RLIMIT_NPROC: 0, resource.RLIMIT_CORE: 0}).items():
        resource.setrlimit(what, (most, most))
    if root:  # whom the limit of processes does not bind: another real user, without capabilities
        os.setresuid(NOBODY, 0, 0)
        libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    libc.prctl(PARENT_DEATH, signal.SIGKILL)  # after the changes of identity, which would undo it


if __name__ == "__main__":
    source = sys.stdin.buffer.read()
    confine(int(sys.argv[1]))
    exec(compile(source, "program", "exec"), {"__name__": "__main__"})  # noqa: S102 - what this file is for
    os._exit(PASSED)
