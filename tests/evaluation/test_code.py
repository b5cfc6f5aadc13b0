"""Programs that a model wrote: which count as right, and that none does harm by accident."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megallama.evaluation.code import NEW_NET, NEW_USER, compute, passes

RIGHT = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return a * b\n"
TEST = "assert add(2, 3) == 5"

ENDED = {  # programs that do not come to their end
    "wrong": f"{WRONG}{TEST}",
    "exits before its tests": f"raise SystemExit(0)\n{TEST}",
    "exits at once": "import os; os._exit(0)",
    "does not parse": "def add(a, b:",
    "no text": "x = 1\0",
    "waits for input": "input()",
    "never ends": "while True: pass",
    "takes all memory": "x = bytearray(2**31)",
    "recurs": "def f(): return f()\nf()",
    "makes processes": "import os\nwhile True:\n    os.fork()",
    "starts a command": "import subprocess; subprocess.run(['true'], check=True)",
    "writes a large file": "open('large', 'wb').write(bytes(2**22))",
}


def test_a_right_program_passes() -> None:
    assert passes(f"{RIGHT}{TEST}")
    assert passes("import os\nassert os.listdir() == []\nopen('own', 'w').write('x')")
    assert passes("import os\nassert not {'HOME', 'PATH', 'USER'} & {*os.environ}")
    assert passes("for i in range(10**5): print('x' * 100)")  # goes nowhere


@pytest.mark.parametrize("name", ENDED)
def test_what_does_not_come_to_its_end_does_not(name: str) -> None:
    began = time.monotonic()
    assert not passes(ENDED[name], seconds=1)
    assert time.monotonic() - began < 30


def test_what_sleeps_is_ended(tmp_path: Path) -> None:
    assert not passes(f"import time\ntime.sleep(9)\nopen({str(tmp_path / 'late')!r}, 'w')", seconds=1)
    assert not (tmp_path / "late").exists()


def runs(pid: str) -> bool:
    """Whether there is such a process, and it is not dead and only waited for by nobody."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_program_does_not_outlive_who_started_it(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    program = f"import os, time\nopen({str(note)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"
    starter = f"from megallama.evaluation.code import passes; passes({program!r}, 30)"
    with subprocess.Popen([sys.executable, "-c", starter], cwd=Path(__file__).parents[2]) as process:
        until = time.monotonic() + 30
        while not (note.exists() and note.read_text()) and time.monotonic() < until:
            time.sleep(0.05)
        process.kill()
    while runs(note.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    assert not runs(note.read_text())


def test_the_network_is_out_of_reach() -> None:
    if not (pid := os.fork()):
        os._exit(ctypes.CDLL(None).unshare(NEW_NET if os.getuid() == 0 else NEW_USER | NEW_NET) & 1)
    if os.waitpid(pid, 0)[1]:
        pytest.skip("this machine allows no networks of one's own")
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert not passes(f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)")


def test_pass_at_k_is_unbiased() -> None:
    found, right = compute([TEST, TEST], [[RIGHT, WRONG, WRONG, RIGHT], [WRONG] * 4], k=[1, 2, 9])
    assert right == [[True, False, False, True], [False] * 4]
    assert found == pytest.approx({"pass@1": 0.25, "pass@2": (1 - 1 / 6) / 2})
