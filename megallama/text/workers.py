"""The processes that encode: on this node, or the ranks of an MPI program on many nodes.

The first process hands out jobs, two ahead to each, and encodes too, in a thread.  The others read their jobs' text and
write tokens (`shards`) themselves, so only names and numbers travel, by a pipe or MPI.  When the first process dies,
the others end; when one of them dies, it says so.
"""

from __future__ import annotations

import multiprocessing
import signal
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection as PipeConnection
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megallama.config.errors import MegallamaError
from megallama.data.errors import DataError
from megallama.data.indexed import dtype_for
from megallama.data.tokenizer import Tokenizer
from megallama.text.documents import RecordReader, Unit
from megallama.text.fast_encoder import load_fast_tokenizer
from megallama.text.shards import ShardWriter, TextShard

BLOCK_BYTES, BLOCK_RECORDS = 1 << 20, 4096  # encoded at a time
AHEAD = 2  # jobs each process has
REPORT_SECONDS = 0.2  # how often a process says how far it is
POLL_SECONDS = 0.001  # how often MPI is asked for messages


class Job(NamedTuple):
    """A piece of the input that becomes a `TextShard`; job n + 1 follows job n in the input."""

    number: int
    units: list[Unit]
    size: int  # bytes on disk


class Progress(NamedTuple):
    """How far a process is in its present job."""

    bytes_done: int
    tokens: int


@dataclass(frozen=True)
class Task:
    """What every process must know."""

    tokenizer: str
    fast: bool
    json_key: str
    max_document_bytes: int
    strict: bool
    folder: Path
    start: int  # number of this start of the run, part of every file name
    bos: bool = False  # begin every document with the tokenizer's bos
    eos_token: str | None = None  # ends a document instead of what the tokenizer says
    sync: bool = False  # the processes are on several nodes


class RankConnection:
    """The line to another rank of an mpi4py communicator."""

    def __init__(self, comm: Any, rank: int) -> None:
        self._comm, self.rank, self._sent = comm, rank, list[Any]()

    def send(self, message: Any) -> None:
        """Does not wait for its arrival."""
        self._sent = [request for request in self._sent if not request.test()[0]]
        self._sent.append(self._comm.isend(message, self.rank))

    def recv(self) -> Any:
        return self._comm.recv(source=self.rank)

    def close(self) -> None:
        """Wait until everything sent has arrived."""
        for request in self._sent:
            request.wait()


Connection = PipeConnection | RankConnection


