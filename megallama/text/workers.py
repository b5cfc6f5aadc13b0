"""The processes that encode: on this node, or the ranks of an MPI program on many nodes.

The first process hands out jobs, two ahead to each, and encodes too, in a thread.  The others hang on a pipe or on MPI:
they read their jobs' text themselves and write tokens themselves (`parts`), so only names and numbers travel.  When the
first process dies, for whatever reason, the others end; when one of them dies, it says so.
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
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megallama.config.errors import MegallamaError
from megallama.data.errors import DataError
from megallama.data.indexed import dtype_for
from megallama.data.tokenizer import Tokenizer
from megallama.text.documents import RecordReader, Unit
from megallama.text.fast_encoder import load_fast_tokenizer
from megallama.text.parts import Part, PartWriter

BLOCK_BYTES, BLOCK_RECORDS = 1 << 20, 4096  # encoded at a time
AHEAD = 2  # jobs each process has
REPORT_SECONDS = 0.2  # how often a process says how far it is
POLL_SECONDS = 0.001  # how often MPI is asked for messages


class Job(NamedTuple):
    """A piece of the input that one process turns into a `Part`; job n + 1 follows job n in the input."""

    number: int
    units: list[Unit]
    size: int  # bytes on disk


class Sign(NamedTuple):
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


class Rank:
    """The line to another rank of an mpi4py communicator."""

    def __init__(self, comm: Any, rank: int) -> None:
        self._comm, self.rank, self._sent = comm, rank, list[Any]()

    def send(self, message: Any) -> None:
        """Send a message without waiting for its arrival."""
        self._sent = [request for request in self._sent if not request.test()[0]]
        self._sent.append(self._comm.isend(message, self.rank))

    def recv(self) -> Any:
        """Wait for a message."""
        return self._comm.recv(source=self.rank)

    def close(self) -> None:
        """Wait until everything sent has arrived."""
        for request in self._sent:
            request.wait()


Link = Connection | Rank


class Encoder:
    """Turns jobs into parts."""

    def __init__(self, task: Task, number: int, tokenizer: Tokenizer | None = None) -> None:
        self._task = task
        self._tokenizer = tokenizer or load_fast_tokenizer(task.tokenizer, fast=task.fast, eos_token=task.eos_token)
        self._dtype = dtype_for(self._tokenizer.vocab_size)
        self._out = PartWriter(task.folder, f"{task.start:03d}-{number:05d}", sync=task.sync)

    def encode(self, job: Job, link: Link) -> Part:
        """Read, encode and write the documents of a job; with `strict` up to the first bad record."""
        part, reported, task = self._out.begin(job.number), time.monotonic(), self._task
        reader = RecordReader(job.units, task.max_document_bytes, task.json_key)
        texts, sizes, held = list[str](), list[int](), 0
        for record in reader:
            if found := part.text(record, task.json_key):
                texts.append(found[0])
                sizes.append(found[1])
                held += found[1]
            elif task.strict:
                return part
            if held >= BLOCK_BYTES or len(texts) >= BLOCK_RECORDS:
                self._add(texts, sizes)
                texts, sizes, held = [], [], 0
            if time.monotonic() > reported + REPORT_SECONDS:
                reported = time.monotonic()
                link.send(Sign(reader.bytes_done, part.token_bytes // self._dtype.itemsize))
        self._add(texts, sizes)
        return self._out.end()

    def _add(self, texts: list[str], sizes: list[int]) -> None:
        """Encode texts and append them, with one eos after each and, if asked for, bos before it."""
        tokens, lengths = self._tokenizer.encode_arrays(texts)
        lengths = lengths + 1 + self._task.bos
        rows = np.stack([lengths, sizes], axis=1).astype("<i4")
        ends = np.cumsum(lengths)
        assert self._tokenizer.eos_id is not None
        out = np.full(int(lengths.sum()), self._tokenizer.eos_id, self._dtype)
        inside = np.ones(len(out), bool)
        inside[ends - 1] = False
        if self._task.bos:
            inside[ends - lengths] = False
            out[ends - lengths] = self._tokenizer.bos_id
        out[inside] = tokens
        self._out.add(out, rows)


def serve(link: Link, task: Task, number: int, tokenizer: Tokenizer | None = None) -> None:
    """A process's life: encode jobs until None comes, or the other end is gone; a fault is sent as text."""
    try:
        encoder = Encoder(task, number, tokenizer)
        while (job := link.recv()) is not None:
            link.send(encoder.encode(job, link))
    except EOFError:
        return
    except Exception as error:
        text = str(error) if isinstance(error, MegallamaError) else f"a process failed:\n{traceback.format_exc()}"
        if isinstance(error, OSError):
            text = str(error) if error.filename else f"{task.folder}: {error}"
        with suppress(OSError):
            link.send(text)


