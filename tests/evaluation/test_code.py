"""Programs that a model wrote: which count as right, and that none does harm by accident."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from megallama.evaluation import code
from megallama.evaluation.code import NEW_NET, NEW_USER, NOBODY, compute, passes

RIGHT = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return a * b\n"
TEST = "assert add(2, 3) == 5"

ENDED = {  # programs that do not come to their end
    "wrong": f"{WRONG}{TEST}",
    "exits before its tests": f"raise SystemExit(0)\n{TEST}",
    "exits at once": "import os; os._exit(0)",
    "does not parse": "def add(a, b:",
    "no text": "x = 1\0",
    "names what is not there": "def f(x: Missing): pass",
    "ends who started it": "import os\nos.kill(os.getppid(), 15)",
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
    program = f"import os, time\nopen({str(note)!r}, 'w').write(os.readlink('/proc/self'))\ntime.sleep(60)"
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


def test_the_share_that_passes() -> None:
    found, right = compute([TEST, TEST], [[RIGHT, WRONG, WRONG, RIGHT], [WRONG] * 4], k=[1, 2, 9])
    assert right == [[True, False, False, True], [False] * 4]
    assert found == pytest.approx({"pass@1": 0.25, "pass@2": (1 - 1 / 6) / 2})


def test_where_nothing_can_be_confined_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of root without the right to become another user no limit of processes is kept."""
    text = Path(code.__file__).read_text().replace("os.setresuid(NOBODY, 0, 0)", "raise OSError")
    (tmp_path / "code.py").write_text(text)
    if os.getuid() == 0:
        monkeypatch.setattr(code, "__file__", str(tmp_path / "code.py"))
    else:
        monkeypatch.setattr(code, "passes", lambda program: False)
    with pytest.raises(OSError, match="no process can be confined here, so no program is run"):
        compute([TEST], [[RIGHT]])


@pytest.mark.parametrize("prefix", [[], ["unshare", "-Ur"]], ids=["a user", "root of a user's container"])
def test_others_than_root_are_confined_too(prefix: list[str]) -> None:
    python = shutil.which("python3", path="/usr/bin")
    if os.getuid() or not (python and shutil.which("setpriv") and shutil.which("unshare")):
        pytest.skip("this takes root, who becomes another user, setpriv, unshare and a Python for all")
    other = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *prefix]
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)  # noqa: S103 - the other user reads it
        file = shutil.copy(code.__file__, place)
        asked = [f"{RIGHT}{TEST}", ENDED["wrong"], ENDED["makes processes"], ENDED["takes all memory"]]
        script = f"import sys; sys.path.insert(0, {place!r}); import code_ as c; print([*map(c.passes, {asked!r})])"
        os.rename(file, f"{place}/code_.py")
        done = subprocess.run([*other, python, "-c", script], cwd="/", capture_output=True, text=True, timeout=60)
    if prefix and "unshare" in done.stderr:
        pytest.skip("this machine allows no users of one's own")
    assert done.stdout == "[True, False, False, False]\n", done.stderr
