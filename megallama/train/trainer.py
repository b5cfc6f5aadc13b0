"""The training run: build the parts, resume, then step after step until the end, a signal or a fault.

Only this file knows all rooms.  Whatever can fail on one rank alone while the run is set up is agreed
on by all ranks, so that a fault ends the run with its message instead of leaving others waiting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from megallama.checkpoint.errors import NotFiniteError
from megallama.checkpoint.manager import CheckpointManager
from megallama.comm.errors import InternalError
from megallama.comm.launch import World
from megallama.comm.on_all_ranks import on_all_ranks
from megallama.comm.recording import Tape
from megallama.config.errors import ConfigError, MegallamaError
from megallama.config.rules import check, remaining
from megallama.config.schema import Config
from megallama.config.usual import unusual
from megallama.config.words import counted
from megallama.data.errors import DataError
from megallama.data.ledger import TrainData
from megallama.data.loader import Loader
from megallama.data.sources import Data, ValidData, open_sources
from megallama.kernels.select import Kernels
from megallama.optim.lr import learning_rate
from megallama.optim.scaler import LossScaler
from megallama.plan.plan import Plan
from megallama.train.assemble import DTYPES, Rank, assemble, initialize, kernels_of, same_kernels
from megallama.train.changes import changes
from megallama.train.collect import Collector
from megallama.train.determinism import set_deterministic
from megallama.train.evaluate import Interrupted, evaluate
from megallama.train.health import HighLoss, NonFiniteGuard, TrainingStopped
from megallama.train.log import Logger, human_count
from megallama.train.metrics import evaluated
from megallama.train.peak import slow_format
from megallama.train.report import Counters, Reporter, used_sources
from megallama.train.room import check_room, room
from megallama.train.signals import SAVED, SignalFlag
from megallama.train.step import RankStatus, StepConsensus, train_step
from megallama.train.timers import Timers
from megallama.train.trace import StepTracer, timed

FINISHED = 0  # exit status: all steps are done
FAILED = 4  # exit status: something failed after steps had been made

T = TypeVar("T")
Kind = Literal["valid", "test"]


class Trainer:
    """One rank of a training run."""

    def __init__(
        self, config: Config, plan: Plan, world: World, log: Logger, signals: SignalFlag | None = None
    ) -> None:
        self._config = config
        self._plan = plan
        self._world = world
        self._log = log
        self._signals = signals or SignalFlag()
        self._counters = Counters()
        self._scaler = LossScaler(config.precision)
        self._bad = NonFiniteGuard(config.train.max_bad_steps)
        self._high = HighLoss()
        self._save_owed = False  # a save that was due while the steps were bad
        self._missing: list[tuple[Kind, ValidData]] = []  # evaluations that the last step still lacks
        self._evaluated_first = True  # a checkpoint of an earlier version lacks none
        self._timers = Timers()
        self._tape = Tape()
        self._started = time.monotonic()
        self._first_step = 0  # of this start: steps from here on were made by it
        set_deterministic(config.train.deterministic)

    def run(self) -> int:
        """Train until `train.steps` or until something asks to stop; the exit status."""
        self._data = self._agreed("data", self._open_data)
        self._manager = self._checkpoints()
        self._agreed("data", self._check_request)
        warnings = [*self._agreed("memory", self._check_room), *unusual(self._config)]
        kernels = self._describe()
        for line in warnings:
            self._log.info(f"warning: {line}")
        self._manager.acquire()
        self._signals.before_leaving(lambda why, status: self._manager.release())
        try:
            self._config = self._manager.keep_settings()
            self._plan = replace(self._plan, config=self._config)
            self._rank = self._agreed("model", lambda: self._build(kernels))
            self._restore()
            if why := self._asked_before():
                self._signals.leave(why)
                return SAVED
            with Collector(self._config.train.gc_interval) as self._collector:
                return self._loop()
        except BaseException as error:
            self._give_up(error)
            raise
        finally:
            self._manager.release()

    def _give_up(self, error: BaseException) -> None:
        """The failure is told first; then a save under way may end, as long as all ranks hold their parts of it."""
        begun, not_finite = self._counters.step > self._first_step, (TrainingStopped, NotFiniteError)
        if isinstance(error, MegallamaError) and begun and not isinstance(error, not_finite):
            error.status = FAILED
        self._world.failed(error)
        if self._manager.saving:
            seconds = self._config.checkpoint.finish_seconds
            self._log.info(f"{type(error).__name__}: {error}; the save under way may take up to {seconds:g} s more")
            self._manager.wait(seconds, lambda: self._world.whole)

    # ---- setting up ----

    def _agreed(self, what: str, work: Callable[[], T]) -> T:
        """Run `work` on every rank; if it fails anywhere, it has failed everywhere."""
        kept: list[T] = []
        on_all_ranks(self._world.group, what, lambda: kept.append(work()))
        return kept[0]

    def _check_request(self) -> None:
        """What a run that starts anew asks for in vain is known before anything is made."""
        if self._world.rank == 0 and self._manager.starts_fresh():
            self._find_last_step()

    def _check_room(self) -> list[str]:
        rank, world = self._world.rank, self._world
        memory = self._plan.memory(self._plan.topology.coords(rank)["pp"])
        mine = (world.hosts[rank], memory.persistent, memory.total, room(world.device))
        return check_room(world.group.gather_values(mine))

    def _describe(self) -> Kernels:
        config = self._config
        kernels = self._agreed("kernels", lambda: kernels_of(config, self._world.device))
        same_kernels(self._world.group.gather_values([(c.operation, c.selected) for c in kernels.choices]))
        self._agreed("run folder", lambda: self._log.open(Path(config.run.folder)))
        for line in str(self._plan).splitlines():
            self._log.info(line)
        for text in [*self._world.notes, f"kernels: {kernels}"]:
            self._log.info(text)
        for choice in kernels.choices:  # all of them in this rank's file, aloud where something installed does not work
            (self._log.info if choice.broken else self._log.note)(f"kernel for {choice}")
        slow = slow_format(self._world.device, DTYPES[config.precision.dtype]) if self._world.rank == 0 else ""
        if slow:
            self._log.warn(f'{slow}; write precision.dtype="fp32"')
        return kernels

    def _open_data(self) -> Data:
        data = open_sources(self._config)
        for text in data.notes:
            self._log.info(text)
        return data

    def _checkpoints(self) -> CheckpointManager:
        folder = self._config.checkpoint.folder
        assert folder is not None, "filled in when a configuration is loaded"
        tokenizer = self._data.tokenizer
        return CheckpointManager(
            self._config,
            Path(folder),
            self._world.host_group("checkpoint"),
            tokenizer.path if tokenizer else None,
            self._log.info,
            marks=self._data.marks,
        )

    def _build(self, kernels: Kernels) -> Rank:
        told = len(self._world.notes)
        groups = self._world.groups(self._plan.topology, self._config.model.num_kv_heads or 1)
        for text in self._world.notes[told:]:
            self._log.info(text)
        if self._config.log.trace_steps:
            groups = timed(groups, self._tape)
        rank = assemble(self._plan, groups, self._world.device, kernels)
        if self._config.checkpoint.interval:  # the last save needs no snapshot: nothing trains meanwhile
            self._manager.prepare(rank.optimizer.shards(owned_only=True))
        return rank

    def _restore(self) -> None:
        """Newest checkpoint, given weights, or random weights; the log says which."""
        optimizer = self._rank.optimizer
        shards = optimizer.shards(owned_only=False)
        saved = self._manager.resume(shards)
        if saved is not None:
            self._load_counters(saved)
            step, samples = self._counters.step, self._counters.samples
            if train := self._train_data:
                self._agreed("data", lambda: train.resume(saved, step, samples))
            optimizer.loaded(self._counters.updates)
            at = f"step {self._counters.step}, {counted(human_count(self._counters.tokens), 'token')}"
            assert self._manager.resumed is not None
            path, before = self._manager.resumed
            self._log.info(f"resumed after {at}, from {path}")
            for line in changes(before, self._config, step, samples):
                self._log.info(f"since then: {line}")
            self._agreed("configuration", self._check_ramp)
        elif self._config.checkpoint.weights_from is not None:
            self._manager.load_weights(Path(self._config.checkpoint.weights_from), shards)
            optimizer.loaded(steps=0)
            self._log.info(f"starting from the weights of {self._config.checkpoint.weights_from}")
        else:
            initialize(self._rank, self._config.train.seed)
            self._log.info(f"starting from random weights of seed {self._config.train.seed}")
        self._last_step, why = self._agreed("data", self._find_last_step)
        if why:
            self._log.info(f"the data end after step {self._last_step} of {self._config.train.steps}: {why}")
        self._tell_sources()

    @property
    def _train_data(self) -> TrainData | None:
        return self._data.train if isinstance(self._data.train, TrainData) else None

    def _check_ramp(self) -> None:
        """That the ranks can share every batch that is still to come."""
        config = self._config
        batch = remaining(config.batch, self._counters.samples)
        problems = check(config.model_copy(update={"batch": batch}), self._world.world_size, need_data=False)
        if problems:
            raise ConfigError("; ".join(problems))

    def _find_last_step(self) -> tuple[int, str]:
        steps = self._config.train.steps
        return self._train_data.last_step(steps) if self._train_data else (steps, "")

    def _asked_before(self) -> str | None:
        """What asked any rank to stop; if nothing has, all see it in the next step's vote from here on."""
        asked = self._world.group.gather_values(self._signals.last_call())
        if why := next((f"{name} on rank {rank}" for rank, name in enumerate(asked) if name), None):
            return why
        self._signals.phase = "training"
        return None

    # ---- state ----

    def _save_counters(self) -> dict[str, Any]:
        return {
            **asdict(self._counters),
            "scaler": self._scaler.state_dict(),
            "bad_steps": self._bad.state_dict(),
            "first_loss": self._high.first,
            "evaluated": self._counters.step - bool(self._missing),  # what was due up to this step
            **(self._train_data.state(self._counters.samples) if self._train_data else {}),
        }

    def _load_counters(self, saved: dict[str, Any]) -> None:
        self._counters = Counters(**{name: saved[name] for name in ("step", "updates", "samples", "tokens")})
        self._first_step, self._evaluated_first = self._counters.step, "evaluated" not in saved
        self._high = HighLoss(saved.get("first_loss"))
        self._scaler.load_state_dict(saved["scaler"])
        self._bad.load_state_dict(saved["bad_steps"])

    def _record_health(self, result: StepConsensus) -> None:
        """Count the step. Raises: TrainingStopped after too many bad ones, naming the last checkpoint before them."""
        bad, good = self._bad, None
        if not (result.applied or self._loss_scale_overflow or bad.bears_another):
            self._manager.wait(self._config.checkpoint.finish_seconds)
            with suppress(OSError):
                good = self._manager.newest_step(bad.last_good or 0) if self._world.rank == 0 else None
            good = self._world.group.gather_values(good)[0]
        if result.applied and (text := self._high.seen(result.loss)):
            self._log.info(f"warning: step {self._counters.step}: {text}")
        bad.record(self._counters.step, result.applied, overflow=self._loss_scale_overflow, checkpoint=good)
        self._manager.keep_all = bad.in_a_row > 0

    def _save_if_due(self, leaving: bool) -> None:
        """Save when it is time; but while the steps are bad nobody knows since when the state has been."""
        interval, step = self._config.checkpoint.interval, self._counters.step
        self._save_owed |= interval > 0 and step % interval == 0
        if leaving or (self._save_owed and not self._bad.in_a_row):
            self._save_owed = False
            self._save(leaving)
        elif self._save_owed and step % interval == 0:
            self._log.info(f"step {step} is not saved before a step is good again; nothing is deleted meanwhile")

    def _save(self, leaving: bool) -> None:
        shards = self._rank.optimizer.shards(owned_only=True)
        with self._timers.phase("save"), self._world.patient(self._config.run.io_timeout_seconds):
            self._manager.save(self._counters.step, shards, self._save_counters(), behind=not leaving)
        self._tell_sources()

    def _save_unsaved(self) -> None:
        """All ranks are between two steps: what is not on disk goes there."""
        with suppress(MegallamaError, InternalError):  # it was told, and is made good here
            self._manager.finish()
        if self._manager.saved_step != self._counters.step > self._first_step:
            self._save(leaving=True)

    def _end_together(self, failure: MegallamaError | None) -> NoReturn:
        """Some rank cannot go on, and all know, between two steps: they save what is good and end with its error."""
        told = self._world.group.gather_values([str(failure), failure.status] if failure else None)
        found = [(rank, *what) for rank, what in enumerate(told) if what]
        if not found:  # a save behind the steps met a state that is not finite, on all ranks alike
            self._manager.finish()
        rank, text, status = found[0]
        text = f"rank {rank} on {self._world.hosts[rank]}: {text}" if self._world.world_size > 1 else text
        if (step := self._counters.step) > self._first_step:
            self._log.info(f"{text}; saving step {step} before the run ends")
            try:
                self._save_unsaved()
                text += f"; step {step} is saved, the same command goes on from there"
            except (MegallamaError, InternalError) as unsaved:
                text += f"; and step {step} could not be saved: {unsaved}"
        error = DataError(text)
        error.shared, error.status = True, status
        raise error from failure

    # ---- the loop ----

    def _loop(self) -> int:
        config, counters = self._config, self._counters
        folder = Path(config.run.folder) / "trace"
        self._tracer = StepTracer(self._rank, config.log.trace_steps, folder, self._log, self._tape)
        device, log, timers = self._world.device, self._log, self._timers
        report = Reporter(self._plan, device, log, timers, self._train_data, counters.step)
        loader = self._loader()
        try:
            self._missing = self._never_made()
            stopped = self._evaluate(report)
            while counters.step < self._last_step and stopped is None:
                result = self._one_step(loader)
                report.tokens += result.tokens
                self._world.bound(config.run.timeout_seconds)
                stopped = result.stop_reason or self._asked_to_stop()
                last = counters.step == self._last_step
                if counters.step % config.log.interval == 0 or last or stopped or not result.applied:
                    self._report_step(report, result, loader.wait_seconds)
                self._record_health(result)
                self._missing = self._due()
                self._save_if_due(leaving=last or stopped is not None)
                stopped = stopped or self._evaluate(report)
                self._collector.step(counters.step)
            self._rank.optimizer.wait()  # no rank leaves while another one still receives its weights
            self._save_unsaved()
            self._tracer.write()
            unfinished = counters.step < self._last_step or len(self._missing) > 0
            self._signals.leaving(SAVED if unfinished else FINISHED)
        finally:
            loader.close()
            report.writer.close()
        if unfinished:
            then = "continue" if counters.step < self._last_step else "make the evaluations that are missing"
            self._log.info(f"stopped: {stopped}; saved at step {counters.step}, start the same command again to {then}")
            return SAVED
        report.finished(counters)
        return FINISHED

    def _report_step(self, report: Reporter, result: StepConsensus, waited: float) -> None:
        skipped = not result.applied
        report.step(
            self._counters,
            **result.metrics,
            lr=self._last_lr,
            skipped=skipped,
            skipped_steps=self._bad.skipped + skipped,
            loss_scale=self._scaler.scale,
            data_wait_seconds=waited,
        )

    def _one_step(self, loader: Loader) -> StepConsensus:
        config, counters, plan = self._config, self._counters, self._plan
        size = plan.batch.global_batch(counters.samples)
        with self._timers.phase("data"):
            batches, failure = loader.next_or_zeros(plan.batch.num_microbatches(size), config)
        lr = learning_rate(counters.step, config.optimizer, config.lr_schedule)
        schedule, masked = plan.schedule_for(len(batches)), config.data.document_mask
        status = partial(self._status, failure is not None or self._manager.not_finite)
        with self._tracer.step(counters.step + 1, schedule):
            result = train_step(
                self._rank, schedule, batches, lr, self._scaler.scale, self._timers, masked=masked, status=status
            )
        if result.failed:
            self._end_together(failure)
        counters.samples += size
        counters.step += 1
        counters.updates += result.applied
        counters.tokens += result.tokens
        self._loss_scale_overflow = self._scaler.update(result.applied)
        if self._loss_scale_overflow:
            self._log.info(f"step {counters.step}: overflow; loss scale now {self._scaler.scale:g}")
        self._last_lr = lr
        return result

    def _status(self, failed: bool) -> RankStatus:
        minutes = self._config.train.stop_after_minutes
        late = minutes is not None and time.monotonic() - self._started >= 60 * minutes
        return RankStatus(self._signals.received, late, failed)

    def _asked_to_stop(self) -> str | None:
        steps = self._config.train.stop_after_steps
        if steps is not None and self._counters.step - self._first_step >= steps:
            return f"train.stop_after_steps={steps} is reached"
        return None

    def _loader(self) -> Loader:
        config, batch, dp = self._config, self._plan.batch, self._rank.groups.dp
        firsts = {self._counters.step: self._counters.samples}  # step -> first sample, as the batch ramps up

        def ids_of_step(step: int) -> Sequence[Sequence[int]]:
            first = firsts.pop(step)
            size = batch.global_batch(first)
            firsts[step + 1] = first + size
            return [batch.sample_ids(first, size, dp.rank, m) for m in range(batch.num_microbatches(size))]

        cuda = self._world.device.type == "cuda"
        return Loader(
            self._data.train.read,
            ids_of_step,
            start_step=self._counters.step,
            stop_step=self._last_step,
            prefetch=config.data.prefetch,
            timeout_seconds=config.data.timeout_seconds,
            device=self._world.device if cuda else None,
        )

    # ---- evaluations ----

    def _due(self) -> list[tuple[Kind, ValidData]]:
        """The evaluations that belong after the last step: every `eval_interval` steps, and all at the end."""
        step, interval, last = self._counters.step, self._config.train.eval_interval, self._last_step
        due: list[tuple[Kind, ValidData]] = []
        if interval and step and (step % interval == 0 or step == last):
            due += [("valid", source) for source in self._data.valid]
        return due + [("test", source) for source in self._data.test if step == last]

    def _never_made(self) -> list[tuple[Kind, ValidData]]:
        """Those that belong after the step of the checkpoint and that no earlier start has made."""
        if self._evaluated_first or not (due := self._due()):
            return []
        file, step = Path(self._config.run.folder) / "metrics.jsonl", self._counters.step
        made = self._world.group.gather_values(evaluated(file, step) if self._world.rank == 0 else [])[0]
        return [(kind, source) for kind, source in due if [kind, source.name] not in made]

    def _evaluate(self, report: Reporter) -> str | None:
        """Make the evaluations that are missing; why all ranks stop, if that is asked for meanwhile."""
        if not self._missing:
            return None
        with self._timers.phase("evaluate"), self._world.patient(self._config.run.io_timeout_seconds):
            while self._missing:
                (kind, source), counters = self._missing[0], self._counters
                most = self._config.train.eval_batches if kind == "valid" else None
                try:
                    numbers, consensus = evaluate(self._rank, source, most, self._status)
                except Interrupted as early:
                    if early.consensus.failed:
                        self._end_together(early.failure)
                    self._log.info(f"evaluation on {source.name} ended {early}: the next start makes it anew")
                    return early.consensus.stop_reason
                at = {"kind": kind, "name": source.name, "step": counters.step, "consumed_tokens": counters.tokens}
                report.writer.write(at | numbers)
                del self._missing[0]
                if consensus.stop_reason:
                    return consensus.stop_reason
        return None

    def _tell_sources(self) -> None:
        for name, used in used_sources(self._train_data, self._counters.samples).items():
            tokens = counted(human_count(used["tokens"]), "token")
            self._log.info(f"data source {name}: {used['epochs']:.4f} epochs, {tokens} used")
