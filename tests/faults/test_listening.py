"""What listens: on one machine nothing but on the loopback interface, whatever MASTER_ADDR says."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest

from megallama.comm.rendezvous import open_store
from megallama.config.errors import LaunchError
from tests.faults.ranks import Ranks

LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")
STATE_LISTEN = "0A"


def listening(pid: int | str) -> list[tuple[str, int]]:
    """Address, as the kernel writes it, and port of every socket on which a process listens."""
    inodes = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        if file.is_symlink() and (found := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(file))):
            inodes.add(found[1])
    out = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == STATE_LISTEN and rest[5] in inodes:
                address, _, port = local.partition(":")
                out.append((address, int(port, 16)))
    return sorted(out)


def test_the_way_to_look_sees_what_is_open_to_all() -> None:
    with socket.create_server(("", 0)) as door, socket.create_server(("127.0.0.1", 0)) as own:
        found = {port: address for address, port in listening("self")}
        assert found[door.getsockname()[1]] == "00000000" and found[own.getsockname()[1]] in LOOPBACK


def test_ranks_on_one_machine_listen_on_its_loopback_interface_alone(tmp_path: Path) -> None:
    """Rank 0's name leads to all of its interfaces; neither a home nor a folder for temporary files is needed."""
    nowhere = {"HOME": "/proc/nowhere", "TMPDIR": str(tmp_path / "nowhere"), "XDG_CACHE_HOME": "/proc/nowhere"}
    env = {"MASTER_ADDR": socket.gethostname(), **nowhere}
    ranks = Ranks(2, ["parallel.tp=2", "train.steps=1000000"], tmp_path, env=env, supervised=True)
    ranks.until("step 3/")
    found = [listening(ranks.trainer(rank)) for rank in range(2)]
    assert [listening(supervisor.pid or 0) for supervisor in ranks.processes] == [[], []]
    for process in ranks.processes:
        process.terminate()
    assert ranks.wait() == [75, 75]
    assert ranks.port in [port for _, port in found[0]] and len(found[0]) >= 3, "the store, the star, gloo"
    assert len(found[1]) >= 1 and [a for a, _ in [*found[0], *found[1]] if a not in LOOPBACK] == []


@pytest.mark.parametrize("published", [False, True])
def test_a_store_of_one_machine_listens_there_alone_and_serves(tmp_path: Path, published: bool) -> None:
    before = listening("self")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = 0 if published else free.getsockname()[1]
    path = tmp_path / "port" if published else None
    host = open_store("127.0.0.1", port, path, True, 0, 5)
    ((address, opened),) = set(listening("self")) - set(before)
    assert address in LOOPBACK and opened == host.port == (port or host.port)
    other = open_store("127.0.0.1", port, path, False, 1, 5)
    other.set("key", "value")
    assert host.get("key") == b"value"


def test_a_folder_for_temporary_files_that_is_full_or_gone_is_said(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=f"cannot write the port of rank 0 to {tmp_path}/no/port: .*; set TMPDIR"):
        open_store("127.0.0.1", 0, tmp_path / "no" / "port", True, 0, 5)
