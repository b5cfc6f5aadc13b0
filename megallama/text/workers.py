"""The processes that encode: on this node, or the ranks of an MPI program on many nodes.

The first process hands out tasks, and encodes too, in a thread.  The others read text and write tokens
themselves: only names and numbers travel.  When it dies, the others end; it tells of their death.
"""

from __future__ import annotations

import multiprocessing
import signal
import socket
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection as PipeConnection
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megallama.config.errors import DataError, MegallamaError
from megallama.data.tokenizer import Tokenizer
from megallama.data.writer import dtype_for
from megallama.text.documents import RecordReader, Unit
from megallama.text.fast_encoder import load_fast_tokenizer
from megallama.text.shards import ShardWriter, TextShard

BLOCK_BYTES, BLOCK_RECORDS = 1 << 20, 4096  # encoded at a time
AHEAD = 2  # tasks each process has
REPORT_SECONDS = 0.2  # how often a process says how far it is
POLL_SECONDS = 0.001  # how often MPI is asked for messages


class Task(NamedTuple):
    """A piece of the input that becomes a `TextShard`; task n + 1 follows task n in the input."""

    number: int
    units: list[Unit]
    size: int  # bytes on disk


class RankConnection:
    """The line to another rank of an mpi4py communicator; sending does not wait for the arrival."""

    def __init__(self, comm: Any, rank: int) -> None:
        self._comm, self.rank, self._sent = comm, rank, list[Any]()

    def send(self, message: Any) -> None:
        self._sent = [request for request in self._sent if not request.test()[0]]
        self._sent.append(self._comm.isend(message, self.rank))

    def recv(self) -> Any:
        return self._comm.recv(source=self.rank)

    def close(self) -> None:
        """Wait until everything sent has arrived."""
        for request in self._sent:
            request.wait()


Connection = PipeConnection | RankConnection
Progress = tuple[int, int]  # of a process in its present task: bytes read, bytes of tokens written


@dataclass
class Encoder:
    """Turns tasks into shards: sent to every process, and made ready there by `start`."""

    tokenizer_path: Path
    fast: bool
    json_key: str
    max_document_bytes: int
    strict: bool
    bos: bool  # begin every document with the tokenizer's bos
    eos_token: str | None  # ends a document instead of what the tokenizer says
    folder: Path
    number: int  # of this start of the run, part of every file name
    sync: bool = False  # the processes are on several nodes

    def start(self, process: int, tokenizer: Tokenizer | None) -> None:
        """Open what a process needs; `tokenizer`, where it is open already."""
        path, eos = self.tokenizer_path, self.eos_token
        self._tokenizer = tokenizer or load_fast_tokenizer(path, fast=self.fast, eos_token=eos)
        self._out = ShardWriter(self.folder, f"{self.number:03d}-{process:05d}", sync=self.sync)

    def encode(self, task: Task, connection: Connection) -> TextShard:
        """Read, encode and write a task's documents; with `strict` up to the first bad record."""
        shard, reported = self._out.begin(task.number), time.monotonic()
        reader = RecordReader(task.units, self.max_document_bytes, self.json_key)
        block, held = list[tuple[str, int]](), 0
        for record in reader:
            if found := shard.text(record, self.json_key):
                block.append(found)
                held += found[1]
            elif self.strict:
                return shard
            if held >= BLOCK_BYTES or len(block) >= BLOCK_RECORDS:
                self._write(block)
                block, held = [], 0
            if time.monotonic() > reported + REPORT_SECONDS:
                reported = time.monotonic()
                connection.send((reader.bytes_done, shard.token_bytes))
        self._write(block)
        return self._out.end()

    def _write(self, block: list[tuple[str, int]]) -> None:
        """Encode texts and append them, with eos after each and perhaps bos before it."""
        eos, bos = self._tokenizer.eos_id, self._tokenizer.bos_id if self.bos else None
        tokens, lengths = self._tokenizer.encode_arrays([text for text, _ in block])
        if eos is not None:
            tokens, lengths = np.insert(tokens, np.cumsum(lengths), eos), lengths + 1
        if bos is not None:
            tokens, lengths = np.insert(tokens, np.cumsum(lengths) - lengths, bos), lengths + 1
        rows = np.stack([lengths, [size for _, size in block]], axis=1)
        self._out.add(tokens.astype(dtype_for(self._tokenizer.vocab_size)), rows.astype("<i4"))