def serve_rank(comm: Any) -> None:
    """The life of an MPI rank other than the first."""
    link = Rank(comm, 0)
    comm.gather(socket.gethostname())
    serve(link, comm.bcast(None), comm.rank)
    link.close()


def _child(link: Connection, task: Task, number: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; the pipe then ends us
    serve(link, task, number)


class Crew:
    """All processes of a run, from the first one's side, which encodes too, in a thread.

    Entering the `with` block starts those on this node, leaving it ends them.
    """

    def __init__(self, task: Task, tokenizer: Tokenizer, processes: int, comm: Any = None) -> None:
        self._task, self._tokenizer, self._processes, self._comm = task, tokenizer, processes, comm
        self._links: dict[Link, int] = {}  # to the number of jobs it has
        self._children: dict[Link, multiprocessing.process.BaseProcess] = {}

    def __enter__(self) -> Crew:
        if self._comm:
            hosts = set(self._comm.gather(socket.gethostname()))
            self._task = self._comm.bcast(replace(self._task, sync=len(hosts) > 1))
            self._links = {Rank(self._comm, rank): 0 for rank in range(1, self._comm.size)}
        spawn = multiprocessing.get_context("spawn")  # a fork could copy the locks of another thread
        for number in range(1, 1 if self._comm else self._processes):
            ours, theirs = spawn.Pipe()
            child = spawn.Process(target=_child, args=(theirs, self._task, number), daemon=True)
            child.start()
            theirs.close()
            self._children[ours] = child
            self._links[ours] = 0
        ours, theirs = multiprocessing.Pipe()
        self._thread = threading.Thread(target=serve, args=(theirs, self._task, 0, self._tokenizer), daemon=True)
        self._thread.start()
        self._links[ours] = 0
        return self

    def run(self, jobs: Sequence[Job], meanwhile: Callable[[], bool]) -> Iterator[tuple[Link, Part | Sign]]:
        """What the processes report, as it comes, until every job has become a part.

        `meanwhile` does a little of other work and says whether there was any.
        """
        left = deque(jobs)
        for link in [*self._links] * AHEAD:
            self._give(link, left)
        while any(self._links.values()):
            for link in self._ready(block=not meanwhile()):
                message = self._receive(link)
                if isinstance(message, Part):
                    self._links[link] -= 1
                    self._give(link, left)
                yield link, message

    def _give(self, link: Link, left: deque[Job]) -> None:
        if left:
            with suppress(OSError):  # a dead process is noticed where its answer is awaited
                link.send(left.popleft())
            self._links[link] += 1

    def _ready(self, block: bool) -> list[Link]:
        """The lines on which a message waits; with `block` at least one."""
        pipes = [link for link in self._links if isinstance(link, Connection)]
        while True:
            ready = [link for link in self._links if isinstance(link, Rank) and self._comm.iprobe(link.rank)]
            patience = 0.0 if ready or not block else POLL_SECONDS if self._comm else None
            ready += wait(pipes, patience)  # type: ignore[arg-type]
            if ready or not block:
                return [*ready]

    def _receive(self, link: Link) -> Part | Sign:
        try:
            message = link.recv()
        except (EOFError, OSError):
            child = self._children[link]
            child.join(5)
            raise DataError(
                f"a worker process died (exit status {child.exitcode}); if memory ran out (-9), use fewer --workers"
            ) from None
        if isinstance(message, str):
            raise DataError(message)
        return message

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for link in self._links:
            if kind is None:
                with suppress(OSError):
                    link.send(None)
            if kind is None or isinstance(link, Connection):
                link.close()
        for child in self._children.values():
            child.terminate()
            child.join()
        self._thread.join()
