"""Text to tokens: JSON lines and text files -> .bin/.idx, in bounded memory, on any number of processes.

The parent reads records and cuts them into blocks of about a megabyte; workers parse and encode whole blocks; the
parent writes results in the order of the input.  A block is a function of the input alone and documents are encoded
one by one, so the bytes written are the same for any number of workers.  Each worker hangs on a pipe: when the parent
dies, for whatever reason, it ends; when it dies, the parent says so.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import signal
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from megallama.data.documents import MAX_DOCUMENT_BYTES, BadRecord, Record, RecordReader, find_files, parse
from megallama.data.errors import DataError
from megallama.data.indexed import IndexedWriter, dtype_for, strip_suffix
from megallama.data.tokenizer import Tokenizer, load_tokenizer, sha256_of

BLOCK_BYTES, BLOCK_RECORDS = 1 << 20, 4096
MAX_EXAMPLES = 20  # bad records described one by one; all are counted


@dataclass
class Output:
    """What one .bin/.idx pair holds."""

    prefix: str
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


@dataclass
class Summary:
    """What a run of `preprocess` did: its outputs, and the records it skipped."""

    outputs: list[Output]
    skipped: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)  # "file:line: reason", the first few


@dataclass(frozen=True)
class Encoder:
    """Turns blocks of records into tokens; what every worker runs."""

    tokenizer: Tokenizer
    json_key: str

    def __call__(self, block: Sequence[Record]) -> Encoded:
        """Encode a block: each good document's ids and one eos after them."""
        texts, sizes, bad = [], [], []
        for record in block:
            try:
                text, size = parse(record, self.json_key)
            except BadRecord as error:
                bad.append((f"{record.file}:{record.line}" if record.line else record.file, error.kind, str(error)))
            else:
                texts.append(text)
                sizes.append(size)
        eos, dtype = self.tokenizer.eos_id, dtype_for(self.tokenizer.vocab_size)
        documents = [np.array([*ids, eos], dtype) for ids in self.tokenizer.encode_batch(texts)]
        lengths = np.array([len(ids) for ids in documents], np.int64)
        return Encoded(
            np.concatenate(documents) if documents else np.empty(0, dtype), lengths, np.array(sizes, np.int64), bad
        )


@dataclass(frozen=True)
class Encoded:
    """A block's documents back to back: tokens [T], lengths [n], text_bytes [n]; bad records (where, kind, reason)."""

    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: np.ndarray
    bad: list[tuple[str, str, str]]


