"""Text to tokens: files -> .bin/.idx, in bounded memory, on any number of processes; pairs -> one pair.

The input is a list of tasks of about a megabyte.  Any process turns any task into a shard (`workers`,
`shards`), once; this one joins them in order as they come.  The bytes depend on the input alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megallama.config.errors import DataError, counted
from megallama.config.special_tokens import NAMES, usual_id
from megallama.data.indexed import IndexedDataset, strip_suffix
from megallama.data.tokenizer import Tokenizer, find_tokenizer, sha256_of
from megallama.data.writer import IndexedWriter, dtype_for, write_metadata
from megallama.text.documents import MAX_DOCUMENT_BYTES, units
from megallama.text.fast_encoder import load_fast_tokenizer
from megallama.text.inputs import Losses, earlier_files
from megallama.text.shards import TextShard, WorkFolder, begun, folder_of
from megallama.text.workers import Connection, Encoder, Progress, Task, WorkerPool

TASK_BYTES, MAX_TASK_BYTES = 1 << 20, 1 << 30
FAST_FROM = 2 << 20  # bytes of input that are worth loading and proving the fast encoder
ROWS, SPAN = 1 << 16, 1 << 20  # documents, tokens merged at a time
MAX_TASKS, MAX_UNITS = 20_000, 64  # of a run, unless too large; of a task


class Output(IndexedWriter):
    """One .bin/.idx pair, and how much text it holds."""

    text_bytes = 0


@dataclass
class Summary:
    """What a run of `preprocess` did: its outputs, and the records it skipped."""

    outputs: list[Output]
    losses: Losses
    encoder: str = ""  # what encoded, on the first process
    marks: str = ""  # how documents begin and end


def in_validation(numbers: np.ndarray, share: str | float | Fraction) -> np.ndarray:
    """Which document numbers (int64 [n]) belong to a validation split of `share`; bool [n].

    A hash of its number picks one of each group of about 1/share documents: the share is exact.
    """
    p, q = Fraction(str(share)).limit_denominator(10**6).as_integer_ratio()
    group = numbers * p // q
    first, last = -(-group * q // p), -(-(group + 1) * q // p)
    mixed = (group.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # splitmix64's finalizer
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return numbers == first + (mixed % (last - first).astype(np.uint64)).astype(np.int64)


def split_of(numbers: np.ndarray, valid: float, test: float) -> np.ndarray:
    """Which split each document number (int64 [n]) belongs to: 0 train, 1 valid, 2 test; int64 [n].

    What both hold out is chosen by `in_validation`, and then dealt between them in the same way.
    """
    which, both = np.zeros(len(numbers), np.int64), Fraction(str(valid)) + Fraction(str(test))
    if both:
        which[in_validation(numbers, both)] = 1
    if test:
        p, q = both.limit_denominator(10**6).as_integer_ratio()
        which[in_validation(numbers * p // q, Fraction(str(test)) / both) & (which > 0)] = 2
    return which


def preprocess(
    inputs: Sequence[str | Path],
    output: str | Path,
    tokenizer_path: str | Path,
    *,
    workers: int = 1,
    split_valid: float = 0.0,
    split_test: float = 0.0,
    json_key: str = "text",
    strict: bool = False,
    max_bad: str = "",
    max_bad_per_file: str = "",
    skip_bad_files: bool = False,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    fast: bool = True,
    bos: bool = False,
    eos_token: str | None = None,
    progress: Callable[[int, int, int], None] = lambda done, total, tokens: None,
    say: Callable[[str], None] = lambda text: None,
    comm: Any = None,
) -> Summary:
    """Tokenize files into OUTPUT.bin/.idx, or with a split into OUTPUT_train, _valid and _test.

    The tokenizer's eos, or `eos_token`, ends every document; with `bos` its bos begins it.
    Until the end OUTPUT.parts/ keeps what is done, for the next start of a run that was killed.
    `max_bad`, `max_bad_per_file`, `skip_bad_files`: as in `Losses`, which ends the run.
    `progress(bytes read, bytes in all, tokens)`; `say` gets what is not read of `inputs`.
    `comm`: an mpi4py communicator whose other ranks run `rank_main`, instead of `workers`.
    Raises: DataError, with `strict` also for the first bad record, which else is skipped.
    """
    losses, prefix = Losses(max_bad, max_bad_per_file, skip_files=skip_bad_files), strip_suffix(output)
    prefixes = [prefix + suffix for suffix in _check_options(workers, split_valid, split_test)]
    files, path = losses.find(inputs, say), find_tokenizer(tokenizer_path)
    fast = fast and sum(file.stat().st_size for file in files) >= FAST_FROM
    tokenizer = load_fast_tokenizer(path, fast=fast, eos_token=eos_token)
    summary = Summary([], losses, marks=_marks(tokenizer, bos))
    origin_of = partial(_origin, tokenizer=tokenizer, json_key=json_key, max_document_bytes=max_document_bytes, bos=bos)
    if Path(prefix + ".parts").exists() and not begun(folder_of(prefix, origin_of(files))):
        if begun(folder_of(prefix, origin_of(old := earlier_files(inputs)))):
            what = f"goes on with the list of an earlier version, of {counted(len(old), 'file')}"
            say(f"{what}; to begin again delete {prefix}.parts")
            files = old
    if clash := {Path(name + ".json").absolute() for name in prefixes} & {file.absolute() for file in files}:
        raise DataError(f"{clash.pop()} is an input and would be replaced by the output; use another --output")
    tasks, origin = _tasks(files), origin_of(files)
    with WorkFolder(prefix, origin) as work:
        with ExitStack() as stack:
            encoder = Encoder(path, fast, json_key, max_document_bytes, strict, bos, eos_token, work.path, work.start)
            pool = stack.enter_context(WorkerPool(encoder, tokenizer, min(workers, len(tasks)), comm))
            dtype = dtype_for(tokenizer.vocab_size)
            summary.outputs += [stack.push(Output(name, dtype)) for name in prefixes]
            _Join(summary, tasks, work, (split_valid, split_test), strict).run(pool, progress)
            summary.encoder = tokenizer.encoder
            if origin_of(files) != origin:
                raise DataError("files of the input were changed while they were read; start again when they are whole")
            for out in summary.outputs:
                out.finish()
        for out in summary.outputs:
            write_metadata(out.prefix, _metadata(out, tokenizer, bos, losses))
    return summary


def _marks(tokenizer: Tokenizer, bos: bool) -> str:
    """How documents begin and end. Raises: DataError if they cannot be ended or begun."""
    if tokenizer.eos_id is None:
        raise DataError(
            f"tokenizer {tokenizer.path} has no end-of-document token: it declares none, and has none of "
            f"{', '.join(NAMES['eos'])}; name the one it has with --eos-token"
        )
    if bos and tokenizer.bos_id is None:
        raise DataError(f"tokenizer {tokenizer.path} has no beginning-of-document token; leave --bos out")
    begin = f"begins with id {tokenizer.bos_id} and " if bos else ""
    return f"every document {begin}ends with id {tokenizer.eos_id}"


def _check_options(workers: int, split_valid: float, split_test: float) -> list[str]:
    """What each output's name ends in. Raises: DataError."""
    for name, share in (("split_valid", split_valid), ("split_test", split_test)):
        if not (share == 0 or 1e-6 <= share < 1):
            raise DataError(f"{name}={share} is not a share; use 0, or from 0.000001 to below 1, for example 0.05")
    if split_valid + split_test >= 1:
        raise DataError(f"split_valid={split_valid} and split_test={split_test} leave nothing to train on; use less")
    if workers < 1:
        raise DataError(f"workers={workers}; use 1 or more")
    held = [name for name, share in (("_valid", split_valid), ("_test", split_test)) if share]
    return ["_train", *held] if held else [""]


