"""The checkpoints of one run: saving behind training, choosing what to resume from, keeping order.

    manager = CheckpointManager(config, folder, rank, group, tokenizer, log)
    manager.acquire()                                  one job per folder; cleans up after a crash
    counters = manager.resume(shards)                  or None: start from random weights
    ...
    manager.save(step, shards, counters)               returns after one copy of the state
    manager.finish(); manager.release()

`group` must be used by nothing else: a save talks through it from a background thread while training
talks through its own groups (on CUDA: give it a gloo group).

Folders: ``step-00001000`` is complete, ``.tmp`` is unfinished and removed at the next start,
``.damaged`` was set aside because its bytes are not what was saved.  *Newest* is the last one
saved: saves are numbered, so after going back to an older step its successors win.
"""

from __future__ import annotations

import hashlib
import platform
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megallama.checkpoint import manifest, reader
from megallama.checkpoint.errors import CheckpointError, DamagedError, InternalError, NotFiniteError, agree
from megallama.checkpoint.huggingface import model_files
from megallama.checkpoint.layout import SHARD_BYTES, STATE, layout
from megallama.checkpoint.lock import LEASE_SECONDS, FolderLock
from megallama.checkpoint.writer import (
    Content,
    point_latest,
    recover_folder,
    remove_checkpoint,
    write_checkpoint,
)
from megallama.comm.group import Assembly
from megallama.config.errors import MegallamaError
from megallama.config.presets import PRESETS
from megallama.config.schema import Config, ModelConfig
from megallama.layers.shard import StateShard

GRACE_SECONDS = 2.0  # for the last acts of a save that the other ranks have done with
_STEP = re.compile(r"step-\d{8,}")


