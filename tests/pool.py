"""Worker processes that stay alive between tests: importing torch costs more than most tests.

`Pool.run(n, "tests.parity.workers:train", *args)` calls ``train(world, *args)`` in n processes and
returns their results in rank order.  `world` is a real `World`: gloo over loopback, made by
`megallama.comm.launch.start` as in a run, new for every call and closed after it.  Workers are
forked from one server process that has torch imported; they end with the test session, also when
it is killed.  A worker that raises, dies or hangs ends the call with `WorkerError`, and the workers
of that call are replaced by the next.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

import torch
import torch.distributed as dist

from megallama.comm.launch import Launch, start
from megallama.config.schema import RunConfig


class WorkerError(Exception):
    """A rank failed; the message has its rank and traceback."""


def _serve(connection: Connection, port: int, env: dict[str, str]) -> None:
    os.environ.update(env)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    while True:
        try:
            task = pickle.loads(connection.recv_bytes())
        except EOFError:
            os._exit(0)  # the session is gone
        launch, run, target, args = task
        failed = 0.0
        try:
            module, _, name = target.partition(":")
            with start(launch, run, store=store) as world:
                try:
                    reply = getattr(importlib.import_module(module), name)(world, *args)
                finally:
                    failed = time.monotonic()  # before `with` breaks the other ranks' connections
            failed = 0.0
        except BaseException:  # noqa: BLE001 - carried to the test
            reply = traceback.format_exc()
            failed = failed or time.monotonic()
        # plain pickle copies tensors; the pipe's own would share their memory with this process
        connection.send_bytes(pickle.dumps((failed, reply)))


def sharing_a_gpu(rank: int) -> dict[str, str]:
    """The environment in which NCCL takes ranks on one GPU for ranks on hosts of their own, and uses sockets."""
    return {
        "NCCL_HOSTID": f"rank-{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1",
        "NCCL_IB_DISABLE": "1",
    }  # fmt: skip


class Pool:
    """Up to as many workers as the largest `run` needs; on `device="cuda"` they share one GPU."""

    def __init__(self, device: Literal["cpu", "cuda"] = "cpu") -> None:
        self._device = device
        self._context = multiprocessing.get_context("forkserver")
        # the second is what torch imports in its first backward pass: once for all workers
        self._context.set_forkserver_preload(["torch", "torch.fx.experimental.symbolic_shapes", "tests.pool"])
        self._workers: list[tuple[Any, Connection]] = []
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._calls = 0

    def run(
        self,
        size: int,
        target: str,
        *args: Any,
        timeout: float = 300.0,
        collective_timeout: float = 120.0,
        gloo: bool = False,
    ) -> list[Any]:
        """target(world, *args) on `size` ranks; the results in rank order.

        `collective_timeout`: both time-outs of the workers [s]; `gloo`: without shared memory.
        Raises: WorkerError with the traceback of the rank that failed first, or naming the ranks
        that died or did not answer within `timeout` seconds.
        """
        self._calls += 1
        self._workers = [worker for worker in self._workers if worker[0].is_alive()]
        run = RunConfig(
            device=self._device,
            threads=1,
            timeout_seconds=collective_timeout,
            io_timeout_seconds=collective_timeout,
            init_timeout_seconds=60,
            shared_memory=not gloo,
        )
        while len(self._workers) < size:
            self._start_worker()
        for rank in range(size):
            launch = Launch(
                rank, size, rank, True, "torchrun", "localhost", "127.0.0.1", self._store.port,
                store_kept=True, attempt=self._calls,
            )  # fmt: skip
            self._workers[rank][1].send_bytes(pickle.dumps((launch, run, target, args)))
        try:
            return self._collect(size, timeout)
        except BaseException:
            self._drop(size)
            raise

    def _collect(self, size: int, timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        failures: list[tuple[float, str]] = []  # when, what
        while len(results) < size:
            waiting = {self._workers[rank][1]: rank for rank in range(size) if rank not in results}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                silent = f"ranks {sorted(waiting.values())} of {size} did not answer within {timeout:g} s"
                failures.append((float("inf"), silent))
                break
            for connection in ready:
                rank = waiting[connection]  # type: ignore[index]
                failed, results[rank] = self._receive(rank, size)
                if failed is not None:
                    failures.append((failed, results[rank]))
                    deadline = min(deadline, time.monotonic() + 2)  # for a rank that failed earlier, replying later
        if failures:
            raise WorkerError(min(failures)[1])
        return [results[rank] for rank in range(size)]

    def _receive(self, rank: int, size: int) -> tuple[float | None, Any]:
        """When the rank failed (None: it did not; 0: it died), and its result or what went wrong."""
        process, connection = self._workers[rank]
        try:
            failed, value = pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionError):
            process.join(5)
            return 0.0, f"rank {rank} of {size} died with status {process.exitcode}"
        return (failed, f"rank {rank} of {size} failed:\n{value}") if failed else (None, value)

    def _start_worker(self) -> None:
        ours, theirs = self._context.Pipe()
        env = sharing_a_gpu(len(self._workers)) if self._device == "cuda" else {}
        process = self._context.Process(target=_serve, args=(theirs, self._store.port, env), daemon=True)
        process.start()
        theirs.close()
        self._workers.append((process, ours))

    def _drop(self, size: int) -> None:
        """End the first `size` workers: some may be stuck in a collective."""
        gone, self._workers = self._workers[:size], self._workers[size:]
        for process, connection in gone:
            process.kill()
            process.join()
            connection.close()

    def close(self) -> None:
        """End all workers."""
        self._drop(len(self._workers))