class Encoder:
    """Turns jobs into shards."""

    def __init__(self, task: Task, number: int, tokenizer: Tokenizer | None = None) -> None:
        self._task = task
        self._tokenizer = tokenizer or load_fast_tokenizer(task.tokenizer, fast=task.fast, eos_token=task.eos_token)
        self._dtype = dtype_for(self._tokenizer.vocab_size)
        self._out = ShardWriter(task.folder, f"{task.start:03d}-{number:05d}", sync=task.sync)

    def encode(self, job: Job, connection: Connection) -> TextShard:
        """Read, encode and write a job's documents; with `strict` up to the first bad record."""
        shard, reported, task = self._out.begin(job.number), time.monotonic(), self._task
        reader = RecordReader(job.units, task.max_document_bytes, task.json_key)
        texts, sizes, held = list[str](), list[int](), 0
        for record in reader:
            if found := shard.text(record, task.json_key):
                texts.append(found[0])
                sizes.append(found[1])
                held += found[1]
            elif task.strict:
                return shard
            if held >= BLOCK_BYTES or len(texts) >= BLOCK_RECORDS:
                self._add(texts, sizes)
                texts, sizes, held = [], [], 0
            if time.monotonic() > reported + REPORT_SECONDS:
                reported = time.monotonic()
                connection.send(Progress(reader.bytes_done, shard.token_bytes // self._dtype.itemsize))
        self._add(texts, sizes)
        return self._out.end()

    def _add(self, texts: list[str], sizes: list[int]) -> None:
        """Encode texts and append them, with eos after each and perhaps bos before it."""
        eos, bos = self._tokenizer.eos_id, self._tokenizer.bos_id if self._task.bos else None
        tokens, lengths = self._tokenizer.encode_arrays(texts)
        if eos is not None:
            tokens, lengths = np.insert(tokens, np.cumsum(lengths), eos), lengths + 1
        if bos is not None:
            tokens, lengths = np.insert(tokens, np.cumsum(lengths) - lengths, bos), lengths + 1
        self._out.add(tokens.astype(self._dtype), np.stack([lengths, sizes], axis=1).astype("<i4"))


def worker_main(connection: Connection, task: Task, number: int, tokenizer: Tokenizer | None = None) -> None:
    """Encode jobs until None comes, or the other end is gone; a fault is sent as text."""
    try:
        encoder = Encoder(task, number, tokenizer)
        while (job := connection.recv()) is not None:
            connection.send(encoder.encode(job, connection))
    except EOFError:
        return
    except Exception as error:
        text = str(error) if isinstance(error, MegallamaError) else f"a process failed:\n{traceback.format_exc()}"
        if isinstance(error, OSError):
            text = str(error) if error.filename else f"{task.folder}: {error}"
        with suppress(OSError):
            connection.send(text)


def rank_main(comm: Any) -> None:
    """The life of an MPI rank other than the first."""
    connection = RankConnection(comm, 0)
    comm.gather(socket.gethostname())
    worker_main(connection, comm.bcast(None), comm.rank)
    connection.close()


def _child(connection: PipeConnection, task: Task, number: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; the pipe then ends us
    worker_main(connection, task, number)


class WorkerPool:
    """All processes of a run, and a thread of this one; those on this node live as long as the `with` block."""

    def __init__(self, task: Task, tokenizer: Tokenizer, processes: int, comm: Any = None) -> None:
        self._task, self._tokenizer, self._processes, self._comm = task, tokenizer, processes, comm
        self._connections: dict[Connection, int] = {}  # to the number of jobs it has
        self._children: dict[Connection, multiprocessing.process.BaseProcess] = {}

    def __enter__(self) -> WorkerPool:
        if self._comm:
            hosts = set(self._comm.gather(socket.gethostname()))
            self._task = self._comm.bcast(replace(self._task, sync=len(hosts) > 1))
            self._connections = {RankConnection(self._comm, rank): 0 for rank in range(1, self._comm.size)}
        spawn = multiprocessing.get_context("spawn")  # a fork could copy the locks of another thread
        for number in range(1, 1 if self._comm else self._processes):
            ours, theirs = spawn.Pipe()
            child = spawn.Process(target=_child, args=(theirs, self._task, number), daemon=True)
            child.start()
            theirs.close()
            self._children[ours] = child
            self._connections[ours] = 0
        ours, theirs = multiprocessing.Pipe()
        self._thread = threading.Thread(target=worker_main, args=(theirs, self._task, 0, self._tokenizer), daemon=True)
        self._thread.start()
        self._connections[ours] = 0
        return self

    def run(
        self, jobs: Sequence[Job], meanwhile: Callable[[], bool]
    ) -> Iterator[tuple[Connection, TextShard | Progress]]:
        """What the processes report until every job is a shard; `meanwhile` says if it had other work to do."""
        left = deque(jobs)
        for connection in [*self._connections] * AHEAD:
            self._give(connection, left)
        while any(self._connections.values()):
            for connection in self._ready(block=not meanwhile()):
                message = self._receive(connection)
                if isinstance(message, TextShard):
                    self._connections[connection] -= 1
                    self._give(connection, left)
                yield connection, message

    def _give(self, connection: Connection, left: deque[Job]) -> None:
        if left:
            with suppress(OSError):  # a dead process is noticed where its answer is awaited
                connection.send(left.popleft())
            self._connections[connection] += 1

    def _ready(self, block: bool) -> list[Connection]:
        """The lines on which a message waits; with `block` at least one."""
        pipes = [one for one in self._connections if isinstance(one, PipeConnection)]
        ranks = [one for one in self._connections if isinstance(one, RankConnection)]
        while True:
            ready: list[Any] = [one for one in ranks if self._comm.iprobe(one.rank)]
            ready += wait(pipes, 0.0 if ready or not block else POLL_SECONDS if ranks else None)
            if ready or not block:
                return ready

    def _receive(self, connection: Connection) -> TextShard | Progress:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            child = self._children[connection]
            child.join(5)
            died = f"a worker process died (exit status {child.exitcode})"
            raise DataError(f"{died}; if memory ran out (-9), use fewer --workers") from None
        if isinstance(message, str):
            raise DataError(message)
        return message

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for connection in self._connections:
            if kind is None:
                with suppress(OSError):
                    connection.send(None)
            if kind is None or isinstance(connection, PipeConnection):
                connection.close()
        for child in self._children.values():
            child.terminate()
            child.join()
        self._thread.join()