def in_validation(numbers: np.ndarray, share: str | float | Fraction) -> np.ndarray:
    """Which document numbers (int64 [n]) belong to a validation split of `share`; bool [n].

    Documents are dealt into consecutive groups of about 1/share; a hash of the group's number picks one of each.  So
    the share is exact, every group holds one, and the answer depends on nothing but the number.
    """
    part = Fraction(str(share)).limit_denominator(10**6)
    p, q = part.numerator, part.denominator
    group = numbers * p // q
    first, last = -(-group * q // p), -(-(group + 1) * q // p)
    mixed = (group.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # splitmix64's finalizer
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return numbers == first + (mixed % (last - first).astype(np.uint64)).astype(np.int64)


def preprocess(
    inputs: Sequence[str | Path],
    output: str | Path,
    tokenizer_path: str | Path,
    *,
    workers: int = 1,
    split_valid: float = 0.0,
    json_key: str = "text",
    strict: bool = False,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    progress: Callable[[int, int, int], None] | None = None,
) -> Summary:
    """Tokenize files into OUTPUT.bin/.idx, or with `split_valid` into OUTPUT_train and OUTPUT_valid.

    The tokenizer's eos ends every document.
    Beside each pair PREFIX.json records documents, tokens, bytes of text (what bits per byte needs) and the tokenizer.
    `progress(bytes read, bytes in all, tokens)` is called as blocks finish.
    Raises: DataError, with `strict` also for the first bad record; without it bad records are skipped and counted.
    """
    if not 0 <= split_valid < 1:
        raise DataError(f"split_valid={split_valid} is not a share; use a number from 0 to below 1, for example 0.05")
    if workers < 1:
        raise DataError(f"workers={workers}; use 1 or more")
    tokenizer = load_tokenizer(tokenizer_path)
    if tokenizer.eos_id is None:
        raise DataError(
            f"tokenizer {tokenizer.path} has no end-of-document token; use one with </s>, <|end_of_text|> or "
            "<|endoftext|>"
        )
    reader, prefix = RecordReader(find_files(inputs), max_document_bytes), strip_suffix(output)
    names = [f"{prefix}_train", f"{prefix}_valid"] if split_valid else [prefix]
    summary = Summary([Output(name) for name in names])
    number = 0  # of the next good document
    with ExitStack() as stack:
        encoded = stack.enter_context(_encoding(Encoder(tokenizer, json_key), workers))
        writers = [stack.enter_context(IndexedWriter(name, dtype_for(tokenizer.vocab_size))) for name in names]
        for block in encoded(_blocks(reader)):
            _note_bad(block, summary, strict)
            valid = np.zeros(len(block.lengths), bool)
            if split_valid:
                valid = in_validation(np.arange(number, number + len(valid)), split_valid)
            number += len(valid)
            for part, writer, out in zip((~valid, valid), writers, summary.outputs, strict=False):
                whole = part.all()
                writer.add(block.tokens if whole else block.tokens[np.repeat(part, block.lengths)], block.lengths[part])
                out.documents, out.tokens = writer.num_documents, writer.num_tokens
                out.text_bytes += int(block.text_bytes[part].sum())
            if progress:
                progress(reader.bytes_done, reader.bytes_total, sum(out.tokens for out in summary.outputs))
        _check_not_empty(summary, number, split_valid)
        for out in summary.outputs:
            _write_facts(out, tokenizer, summary)
    return summary


def _note_bad(block: Encoded, summary: Summary, strict: bool) -> None:
    for where, kind, reason in block.bad:
        if strict:
            raise DataError(f"{where}: {reason}; correct the record, or leave out --strict to skip such records")
        summary.skipped[kind] += 1
        if len(summary.examples) < MAX_EXAMPLES:
            summary.examples.append(f"{where}: {reason}")


def _check_not_empty(summary: Summary, documents: int, split_valid: float) -> None:
    if not documents:
        bad = f"all {summary.skipped.total()} records are bad, the first: " + "".join(summary.examples[:1])
        raise DataError(f"no documents were found: {bad if summary.examples else 'the files are empty'}")
    for out in summary.outputs:
        if not out.documents:
            raise DataError(
                f"{out.prefix} would hold none of the {documents} documents with split_valid={split_valid}; "
                "use a larger share, more documents, or no split"
            )


def _write_facts(out: Output, tokenizer: Tokenizer, summary: Summary) -> None:
    facts = {
        "documents": out.documents,
        "tokens": out.tokens,
        "bytes": out.text_bytes,
        "tokenizer": tokenizer.path.name,
        "tokenizer_sha256": sha256_of(tokenizer.path),
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "skipped": dict(sorted(summary.skipped.items())),
    }
    path = Path(out.prefix + ".json")
    path.with_name(path.name + ".tmp").write_text(json.dumps(facts, indent=2) + "\n")
    os.replace(path.with_name(path.name + ".tmp"), path)


def _blocks(reader: RecordReader) -> Iterator[list[Record]]:
    block: list[Record] = []
    size = 0
    for record in reader:
        block.append(record)
        size += len(record.raw)
        if size >= BLOCK_BYTES or len(block) >= BLOCK_RECORDS:
            yield block
            block, size = [], 0
    if block:
        yield block


@contextmanager
def _encoding(encoder: Encoder, workers: int) -> Iterator[Callable[[Iterator[list[Record]]], Iterator[Encoded]]]:
    """A function from blocks to encoded blocks in the same order; with more than one worker, on that many processes."""
    if workers == 1:
        yield lambda blocks: map(encoder, blocks)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork could copy the locks of another thread
    idle: queue.SimpleQueue[tuple[Connection, multiprocessing.process.BaseProcess]] = queue.SimpleQueue()
    processes = []
    for _ in range(workers):
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_work, args=(theirs, str(encoder.tokenizer.path), encoder.json_key), daemon=True)
        process.start()
        theirs.close()
        processes.append((ours, process))
        idle.put((ours, process))

    def call(block: list[Record]) -> Encoded:
        pipe, process = idle.get()
        try:
            pipe.send(block)
            answer = pipe.recv()
        except (EOFError, OSError):
            process.join(5)
            code = process.exitcode
            raise DataError(
                f"a worker process died (exit status {code}); if memory ran out (-9), use fewer --workers"
            ) from None
        finally:
            idle.put((pipe, process))
        if isinstance(answer, str):
            raise DataError(f"a worker process failed:\n{answer}")
        return answer

    def run(blocks: Iterator[list[Record]]) -> Iterator[Encoded]:
        waiting: deque[Future[Encoded]] = deque()
        for block in blocks:
            waiting.append(threads.submit(call, block))
            if len(waiting) > 2 * workers:  # bounds memory, keeps every worker busy
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    threads = ThreadPoolExecutor(workers)
    try:
        yield run
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for pipe, process in processes:
            process.terminate()
            process.join()
            pipe.close()


def _work(pipe: Connection, tokenizer_path: str, json_key: str) -> None:
    """A worker's life: encode blocks until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; the pipe then ends us
    encoder = Encoder(load_tokenizer(tokenizer_path), json_key)
    try:
        while True:
            block = pipe.recv()
            try:
                answer: Encoded | str = encoder(block)
            except Exception:
                answer = traceback.format_exc()
            pipe.send(answer)
    except (EOFError, OSError):
        return
