"""The checkpoints of one run: saving behind training, choosing what to resume from, keeping order.

*Newest* is the last one saved, not the highest step: after going back the successors win.
"""

import hashlib
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import cache, partial
from itertools import accumulate, groupby, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megallama
from megallama.checkpoint import disk, manifest, reader
from megallama.checkpoint import folder as folders
from megallama.checkpoint.disk import CheckpointError, UnreadableError
from megallama.checkpoint.huggingface import model_files, own_tokenizer, read_model_config
from megallama.checkpoint.manifest import SHARD_BYTES, STATE, layout
from megallama.checkpoint.starts import Starts
from megallama.checkpoint.writer import Content, NotFiniteError, write_checkpoint
from megallama.comm.flight_record import SAVING, FlightRecord
from megallama.comm.group import Assembly, on_all_ranks
from megallama.config.errors import InternalError, MegallamaError
from megallama.config.presets import PRESETS
from megallama.config.schema import Config
from megallama.layers.param import Shard, digest

GRACE_SECONDS = 2.0  # for the last acts of a save that the other ranks have done with
TELL_SECONDS = 60.0  # between two lines about a save that lasts


class CheckpointManager:
    """Saves and loads the checkpoints in `folder`; every rank of `group` calls the same methods.

    `group` serves saves in the background alone.  `tokenizer` and `marks` go to `huggingface.model_files`, or
    `small` has its files.  `log` is for rank 0, by any thread; but all ranks tell of calls that hold up a save.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        group: Assembly,
        tokenizer: Path | None,
        log: Callable[[str], None],
        *,
        marks: Mapping[str, int | None] | None = None,
        small: Mapping[str, bytes] | None = None,
        shard_bytes: int = SHARD_BYTES,
        block_bytes: int = manifest.BLOCK_BYTES,
        lease_seconds: float = folders.LEASE_SECONDS,
        record: FlightRecord | None = None,
        starts: Starts | None = None,
    ) -> None:
        self._folder, self._group, self._record = Path(folder), group, record or FlightRecord()
        self._log, self._tell = log if group.rank == 0 else lambda text: None, log
        self._once = cache(self._log)
        self._shard_bytes, self._block_bytes = shard_bytes, block_bytes
        lock = folders.FolderLock(self._folder, self._log, lease_seconds)
        self.starts = starts or Starts(lock, config, group.size)
        self._lock = self.starts.lock
        kept = tokenizer.read_bytes() if tokenizer else own_tokenizer(small or {})
        self._tokenizer = None if kept is None else hashlib.sha256(kept).hexdigest()
        self._choice = folders.Choice(self._folder, group, self._log, previous=config.checkpoint.resume == "previous")
        self._sets = layout(config.model, config.precision.dtype, shard_bytes)
        self._small = {"model/model.safetensors.index.json": self._sets["model"].index()}
        self._describe = partial(model_files, tokenizer=tokenizer, marks=marks, log=self._log)
        self.use(config, small)
        self.lineage = secrets.token_hex(8)  # retention deletes only checkpoints of this one
        self._pieces: list[tuple[Tensor, int]] = []  # of the host buffer, and their numbers of tensors
        self._thread = threading.Thread()  # of the last save in the background
        self._handing = threading.Lock()  # the lock over to a save that outlives `release`
        self._released = False
        self.saving = False  # behind the caller's back
        self._failure: BaseException | None = None
        self._failures = 0  # in a row
        self.saved_step: int | None = None  # of the newest loaded or completed
        self.begun: int | None = None  # the step of the last save that has begun
        self.chain = self._folder / "memory"  # which copies in memory belong to these
        self.resumed: tuple[Path, dict[str, Any]] | None = None  # with its configuration
        self.keep_all = False  # while nobody knows which checkpoint is good

    def use(self, config: Config, small: Mapping[str, bytes] | None = None) -> None:
        """Save with this configuration from here on, where no save is under way."""
        self._config = config
        self._small |= {f"model/{name}": data for name, data in (small or self._describe(config)).items()}

    def acquire(self, *, counted: bool = False) -> None:
        """Create, lock, clean up the folder; `counted`: a run starts. Raises: CheckpointError on all."""

        def work() -> None:
            if self._group.rank:
                return
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._lock.acquire()
                if counted:
                    self.starts.begin()
                for done in folders.recover_folder(self._folder):
                    self._log(f"checkpoints: {done}")
            except OSError as error:
                raise CheckpointError(
                    f"cannot write to the checkpoint folder {self._folder}: {error}; choose another checkpoint.folder"
                ) from error

        on_all_ranks(self._group, "checkpoint folder", work)

    def release(self) -> None:
        """Give the folder's lock back; a save that still runs does it as its last act."""
        with self._handing:
            self._released = True
            if not self.saving:
                self._lock.release()

    def prepare(self, shards: Sequence[Shard]) -> None:
        """Make the host buffer of asynchronous saves, so that the first is as fast."""
        if self._config.checkpoint.async_save and shards and not self._pieces:
            sizes, master = [s.box.numel for s in shards] * len(STATE), shards[0].state["master"]
            for room, count in pieces(sizes) if master.is_cuda else [(sum(sizes), len(sizes))]:
                piece = torch.empty(room, dtype=master.dtype, pin_memory=master.is_cuda)
                # zero_() touches the pages; zeros() leaves that to the first save
                self._pieces.append((piece.zero_(), count))

    def save(self, step: int, shards: Iterable[Shard], counters: dict[str, Any], *, behind: bool = True) -> None:
        """Save the state of `step`: the boxes this rank owns, and `counters` (JSON).

        With async_save and `behind` it returns after a copy to host memory; max_failures in a row are logged.
        Raises, on all: CheckpointError, MachineError if it or too many failed, or the lock is lost; NotFiniteError.
        """
        try:
            self.finish(f"checkpoint of step {step}")
        except (MegallamaError, InternalError) as error:
            if self._failures > self._config.checkpoint.max_failures or isinstance(error, NotFiniteError):
                raise
            still_ours = self._lock.check if self._lock.lost else lambda: None
            on_all_ranks(self._group, f"checkpoint of step {step}", still_ours)
        self.begun = step
        if isinstance(shards, list) and shards:  # all there: not made one after the other
            numbers = iter(torch.stack([digest(shard.state[kind]) for shard in shards for kind in STATE]).tolist())
            shards = [replace(shard, digests={kind: next(numbers) for kind in STATE}) for shard in shards]
        if not (self._config.checkpoint.async_save and behind):
            self._write(step, shards, counters)
            return
        snapshot, most = self._snapshot([*shards]), self._config.checkpoint.max_failures

        def work() -> None:
            try:
                self._write(step, snapshot, counters)
            except BaseException as error:  # noqa: BLE001 - raised by `finish`
                self._failure, self._failures = error, self._failures + 1
                then = "the run goes on and saves when the next is due"
                then = then if self._failures <= most else "the next save stops the run"
                if not isinstance(error, NotFiniteError):  # which ends the run
                    self._log(f"warning: checkpoint of step {step}: {error}; {then}")
            with self._handing:
                self.saving = False
                if self._released:
                    self._lock.release()

        self.saving = True
        self._thread = threading.Thread(target=work, name=f"checkpoint of step {step}", daemon=True)
        self._thread.start()

    @property
    def not_finite(self) -> bool:
        """Whether the last save met a state that is not finite: `finish` raises it."""
        return isinstance(self._failure, NotFiniteError)

    def wait(self, seconds: float, whole: Callable[[], bool] = lambda: True) -> None:
        """Wait so long for a running save; hardly where ranks have left (not `whole`)."""
        deadline = time.monotonic() + seconds
        while self._thread.is_alive() and (left := deadline - time.monotonic()) > 0:
            self._thread.join(min(left, 0.1))
            if not whole():  # the save hears of it too, or is in its last acts
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)

    def finish(self, who: str = "the run") -> None:
        """Wait for a running save; the log says that `who` does. Raises: what it raised."""
        if self._thread.is_alive():
            since = time.monotonic()
            self._log(f"{who} waits for the {self._thread.name}, which is still being written")
            self._thread.join()
            self._log(f"{who} waited {time.monotonic() - since:.1f} s for the one before it")
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _snapshot(self, shards: Sequence[Shard]) -> list[Shard]:
        self.prepare(shards)
        tensors = iter([shard.state[kind].detach() for kind in STATE for shard in shards])
        copies = list[Tensor]()
        for piece, count in self._pieces:
            own = list(islice(tensors, count))
            runs, sizes = list(_touching(own)), [tensor.numel() for tensor in own]
            copies += (held := piece[: sum(sizes)]).split(sizes)
            for copy, run in zip(held.split([run.numel() for run in runs]), runs, strict=True):
                copy.copy_(run, non_blocking=True)
        if shards and shards[0].state["master"].is_cuda:
            torch.cuda.current_stream(shards[0].state["master"].device).synchronize()
        states = (dict(zip(STATE, copies[i :: len(shards)], strict=True)) for i in range(len(shards)))
        return [replace(shard, state=state) for shard, state in zip(shards, states, strict=True)]

    def _write(self, step: int, shards: Iterable[Shard], counters: dict[str, Any]) -> None:
        started, seen = time.monotonic(), dict[Any, float]()

        def remind() -> None:
            nonlocal seen  # of the calls that are under way: since when
            passed, calls = time.monotonic() - started, folders.under_way()
            seen = {call: seen.get(call, passed) for call in calls}
            waits = [f", rank {self._group.rank} in {calls[c]} for {passed - seen[c]:.0f} s or more" for c in calls]
            text = f"the checkpoint of step {step} is still being written, for {passed:.0f} s now"
            (self._tell if waits else self._log)(text + "".join(waits))

        def begin() -> tuple[dict[str, Any], bool]:
            self._lock.check()
            return (self._body(step, counters) if self._group.rank == 0 else {}), manifest.XXH3 in manifest.HASHERS

        reminder = folders.every(TELL_SECONDS, remind)
        self._record.words[SAVING] = 1
        try:
            found = on_all_ranks(self._group, f"checkpoint of step {step}", begin)
            lacking = [rank for rank, (_, able) in enumerate(found) if not able]
            for rank in lacking[:1]:
                self._once(f"digests are SHA-256: rank {rank} lacks xxhash, which is faster (pip install xxhash)")
            digests = manifest.SHA256 if lacking else manifest.XXH3
            body = found[0][0] | {"format": manifest.FORMATS[digests], "digests": digests}
            content = Content(self._folder / f"step-{step:08d}", self._sets, self._small, body, self._block_bytes)
            write_checkpoint(content, shards, self._group)
        except NotFiniteError as error:
            alone = " on rank 0" * (self._group.size == 1)
            good = "there is none: start again" if self.saved_step is None else f"resume from step {self.saved_step}"
            error.args = (f"{error}{alone}; {good} with a lower optimizer.lr",)
            raise
        finally:
            reminder.set()
            self._record.words[SAVING] = 0
        self._failures, self.saved_step = 0, step
        if self._group.rank == 0:
            size = sum(content.sizes.values())
            self._log(f"saved {content.final} ({size / 1e9:.3g} GB, {time.monotonic() - started:.1f} s)")
            self._tidy(content.final)

    def _body(self, step: int, counters: dict[str, Any]) -> dict[str, Any]:
        versions = {"torch": torch.__version__, "megallama": megallama.__version__}
        found = folders.checkpoints(self._folder).values()
        sequence = 1 + max((brief.sequence for brief in found if isinstance(brief, folders.Brief)), default=0)
        sequence += sum(isinstance(brief, UnreadableError) for brief in found) << 20  # beyond theirs
        return {
            "step": step,
            "sequence": sequence,
            "line": self.lineage,
            "counters": counters,
            "architecture": manifest.architecture(self._config.model),
            "precision": self._config.precision.dtype,
            "shard_bytes": self._shard_bytes,
            "tokenizer": self._tokenizer,
            "config": self._config.model_dump(mode="json"),
            "saved_at": datetime.now().astimezone().isoformat(timespec="seconds"),
            "saved_by_ranks": self._group.size,
            "versions": {"python": platform.python_version()} | versions,
        }

    def _tidy(self, final: Path) -> None:
        """Point `latest` at the new one, delete those not to be kept; failures only warn."""
        keep_last, keep_every = self._config.checkpoint.keep_last, self._config.checkpoint.keep_every
        try:
            disk.write_durably(hint := folders.unfinished(final.with_name("latest")), f"{final.name}\n".encode())
            hint.rename(final.with_name("latest"))
            if self.keep_all:
                return
            if (before := final.with_suffix(folders.REPLACED)).exists():
                folders.remove_checkpoint(before)
                self._log(f"{final.name} took the place of the one saved earlier")
            own = [one for one in folders.known(self._folder) if one[0].lineage == self.lineage]
            for brief, path in own[:-keep_last]:
                if path != final and not (keep_every and brief.step % keep_every == 0):
                    folders.remove_checkpoint(path)
        except (OSError, CheckpointError) as error:
            self._log(f"warning: tidying up {self._folder} failed: {error}")

    def newest(self) -> tuple[Path, manifest.Manifest] | None:
        """The newest whose state all ranks see in full size. Raises: as `Choice.newest`."""
        return self._choice.newest(lambda path: (path, self._choice.look(path)))

    def newest_step(self, most: int) -> int | None:
        """The highest step up to `most` with a complete checkpoint; only looks."""
        return max((brief.step for brief, _ in folders.known(self._folder) if brief.step <= most), default=None)

    def keep_settings(self) -> Config:
        """The configuration; where a preset has changed since, as in the newest checkpoint."""
        model = self._config.model
        looks = model.preset in PRESETS and self._config.checkpoint.resume != "fresh"
        if not looks or (found := self.newest()) is None:
            return self._config
        path, saved = found
        kept = manifest.kept(saved.model, model)
        for key, value in kept.items():
            now = getattr(model, key)
            self._log(f"model.{key}={value} as in {path}; its preset says {now} by now: write model.{key} to choose")
        if kept:
            self.use(self._config.changed(model=kept))
        return self._config

    def starts_fresh(self) -> bool:
        """Whether nothing is there to resume, by names. Raises: CheckpointError if there must be."""
        names = [] if self._folder.is_file() else disk.names(self._folder)
        empty = not any(name.startswith("step-") for name in names)
        if empty and self._config.checkpoint.resume == "must":
            raise self._nothing_to_resume()
        return empty or self._config.checkpoint.resume == "fresh"

    def _nothing_to_resume(self) -> CheckpointError:
        return CheckpointError(
            f"checkpoint.resume=must, but {self._folder} holds no checkpoint; set checkpoint.folder to that of the run "
            "to continue, or checkpoint.resume=auto to start it"
        )

    def resume(self, shards: Sequence[Shard]) -> dict[str, Any] | None:
        """Load the newest checkpoint as checkpoint.resume says; its counters, or None: there is none.

        Raises: as `Choice.newest` and `load`; CheckpointError if there is none but must be.
        """
        if self._config.checkpoint.resume == "fresh":
            return None
        counters = self._choice.newest(lambda path: self.load(path, shards))
        if counters is None and self._config.checkpoint.resume == "must":
            raise self._nothing_to_resume()
        return counters

    def check_other(self, folder: Path) -> Path:
        """The step of another run that `folder` is, or its newest. Raises: as `load`."""
        path, use = folders.find_checkpoint(folder, self._log), "weights alone are taken with checkpoint.weights_from"
        if folders.step_folder(path) != path:
            raise CheckpointError(f"checkpoint.continue_from={folder} is no step-N folder of a run; {use}")
        self._check_model(path, manifest.read_manifest(path), other=True)
        return path

    def _check_model(self, path: Path, saved: manifest.Manifest, *, other: bool) -> None:
        wrong, was, now = manifest.differences(saved.model, self._config.model), saved.tokenizer, self._tokenizer
        other_angles = other or self._config.train.phases  # which have theirs
        wrong = [line for line in wrong if not (other_angles and line.startswith("model.rope_"))]
        if was and now and was != now:
            wrong.append(f"data.tokenizer: checkpoint sha256 {was[:16]}..., now {now[:16]}...")
        if wrong:
            raise CheckpointError(
                f"{path} was saved by another model:\n  " + "\n  ".join(wrong) + "\nGive the checkpoint's "
                f"values, or choose another checkpoint.{'continue_from' if other else 'folder for the new model'}"
            )

    def load(self, path: Path, shards: Sequence[Shard], *, other: bool = False) -> dict[str, Any]:
        """Fill `shards` (of any layout; owned or copies) from a step folder, of an `other` run; its counters.

        The ranks share the verification of model/, where damage is only logged. Raises, on every rank:
        DamagedError; UnreadableError; CheckpointError if the model or the tokenizer differs.
        """
        saved = self._choice.look(path)
        rest = list(saved.blocks("model/"))[self._group.rank :: self._group.size]

        def read() -> list[str]:
            reader.load_state(path, saved, shards)
            try:
                return reader.verify_blocks(path, saved, rest)[:3]
            except UnreadableError as error:
                return [str(error)]

        on_all_ranks(self._group, "cannot resume", lambda: self._check_model(path, saved, other=other))
        results = self._choice.read_on_all(f"cannot load {path}", read)
        if problems := [problem for found in results for problem in found]:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            self._log(
                f"warning: {problems[0]}{more}: the weights in {path / 'model'} are not to be used. The training state "
                "is whole and training goes on from it; the next save writes model/ again"
            )
        if not other:
            self.lineage, self.saved_step = saved.lineage, saved.step
        self.resumed = path, saved.config
        return saved.counters

    def check_weights(self, path: Path) -> None:
        """Raises: CheckpointError if `load_weights` would, as far as names and headers tell."""
        with self._weights(path, lambda text: None):
            pass

    def load_weights(self, path: Path, shards: Sequence[Shard]) -> None:
        """Fill the masters from those of a step, or a Hugging Face folder; moments become zero.

        Raises, on every rank: CheckpointError naming every tensor that does not fit; DamagedError.
        """

        def read() -> list[str]:
            with self._weights(path, self._log) as (files, notes):
                reader.fill(files, "master", shards)
            forget_moments(shards)
            return notes

        for line in on_all_ranks(self._group, f"cannot load weights from {path}", read)[0]:
            self._log(f"warning: weights of {path}: {line}")

    @contextmanager
    def _weights(self, path: Path, log: Callable[[str], None]) -> Iterator[tuple[reader.TensorFiles, list[str]]]:
        """The tensors of this model in a folder, and what else is to be said of them."""
        now, notes = self._config.model, list[str]()
        if (step := folders.step_folder(folders.find_checkpoint(path, log))) is not None:
            log(f"weights are those of {step}")
            saved = manifest.read_manifest(step)
            files, model = reader.open_state(step, saved, "master"), saved.model
        else:
            files = reader.open_folder(path)
            model, notes = reader.head_of(path, files, read_model_config(path))
        with files:
            if now.tie_embeddings and reader.head_of(path, files, now)[0] != now:
                raise CheckpointError(
                    f"model.tie_embeddings=true, but {path} has a {reader.HEAD} that is not its embedding; write "
                    "model.tie_embeddings=false, or leave it out with megallama convert --head tied"
                )
            reader.check_tensors(path, files, now)
            yield files, notes + manifest.differences(model, now)


def forget_moments(shards: Sequence[Shard]) -> None:
    """As before the first step."""
    for shard in shards:
        for moment in shard.state.keys() - {"master"}:
            shard.state[moment].zero_()


def pieces(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """How to hold tensors of these sizes, in order: (a power of two; how many lie in such a piece).

    torch takes page-locked memory in powers of two alone: of one piece half may be in vain.
    """
    while left := sum(sizes):
        below = 1 << left.bit_length() - 1
        room = below if below >= 8 * max(sizes) else 1 << (left - 1).bit_length()  # an eighth may stay empty
        count = sum(end <= room for end in accumulate(sizes))
        yield room, count
        sizes = sizes[count:]


def _touching(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """The same elements, neighbours in memory as one tensor: few large copies."""
    starts = accumulate((tensor.nbytes for tensor in tensors), initial=0)

    def origin(one: tuple[Tensor, int]) -> tuple[int, int]:  # where the run would begin
        return one[0].untyped_storage().data_ptr(), one[0].data_ptr() - one[1]

    for _, found in groupby(zip(tensors, starts, strict=False), origin):
        run = [tensor for tensor, _ in found]
        yield run[0].as_strided((sum(tensor.numel() for tensor in run),), (1,))