def worker_main(connection: Connection, encoder: Encoder, process: int, tokenizer: Tokenizer | None = None) -> None:
    """Encode tasks until None comes, or the other end is gone; a fault is sent as text."""
    if process and multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; the pipe then ends us
    try:
        encoder.start(process, tokenizer)
        while (task := connection.recv()) is not None:
            connection.send(encoder.encode(task, connection))
    except EOFError:
        pass
    except Exception as error:
        text = str(error) if isinstance(error, MegallamaError) else f"a process failed:\n{traceback.format_exc()}"
        if isinstance(error, OSError):
            text = str(error) if error.filename else f"{encoder.folder}: {error}"
        with suppress(OSError):
            connection.send(text)


def rank_main(comm: Any) -> None:
    """The life of an MPI rank other than the first."""
    connection = RankConnection(comm, 0)
    comm.gather(socket.gethostname())
    worker_main(connection, comm.bcast(None), comm.rank)
    connection.close()


class WorkerPool(AbstractContextManager["WorkerPool"]):
    """The processes of a run, and a thread of this one, which end with the `with` block."""

    def __init__(self, encoder: Encoder, tokenizer: Tokenizer, processes: int, comm: Any = None) -> None:
        self._comm, self._ranks, self._tasks = comm, list[RankConnection](), Counter[Connection]()  # tasks it has
        self._workers: dict[PipeConnection, BaseProcess | threading.Thread] = {}
        if comm:
            hosts = set(comm.gather(socket.gethostname()))
            encoder = comm.bcast(replace(encoder, sync=len(hosts) > 1))
            self._ranks = [RankConnection(comm, rank) for rank in range(1, comm.size)]
        spawn = multiprocessing.get_context("spawn")  # a fork could copy the locks of another thread
        for number in range(1, 1 if comm else processes):
            ours, theirs = spawn.Pipe()
            child = spawn.Process(target=worker_main, args=(theirs, encoder, number), daemon=True)
            child.start()
            theirs.close()
            self._workers[ours] = child
        ours, theirs = spawn.Pipe()
        self._workers[ours] = threading.Thread(target=worker_main, args=(theirs, encoder, 0, tokenizer), daemon=True)
        self._workers[ours].start()
        self._connections: list[Connection] = [*self._ranks, *self._workers]

    def run(
        self, tasks: Sequence[Task], meanwhile: Callable[[], bool]
    ) -> Iterator[tuple[Connection, TextShard | Progress]]:
        """What the processes report until every task is a shard; `meanwhile`: had it other work?

        Raises: DataError if one of them failed or died.
        """
        left = deque(tasks)
        for connection in self._connections * AHEAD:
            self._give(connection, left)
        while self._tasks.total():
            ready: list[Any] = [rank for rank in self._ranks if self._comm.iprobe(rank.rank)]
            patience = (POLL_SECONDS if self._ranks else None) if not (meanwhile() or ready) else 0.0
            for connection in [*ready, *wait(self._workers, patience)]:
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    child: Any = self._workers[connection]
                    child.join(5)
                    died = f"a worker process died (exit status {child.exitcode})"
                    raise DataError(f"{died}; if memory ran out (-9), use fewer --workers") from None
                if isinstance(message, str):
                    raise DataError(message)
                if isinstance(message, TextShard):
                    self._tasks[connection] -= 1
                    self._give(connection, left)
                yield connection, message

    def _give(self, connection: Connection, left: deque[Task]) -> None:
        # the last ones go to whoever has none: behind another one they would wait while processes have nothing to do
        if left and (not self._tasks[connection] or len(left) >= AHEAD * len(self._connections)):
            with suppress(OSError):  # a dead process is noticed where its answer is awaited
                connection.send(left.popleft())
            self._tasks[connection] += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for connection in self._connections:
            if kind is None:
                with suppress(OSError):
                    connection.send(None)
            if kind is None or isinstance(connection, PipeConnection):
                connection.close()
        for worker in self._workers.values():
            if isinstance(worker, BaseProcess):
                worker.terminate()
            worker.join()
