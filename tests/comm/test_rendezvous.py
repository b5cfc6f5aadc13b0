"""Ranks that meet, and every way in which they do not: threads with a real store."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megallama.comm.launch import Launch, _gather
from megallama.comm.rendezvous import Arrival, Star, open_store, port_file, ranges, rendezvous
from megallama.config.errors import LaunchError


def arrival(rank: int, size: int = 4, **changes: Any) -> Arrival:
    return replace(Arrival(rank, size, f"host{rank // 2}", 100 + rank, "2.13.0", config="abc"), **changes)


def gather(arrivals: list[Arrival], seconds: float = 5.0, pause: float = 0.0) -> list[list[Arrival] | str]:
    """rendezvous() of all arrivals, `pause` seconds apart; what each got, or its error."""
    store = dist.HashStore()
    results: list[list[Arrival] | str] = [""] * len(arrivals)

    def body(index: int) -> None:
        own = arrivals[index]
        star = Star(own.rank, own.world_size, own.host)
        try:
            results[index] = rendezvous(star, store, own, "127.0.0.1", seconds)
        except LaunchError as error:
            results[index] = str(error)
        finally:
            star.close()

    threads = [threading.Thread(target=body, args=(index,)) for index in range(len(arrivals))]
    for thread in threads:
        thread.start()
        time.sleep(pause)
    for thread in threads:
        thread.join()
    return results


def test_all_arrive() -> None:
    everyone = [arrival(rank) for rank in range(4)]
    assert gather([everyone[2], everyone[0], everyone[3], everyone[1]]) == [everyone] * 4


def test_missing_ranks_are_named_on_every_rank() -> None:
    results = gather([arrival(rank, 8) for rank in (0, 1, 2, 4)], seconds=0.3)
    message = (
        "ranks 3, 5-7 never arrived within 0.3 s (run.init_timeout_seconds); "
        "arrived: 0, 1 (host0), 2 (host1), 4 (host2); look at the output of the missing ranks"
    )
    assert results == [message] * 4
    assert str(gather([arrival(0, 2)], seconds=0.1)[0]).startswith("rank 1 never arrived within 0.1 s")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"world_size": 8},
            "rank 0 (host0) was started as one of 4 ranks, rank 3 (host1) as one of 8; "
            "start every process with the same number of ranks",
        ),
        (
            {"config": "xyz"},
            "rank 0 (host0) and rank 3 (host1) have different configurations (abc and xyz); "
            "start every rank with the same file and overrides",
        ),
        (
            {"torch": "2.11.0"},
            "rank 0 (host0) has torch 2.13.0, rank 3 (host1) has 2.11.0; use the same environment on every node",
        ),
        (
            {"device": "cuda"},
            "rank 0 (host0) runs on cpu, rank 3 (host1) on cuda; set run.device=cpu, or give every rank a GPU",
        ),
        ({"problem": "rank 3 has no GPU"}, "rank 3 has no GPU"),
    ],
)
def test_what_does_not_agree_is_named_on_every_rank(changes: dict[str, Any], message: str) -> None:
    everyone = [arrival(rank) for rank in range(3)] + [arrival(3, **changes)]
    assert gather(everyone) == [message] * 4


def test_a_rank_started_twice() -> None:
    (first, *_, second) = gather([arrival(0), arrival(1), arrival(2), arrival(1, pid=7, host="b")])
    assert first == second
    assert str(first).startswith("two processes are rank 1: ")
    assert "host0 pid 101" in str(first) and "b pid 7" in str(first) and "its own MASTER_PORT" in str(first)


def test_ranks_that_share_a_gpu() -> None:
    results = gather([arrival(0, 2, gpu="GPU-7"), arrival(1, 2, gpu="GPU-7")])
    assert (
        results == ["ranks 0 and 1 (host0) use the same GPU; start one process per GPU, or run with run.device=cpu"] * 2
    )


def test_a_problem_of_rank_0_reaches_everybody() -> None:
    assert gather([arrival(0, 2, problem="no GPU here"), arrival(1, 2)], pause=0.2) == ["no GPU here"] * 2


def test_a_problem_of_rank_0_waits_for_who_comes_later_by_the_file() -> None:
    key, results = f"test-{os.getpid()}", ["", ""]

    def body(rank: int) -> None:
        time.sleep(0.7 * rank)
        own = arrival(rank, 2, problem="" if rank else "no GPU here")
        launch = Launch(rank, 2, rank, True, "slurm", own.host, key=key)
        try:
            _gather(launch, own, 5.0, Star(rank, 2, own.host), None)
        except LaunchError as error:
            results[rank] = str(error)

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["no GPU here"] * 2 and not port_file(key).exists()


def test_port_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as selected:
        port = selected.getsockname()[1]
        with pytest.raises(LaunchError, match=f"port {port} of 127.0.0.1 is taken, .* set MASTER_PORT to a free port"):
            open_store("127.0.0.1", port, None, True, 0, 5)


def test_rank_0_is_not_there(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(LaunchError, match=f"rank 1 .* could not reach rank 0 at 127.0.0.1:{port} within 0.5 s"):
        open_store("127.0.0.1", port, None, False, 1, 0.5)
    with pytest.raises(LaunchError, match="rank 0 never arrived within 0.1 s .* rank 1 found no .* set MASTER_PORT"):
        open_store("127.0.0.1", 0, tmp_path / "port", False, 1, 0.1)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_a_port_where_another_program_answers(answer: bytes) -> None:
    """Or does not answer: torch's store waits for it without end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = []

        def serve() -> None:
            with suppress(OSError):
                while True:
                    kept.append(server.accept()[0])
                    kept[-1].sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        port, began = server.getsockname()[1], time.monotonic()
        with pytest.raises(LaunchError, match=rf"rank 1 .* could not reach rank 0 at 127.0.0.1:{port} within 1 s"):
            open_store("127.0.0.1", port, None, False, 1, 1)
        assert time.monotonic() - began < 10


def test_a_published_port_is_free_and_private(tmp_path: Path) -> None:
    path = tmp_path / "port"
    host = open_store("127.0.0.1", 0, path, True, 0, 5)
    host.set("key", "value")
    assert int(path.read_text()) == host.port and os.stat(path).st_mode & 0o077 == 0
    assert open_store("127.0.0.1", 0, path, False, 1, 5).get("key") == b"value"
    assert port_file("slurm-1/2").name == f"megallama-{os.getuid()}-slurm-1-2"


def test_ranges() -> None:
    assert ranges([0, 1, 2, 3, 7, 8, 10]) == "0-3, 7, 8, 10"
    assert ranges([]) == ""