def _tasks(files: Sequence[Path]) -> list[Task]:
    """The input as tasks, which depend on the files alone: every start has the same."""
    size = min(max(TASK_BYTES, sum(file.stat().st_size for file in files) // MAX_TASKS), MAX_TASK_BYTES)
    tasks: list[Task] = []
    for unit in units(files, size):
        last = tasks[-1] if tasks else None
        if last and last.size + unit.size <= size and len(last.units) < MAX_UNITS:
            tasks[-1] = Task(last.number, [*last.units, unit], last.size + unit.size)
        else:
            tasks.append(Task(len(tasks), [unit], unit.size))
    return tasks


def _origin(
    files: Sequence[Path], tokenizer: Tokenizer, json_key: str, max_document_bytes: int, bos: bool
) -> dict[str, Any]:
    """All that tokens and tasks follow from, without what always was so: old work goes on."""
    marks = {"bos": tokenizer.bos_id} if bos else {}
    marks |= {"eos": tokenizer.eos_id} if tokenizer.eos_id != usual_id("eos", tokenizer.id_of) else {}
    stats = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    layout = (1, TASK_BYTES, MAX_TASK_BYTES, MAX_TASKS, MAX_UNITS)  # the first number changes with the shards' format
    return {"layout": layout, "files": stats, "tokenizer": sha256_of(tokenizer.path), "key": json_key,
            "limit": max_document_bytes, **marks}  # fmt: skip


@dataclass
class _Join:
    """Appends shards to the outputs in the order of the tasks, and judges their bad records."""

    summary: Summary
    tasks: Sequence[Task]
    work: WorkFolder
    shares: tuple[float, float]
    strict: bool

    def __post_init__(self) -> None:
        self.shards, self.dtype = self.work.finished(), self.summary.outputs[0].dtype
        self._next = self._documents = self._bytes = 0
        self._total = sum(task.size for task in self.tasks)

    def run(self, pool: WorkerPool, progress: Callable[[int, int, int], None]) -> None:
        """Let the pool make what is missing, and join what is there. Raises: DataError."""
        shards, now = self.shards, dict[Connection, Progress]()  # how far the processes are in what is unfinished
        done, size = sum(self.tasks[n].size for n in shards), sum(shard.token_bytes for shard in shards.values())
        for connection, message in pool.run([task for task in self.tasks if task.number not in shards], self._advance):
            now[connection] = message if isinstance(message, tuple) else (0, 0)
            if isinstance(message, TextShard):
                done, size = done + self.tasks[message.job].size, size + message.token_bytes
                shards[message.job] = message
            read, written = (sum(values) for values in zip((done, size), *now.values(), strict=True))
            progress(read, self._total, written // self.dtype.itemsize)
        while self._advance():
            pass
        losses, shares = self.summary.losses, zip(("valid", "test"), self.shares, strict=True)
        losses.check()
        if not self._documents:
            raise DataError("\n  ".join(["no documents were found: the files hold no text", *losses.examples]))
        if empty := [out.prefix for out in self.summary.outputs if not out.num_documents]:
            split = " and ".join(f"split_{name}={share}" for name, share in shares if share)
            what = f"{empty[0]} would hold none of the {self._documents} documents with {split}"
            raise DataError(f"{what}; use a larger share, more documents, or no split")

    def _advance(self) -> bool:
        """Append the shard that is next, if it is there; whether it was."""
        if self._next not in self.shards:
            return False
        shard, losses = self.shards[self._next], self.summary.losses
        losses.take(shard)
        if self.strict and (found := [*losses.examples, *(f"{name}: {why}" for name, why in losses.faults.items())]):
            raise DataError(f"{found[0]}; correct the record, or leave out --strict to skip such records")
        self._bytes += self.tasks[self._next].size
        losses.check_early(self._bytes / self._total if self._total else 1.0)
        for tokens, rows in self.work.read(shard, self.dtype):
            self._append(tokens, rows.astype(np.int64))
        self._next += 1
        return True

    def _append(self, tokens: np.ndarray, rows: np.ndarray) -> None:
        which = split_of(np.arange(self._documents, self._documents + len(rows)), *self.shares)
        self._documents += len(rows)
        if not self.shares[0]:  # without a validation split the second output is the test split
            which = np.minimum(which, 1)
        for i, out in enumerate(self.summary.outputs):
            here = which == i
            out.add(tokens if here.all() else tokens[np.repeat(here, rows[:, 0])], rows[here, 0])
            out.text_bytes += int(rows[here, 1].sum())


def _metadata(out: Output, tokenizer: Tokenizer, bos: bool, losses: Losses) -> dict[str, Any]:
    return {
        "documents": out.num_documents,
        "tokens": out.num_tokens,
        "bytes": out.text_bytes,
        "tokenizer": tokenizer.path.name,
        "tokenizer_sha256": sha256_of(tokenizer.path),
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        **({"bos_id": tokenizer.bos_id} if bos else {}),
        "skipped": dict(sorted(losses.skipped.items())),
        **({"files not read": len(losses.faults)} if losses.faults else {}),
        "fingerprint": IndexedDataset(out.prefix).fingerprint()["sha256"],
    }


def merge(
    prefixes: Sequence[str | Path],
    output: str | Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> IndexedDataset:
    """Join pairs in order into OUTPUT.bin/.idx/.json: the bytes of preprocessing all at once.

    Compares with PREFIX.sums; `say` gets a line where there is none.  `progress(bytes done, of all)`.
    Raises: DataError naming two pairs of different token types or tokenizers.
    """
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    for note in filter(None, [dataset.check_blocks() for dataset in datasets]):
        say(note)
    metadata = [dataset.metadata for dataset in datasets]
    _check_pairs(datasets, metadata, strip_suffix(output))
    dtype, done = datasets[0].dtype, 0
    total = sum(dataset.num_tokens for dataset in datasets) * dtype.itemsize
    with IndexedWriter(output, dtype) as writer:
        for dataset in datasets:
            for first in range(0, dataset.num_documents, ROWS):
                starts = dataset.starts(first, min(first + ROWS, dataset.num_documents))
                cuts = [0, *(np.flatnonzero(np.diff((starts[1:] - starts[0]) // SPAN)) + 1), len(starts) - 1]
                for low, high in zip(cuts, cuts[1:], strict=False):
                    tokens = dataset.read(int(starts[low]), int(starts[high] - starts[low]))
                    writer.add(tokens, np.diff(starts[low : high + 1]))
                    done += tokens.nbytes
                    progress(done, total)
    if all(metadata):
        skipped: Counter[str] = sum((Counter(each.get("skipped", {})) for each in metadata), Counter())
        sums = ("documents", "tokens", "bytes")
        own: dict[str, Any] = {key: sum(each.get(key, 0) for each in metadata) for key in sums}
        own["skipped"] = dict(sorted(skipped.items()))
        own["fingerprint"] = IndexedDataset(output).fingerprint()["sha256"]
        write_metadata(writer.prefix, metadata[0] | own)
    return IndexedDataset(output)


def _check_pairs(datasets: Sequence[IndexedDataset], metadata: Sequence[dict[str, Any]], output: str) -> None:
    first, known = datasets[0], metadata[0]
    for dataset, own in zip(datasets, metadata, strict=True):
        with suppress(OSError):
            if Path(dataset.prefix + ".bin").samefile(output + ".bin"):
                raise DataError(f"{output} is one of the inputs; write to another --output")
        if dataset.dtype != first.dtype:
            raise DataError(
                f"{dataset.prefix} holds {dataset.dtype.name} tokens and {first.prefix} {first.dtype.name}: they were "
                "made with vocabularies of different sizes; preprocess one of them again with the other's tokenizer"
            )
        if bool(own) != bool(known):
            none, some = (dataset, first) if known else (first, dataset)
            raise DataError(
                f"{none.prefix}.json is missing, so nothing says that it was made with the tokenizer of {some.prefix}; "
                f"preprocess it again, or move {some.prefix}.json away if you know that it has"
            )
        for key in ("tokenizer_sha256", "vocab_size", "eos_id", "bos_id"):
            if own.get(key) != known.get(key):
                raise DataError(
                    f"{dataset.prefix} and {first.prefix} were made with different tokenizers ({key}: {own.get(key)} "
                    f"and {known.get(key)}); preprocess one of them again with the other's"
                )