class CheckpointManager:
    """Saves and loads the checkpoints in `folder`; every rank of `group` has one and calls the same methods.

    `group` is dedicated to checkpoints. `tokenizer` is kept in every checkpoint. `log` is called on rank 0
    only, also from the background thread.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        rank: int,
        group: Assembly,
        tokenizer: Path | None,
        log: Callable[[str], None],
        *,
        shard_bytes: int = SHARD_BYTES,
        block_bytes: int = manifest.BLOCK_BYTES,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self._folder, self._group = Path(folder), group
        self._log = log if group.rank == 0 else lambda text: None
        self._shard_bytes, self._block_bytes = shard_bytes, block_bytes
        self._lock = FolderLock(self._folder, self._log, lease_seconds)
        self._tokenizer = hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer else None
        self._sets = layout(config.model, config.precision.dtype, shard_bytes)
        self._small = {"model/model.safetensors.index.json": self._sets["model"].index()}
        self._tokenizer_file = tokenizer
        self._use(config)
        self._line = secrets.token_hex(8)  # retention touches only the line of checkpoints that led here
        self._buffer: Tensor | None = None
        self._thread: threading.Thread | None = None
        self._handing = threading.Lock()  # over of the folder: by a save that outlives `release`, not before it
        self._released = False
        self.saving = False  # behind the caller's back
        self._failure: BaseException | None = None
        self._failures = 0  # in a row
        self.saved_step: int | None = None  # of the newest checkpoint this run has loaded or completed
        self.keep_all = False  # True: delete nothing, as long as it is not known which checkpoint is good

    def _use(self, config: Config) -> None:
        self._config = config
        self._small |= {f"model/{name}": data for name, data in model_files(config, self._tokenizer_file).items()}

    def acquire(self) -> None:
        """Create the folder, take its lock and clean up what a crash left.

        Raises: CheckpointError on every rank if the folder cannot be written or another job holds it.
        """

        def work() -> None:
            if self._group.rank:
                return
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._lock.acquire()
                for done in recover_folder(self._folder):
                    self._log(f"checkpoints: {done}")
            except OSError as error:
                raise CheckpointError(
                    f"cannot write to the checkpoint folder {self._folder}: {error}; choose another checkpoint.folder"
                ) from error

        agree(self._group, "checkpoint folder", work)

    def release(self) -> None:
        """Give the folder's lock back; where a save is still running that is its last act: it must not commit later."""
        with self._handing:
            self._released = True
            if not self.saving:
                self._lock.release()

    # ---- saving ----

    def prepare(self, shards: Sequence[StateShard]) -> None:
        """Allocate and touch the host buffer of asynchronous saves, so that the first save is as fast as later ones."""
        if not self._config.checkpoint.async_save or not shards:
            return
        master = shards[0].master
        need = sum(3 * s.box.numel for s in shards)
        if self._buffer is None or self._buffer.numel() < need or self._buffer.dtype != master.dtype:
            self._buffer = torch.empty(need, dtype=master.dtype, pin_memory=master.is_cuda)
            self._buffer.zero_()  # touches the pages: zeros() would leave that to the first save

    def save(self, step: int, shards: Sequence[StateShard], counters: dict[str, Any], *, behind: bool = True) -> None:
        """Save the state of `step`: the boxes this rank owns, and `counters` (JSON; equal on all ranks).

        With checkpoint.async_save and `behind` it returns after one copy to host memory; a failure is logged and, as
        long as checkpoint.max_failures in a row are not exceeded, left to the next save to make good. Else it
        returns after the commit.
        Raises: CheckpointError on every rank if this save failed, or too many before it, or another job has
        taken the folder; the checkpoints before it are untouched. NotFiniteError if this or the last save met a
        state that is not finite.
        """
        if self._thread is not None and self._thread.is_alive():
            since = time.monotonic()
            self._thread.join()
            self._log(f"checkpoint of step {step} waited {time.monotonic() - since:.1f} s for the one before it")
        try:
            self.finish()
        except (CheckpointError, InternalError) as error:
            if self._failures > self._config.checkpoint.max_failures or isinstance(error, NotFiniteError):
                raise
            agree(self._group, f"checkpoint of step {step}", self._lock.check)
        if not (self._config.checkpoint.async_save and behind):
            self._write(step, shards, counters)
            return
        snapshot = self._snapshot(shards)

        def work() -> None:
            try:
                self._write(step, snapshot, counters)
            except BaseException as error:  # noqa: BLE001 - raised by `finish` in the caller's thread
                self._failure = error
                self._failures += 1
                going = self._failures <= self._config.checkpoint.max_failures
                then = "the run goes on and saves when the next is due" if going else "the next save stops the run"
                if not isinstance(error, NotFiniteError):  # which ends the run
                    self._log(f"warning: checkpoint of step {step}: {error}; {then}")
            with self._handing:
                self.saving = False
                if self._released:
                    self._lock.release()

        self.saving = True
        self._thread = threading.Thread(target=work, name=f"checkpoint-{step}", daemon=True)
        self._thread.start()

    @property
    def not_finite(self) -> bool:
        """Whether the last save behind the training met a state that is not finite: `finish` raises it."""
        return isinstance(self._failure, NotFiniteError)

    def wait(self, seconds: float, whole: Callable[[], bool] = lambda: True) -> None:
        """Wait at most so long for a running save, and hardly where not all ranks are there any more (`whole`).

        `finish` raises what it met.
        """
        deadline = time.monotonic() + seconds
        while self._thread is not None and self._thread.is_alive() and (left := deadline - time.monotonic()) > 0:
            self._thread.join(min(left, 0.1))
            if not whole():  # the save will hear of it itself, unless what is left of it is this rank's alone
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)

    def finish(self) -> None:
        """Wait for a running save. Raises: what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _snapshot(self, shards: Sequence[StateShard]) -> list[StateShard]:
        """Copy the state into the host buffer."""
        self.prepare(shards)
        snapshot: list[dict[str, Tensor]] = [{} for _ in shards]
        at = 0
        for kind in STATE:
            tensors = [shard.state()[kind].detach() for shard in shards]
            for whole in _touching(tensors):
                assert self._buffer is not None
                self._buffer[at : at + whole.numel()].copy_(whole, non_blocking=True)
                at += whole.numel()
            first = at - sum(t.numel() for t in tensors)
            for copies, tensor in zip(snapshot, tensors, strict=True):
                copies[kind] = self._buffer[first : first + tensor.numel()]  # type: ignore[index]
                first += tensor.numel()
        if shards and shards[0].master.is_cuda:
            torch.cuda.current_stream(shards[0].master.device).synchronize()
        return [StateShard(shard.box, **copies) for shard, copies in zip(shards, snapshot, strict=True)]

    def _write(self, step: int, shards: Sequence[StateShard], counters: dict[str, Any]) -> None:
        started = time.monotonic()
        contents: list[Content] = []

        def begin() -> None:
            self._lock.check()
            body = self._body(step, counters)
            contents.append(Content(self._step(step), self._sets, self._small, body, self._block_bytes))

        agree(self._group, f"checkpoint of step {step}", begin)
        content = contents[0]
        try:
            write_checkpoint(content, shards, self._group)
        except NotFiniteError as error:
            alone = " on rank 0" * (self._group.size == 1)
            good = "there is none: start again" if self.saved_step is None else f"resume from step {self.saved_step}"
            error.args = (f"{error}{alone}; {good} with a lower optimizer.lr",)
            raise
        self._failures, self.saved_step = 0, step
        if self._group.rank == 0:
            size = sum(content.sizes().values())
            self._log(f"saved {content.final} ({size / 1e9:.3g} GB, {time.monotonic() - started:.1f} s)")
            self._tidy(content.final)

    def _body(self, step: int, counters: dict[str, Any]) -> dict[str, Any]:
        sequence = 0
        if self._group.rank == 0:
            sequence = 1 + max((m.sequence for m in self._complete().values()), default=0)
        return {
            "format": manifest.FORMAT,
            "step": step,
            "sequence": sequence,
            "line": self._line,
            "counters": counters,
            "architecture": manifest.architecture(self._config.model),
            "precision": self._config.precision.dtype,
            "shard_bytes": self._shard_bytes,
            "tokenizer": self._tokenizer,
            "config": self._config.model_dump(mode="json"),
            "saved_at": datetime.now().astimezone().isoformat(timespec="seconds"),
            "saved_by_ranks": self._group.size,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "megallama": _own_version()},
        }

    def _tidy(self, final: Path) -> None:
        """Point `latest` at the new checkpoint, delete those not to be kept. The save is done: failures only warn."""
        keep_last, keep_every = self._config.checkpoint.keep_last, self._config.checkpoint.keep_every
        try:
            point_latest(final)
            if self.keep_all:
                return
            replaced = final.with_name(final.name + ".old")
            if replaced.exists():
                remove_checkpoint(replaced)
            mine = [(m.sequence, m.step, p) for p, m in self._complete().items() if m.body["line"] == self._line]
            for _, step, path in sorted(mine)[:-keep_last]:
                if path != final and not (keep_every and step % keep_every == 0):
                    remove_checkpoint(path)
        except OSError as error:
            self._log(f"warning: tidying up {self._folder} failed: {error}")

    # ---- choosing ----

    def _step(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"

    def _complete(self) -> dict[Path, manifest.Manifest]:
        """The step folders whose manifests verify, in no order."""
        found = {}
        for path in self._folders():
            with suppress(MegallamaError):
                found[path] = manifest.read_manifest(path, files=False)
        return found

    def _folders(self) -> list[Path]:
        return [p for p in sorted(self._folder.glob("step-*")) if _STEP.fullmatch(p.name) and p.is_dir()]

    def newest(self) -> Path | None:
        """The newest checkpoint that is complete in the eyes of every rank; None if there has never been one.

        A folder that is not (truncated, missing files, damaged manifest) is renamed to ``.damaged`` and the one before
        it is looked at.  The contents of the files are verified by `load`.
        Raises: CheckpointError on every rank if there are checkpoints but none is complete.
        """
        what = f"checkpoints in {self._folder}"
        names = agree(self._group, what, lambda: self._candidates() if self._group.rank == 0 else None)[0]
        problems = []
        for name in names:
            path = self._folder / name
            told = self._group.gather_values(_problem(path))
            wrong = [(rank, text) for rank, text in enumerate(told) if text is not None]
            if not wrong:
                return path
            problems.append(f"{name}: {wrong[0][1]}")
            if wrong[0][0] == 0:
                self._set_aside(path, problems[-1])
            else:  # rank 0 sees it whole: not damaged, but not there for everybody
                problems[-1] += f" (seen by rank {wrong[0][0]}: is the folder shared by all nodes?)"
                self._log(f"warning: {problems[-1]}; it is not used")
        past = agree(self._group, what, lambda: sorted(p.name for p in self._folder.glob("step-*.damaged*")))[0]
        if not problems and not past:
            return None
        listing = problems or [f"{name}: set aside earlier" for name in past]
        raise CheckpointError(
            f"{self._folder} holds checkpoints, but none is usable:\n  " + "\n  ".join(listing) + "\nRestore one of "
            "them, or write checkpoint.resume=fresh (or --fresh) to start again from random weights"
        )

    def newest_step(self, most: int) -> int | None:
        """The highest step up to `most` of which the folder holds a complete checkpoint; only looks."""
        return max((m.step for m in self._complete().values() if m.step <= most), default=None)

    def _candidates(self) -> list[str]:
        """Names of the step folders, newest first; those with an unreadable manifest before all others."""
        complete = self._complete()
        order = {p: complete[p].sequence if p in complete else 1 << 62 for p in self._folders()}
        return [p.name for p in sorted(order, key=lambda p: (order[p], p.name), reverse=True)]

    def _set_aside(self, path: Path, why: str) -> None:
        """Rename a damaged folder (rank 0), so that it is neither used nor deleted."""

        def work() -> None:
            if self._group.rank == 0 and path.exists():
                names = [f"{path.name}.damaged"] + [f"{path.name}.damaged-{i}" for i in range(2, 1000)]
                path.rename(next(n for n in map(path.with_name, names) if not n.exists()))

        agree(self._group, f"setting {path} aside", work)
        self._log(f"warning: {why}; set aside as {path.name}.damaged")

    def keep_settings(self) -> Config:
        """The configuration to go on with: settings of the newest checkpoint where a preset has changed since.

        Each is logged.  Raises: as `newest`.
        """
        config, kept = self._config, dict[str, Any]()
        path = self.newest() if config.model.preset in PRESETS and config.checkpoint.resume != "fresh" else None
        if path is not None:
            agree(self._group, "cannot resume", lambda: kept.update(manifest.kept(_model_of(path), config.model)))
        for key, value in kept.items():
            now = getattr(config.model, key)
            self._log(f"model.{key}={value} as in {path}; its preset says {now} by now: write model.{key} to choose")
        if kept:
            self._use(config.model_copy(update={"model": config.model.model_copy(update=kept)}))
        return self._config

    # ---- loading ----

    def resume(self, shards: Sequence[StateShard]) -> dict[str, Any] | None:
        """Load the newest valid checkpoint as checkpoint.resume says; its counters, or None: start from random weights.

        A checkpoint that turns out damaged while it is read is set aside and the previous one is loaded.
        Raises: CheckpointError if there is none to load and "must" was asked, or all are damaged, or it is
        of another architecture.
        """
        mode = self._config.checkpoint.resume
        while mode != "fresh":
            path = self.newest()
            if path is None and mode == "must":
                raise CheckpointError(
                    f"checkpoint.resume=must, but {self._folder} holds no checkpoint; set checkpoint.folder to that of "
                    "the run to continue, or checkpoint.resume=auto to start it"
                )
            if path is None:
                return None
            try:
                return self.load(path, shards)
            except DamagedError as error:
                self._set_aside(path, str(error))
        return None

    def load(self, path: Path, shards: Sequence[StateShard]) -> dict[str, Any]:
        """Fill `shards` (of any layout; owned or copies) from a step folder; returns its counters.

        Every block that is read is verified, and the ranks share the verification of the files not needed.
        Raises, on every rank: DamagedError naming file and block; CheckpointError listing every setting in
        which the architecture or the tokenizer differs.
        """
        saved: list[manifest.Manifest] = []

        def check() -> None:
            saved.append(manifest.read_manifest(path))
            wrong = manifest.differences(saved[0].model, self._config.model)
            tokenizer = saved[0].body["tokenizer"]
            if self._tokenizer and tokenizer and tokenizer != self._tokenizer:
                wrong.append(f"data.tokenizer: checkpoint sha256 {tokenizer[:16]}..., now {self._tokenizer[:16]}...")
            if wrong:
                raise CheckpointError(
                    f"{path} was saved by another model:\n  " + "\n  ".join(wrong) + "\nGive the checkpoint's "
                    "values, or choose another checkpoint.folder for the new model"
                )

        def read() -> None:
            reader.load_state(path, saved[0], shards)
            rest = list(saved[0].blocks("model/"))[self._group.rank :: self._group.size]
            if problems := reader.verify_blocks(path, saved[0], rest):
                raise DamagedError("; ".join(problems))

        agree(self._group, "cannot resume", check)
        agree(self._group, f"cannot load {path}", read)
        self._line, self.saved_step = saved[0].body["line"], saved[0].step
        return saved[0].body["counters"]

    def load_weights(self, path: Path, shards: Sequence[StateShard]) -> None:
        """Fill the master weights from a step folder (its fp32 masters) or a Hugging Face folder; moments become zero.

        Raises, on every rank: CheckpointError naming every tensor that is missing, unknown or of another
        shape; DamagedError naming file and block.
        """
        path = Path(path)

        def read() -> list[str]:
            step = reader.step_folder(path)
            if step is not None:
                saved = manifest.read_manifest(step)
                files, model = reader.open_state(step, saved, "master"), saved.model
            else:
                files, model = reader.open_folder(path), reader.read_model_config(path)
            with files:
                reader.check_tensors(path, files, self._config.model)
                reader.fill_weights(files, shards)
            return manifest.differences(model, self._config.model)

        for line in agree(self._group, f"cannot load weights from {path}", read)[0]:
            self._log(f"warning: weights of {path}: {line}")


def _touching(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """The same elements in the same order, with what lies side by side in memory as one tensor: few large copies."""
    run: list[Tensor] = []
    for tensor in [*tensors, None]:
        if run and tensor is not None and tensor.data_ptr() == run[-1].data_ptr() + run[-1].nbytes and (
            tensor.untyped_storage().data_ptr() == run[-1].untyped_storage().data_ptr()
        ):
            run.append(tensor)
            continue
        if run:
            yield run[0].as_strided((sum(t.numel() for t in run),), (1,))
        run = [] if tensor is None else [tensor]


def _problem(path: Path) -> str | None:
    """Why a step folder is not complete; None if it is."""
    try:
        manifest.read_manifest(path)
    except DamagedError as error:
        return str(error)
    except CheckpointError:
        return None  # whole, but of another format: `load` says so
    return None


def _model_of(path: Path) -> ModelConfig:
    return manifest.read_manifest(path, files=False).model


def _own_version() -> str:
    try:
        return version("megallama")
    except PackageNotFoundError:
        return "source tree"
