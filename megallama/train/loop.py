"""Step after step, until the end, a signal or a fault: training, evaluations, saving, stopping."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn

from megallama.comm.errors import InternalError
from megallama.config.errors import MegallamaError
from megallama.data.errors import DataError
from megallama.data.loader import Loader
from megallama.data.samples import Source
from megallama.optim.lr import learning_rate
from megallama.train.evaluate import Interrupted, evaluate
from megallama.train.gc_schedule import GcSchedule
from megallama.train.plot import read_metrics
from megallama.train.report import Reporter
from megallama.train.setup import Setup
from megallama.train.signals import SAVED
from megallama.train.step import RankStatus, StepConsensus, train_step
from megallama.train.timers import Timers

FINISHED = 0  # exit status: all steps are done

Kind = Literal["valid", "test"]


class TrainingLoop:
    """The steps of one rank."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.progress = setup, setup.progress
        self._config, self._world, self._log, self._manager = setup.config, setup.world, setup.log, setup.manager
        self._timers = Timers()
        self._missing: list[tuple[Kind, Source]] = []  # evaluations of the last step
        self._overflow = False  # of the loss scale, in the last step
        self._save_owed = False  # a save that was due while the steps were bad

    def run(self) -> int:
        """Train until `train.steps` or until something asks to stop; the exit status."""
        if why := self._asked_before():
            self.setup.signals.leave(why)
            return SAVED
        config, progress, last_step = self._config, self.progress, self.setup.last_step
        with GcSchedule(config.train.gc_interval) as gc_schedule:
            with Reporter(self.setup, self._timers) as report, self._loader() as loader:
                self._missing = self._never_made()
                stopped = self._evaluate(report)
                while progress.step < last_step and stopped is None:
                    result = self._one_step(loader)
                    report.tokens += result.tokens
                    self._world.bound(config.run.timeout_seconds)
                    stopped = result.stop_reason or self._enough_steps()
                    last = progress.step == last_step
                    if progress.step % config.log.interval == 0 or last or stopped or not result.applied:
                        report.step(result, loader.wait_seconds)
                    self._record_health(result)
                    self._missing = self._due()
                    self._save_if_due(leaving=last or stopped is not None)
                    stopped = stopped or self._evaluate(report)
                    gc_schedule.step(progress.step)
                self.setup.worker.optimizer.wait()  # no rank leaves while another one still receives its weights
                self._save_unsaved()
                self.setup.tracer.write()
                unfinished = progress.step < last_step or len(self._missing) > 0
                self.setup.signals.leaving(SAVED if unfinished else FINISHED)
            if unfinished:
                then = "continue" if progress.step < last_step else "make the evaluations that are missing"
                again = f"start the same command again to {then}"
                self._log.info(f"stopped: {stopped}; saved at step {progress.step}, {again}")
                return SAVED
            report.finished()
            return FINISHED

    def _asked_before(self) -> str | None:
        """What asked any rank to stop; from here on the consensus of a step says it."""
        signals = self.setup.signals
        asked = self._world.group.gather_values(signals.last_call())
        if why := next((f"{name} on rank {rank}" for rank, name in enumerate(asked) if name), None):
            return why
        signals.phase = "training"
        return None

    def _one_step(self, loader: Loader) -> StepConsensus:
        config, progress, plan = self._config, self.progress, self.setup.plan
        size = config.batch.size_after(progress.samples)
        with self._timers.phase("data"):
            batches, failure = loader.next_or_zeros(config.batch.num_microbatches(size, plan.topology.dp), config)
        lr = learning_rate(progress.step, config.optimizer, config.lr_schedule)
        schedule, masked = plan.schedule_for(len(batches)), config.data.document_mask
        status = partial(self._status, failure is not None or self._manager.not_finite)
        scale, worker = progress.scaler.scale, self.setup.worker
        with self.setup.tracer.step(worker.runtime, progress.step + 1, schedule):
            result = train_step(worker, schedule, batches, lr, scale, self._timers, masked=masked, status=status)
        if result.failed:
            self._end_together(failure)
        progress.samples += size
        progress.step += 1
        progress.updates += result.applied
        progress.tokens += result.tokens
        self._overflow = progress.scaler.update(result.applied)
        if self._overflow:
            self._log.info(f"step {progress.step}: overflow; loss scale now {progress.scaler.scale:g}")
        return result

    def _status(self, failed: bool) -> RankStatus:
        minutes = self._config.train.stop_after_minutes
        late = minutes is not None and time.monotonic() - self.progress.started >= 60 * minutes
        return RankStatus(self.setup.signals.received, late, failed)

    def _enough_steps(self) -> str | None:
        steps = self._config.train.stop_after_steps
        if steps is not None and self.progress.step - self.progress.first_step >= steps:
            return f"train.stop_after_steps={steps} is reached"
        return None

    def _loader(self) -> Loader:
        config, batch, dp = self._config, self._config.batch, self.setup.worker.groups.dp
        firsts = {self.progress.step: self.progress.samples}  # step -> first sample: a batch may ramp up

        def ids_of_step(step: int) -> Sequence[Sequence[int]]:
            first = firsts.pop(step)
            size = batch.size_after(first)
            firsts[step + 1] = first + size
            return batch.sample_ids(first, size, dp.size, dp.rank)

        return Loader(
            self.setup.data.train.read,
            ids_of_step,
            start_step=self.progress.step,
            stop_step=self.setup.last_step,
            prefetch=config.data.prefetch,
            timeout_seconds=config.data.timeout_seconds,
            device=self._world.device,
        )

    # ---- health and checkpoints ----

    def _record_health(self, result: StepConsensus) -> None:
        """Count the step. Raises: TrainingStopped after too many bad ones."""
        guard, step, good = self.progress.guard, self.progress.step, None
        if not (result.applied or self._overflow or guard.bears_another):
            self._manager.wait(self._config.checkpoint.finish_seconds)
            with suppress(OSError):
                good = self._manager.newest_step(guard.last_good or 0) if self._world.rank == 0 else None
            good = self._world.group.gather_values(good)[0]
        if result.applied and (text := self.progress.high_loss.seen(result.loss)):
            self._log.info(f"warning: step {step}: {text}")
        guard.record(step, result.applied, overflow=self._overflow, checkpoint=good)
        self._manager.keep_all = guard.in_a_row > 0

    def _save_if_due(self, leaving: bool) -> None:
        """Save when it is time; but while steps are bad nobody knows since when the state is."""
        interval, step = self._config.checkpoint.interval, self.progress.step
        self._save_owed |= interval > 0 and step % interval == 0
        if leaving or (self._save_owed and not self.progress.guard.in_a_row):
            self._save_owed = False
            self._save(leaving)
        elif self._save_owed and step % interval == 0:
            self._log.info(f"step {step} is not saved before a step is good again; nothing is deleted meanwhile")

    def _save(self, leaving: bool) -> None:
        progress, train = self.progress, self.setup.train_data
        shards = self.setup.worker.optimizer.shards(owned_only=True)
        with self._timers.phase("save"), self._world.patient(self._config.run.io_timeout_seconds):
            counters = progress.state_dict(evaluated=progress.step - bool(self._missing))
            counters |= train.state(progress.samples) if train else {}
            self._manager.save(progress.step, shards, counters, behind=not leaving)
        self.setup.tell_sources()

    def _save_unsaved(self) -> None:
        """All ranks are between two steps: what is not on disk goes there."""
        with suppress(MegallamaError, InternalError):  # it was told, and is made good here
            self._manager.finish()
        if self._manager.saved_step != self.progress.step > self.progress.first_step:
            self._save(leaving=True)

    def _end_together(self, failure: MegallamaError | None) -> NoReturn:
        """Some rank cannot go on, and all know: they save what is good and end with its error."""
        failures = self._world.group.gather_values([str(failure), failure.status] if failure else None)
        found = [(rank, *what) for rank, what in enumerate(failures) if what]
        if not found:  # a save behind the steps met a state that is not finite, on all ranks
            self._manager.finish()
        rank, text, status = found[0]
        text = f"rank {rank} on {self._world.hosts[rank]}: {text}" if self._world.world_size > 1 else text
        if (step := self.progress.step) > self.progress.first_step:
            self._log.info(f"{text}; saving step {step} before the run ends")
            try:
                self._save_unsaved()
                text += f"; step {step} is saved, the same command goes on from there"
            except (MegallamaError, InternalError) as unsaved:
                text += f"; and step {step} could not be saved: {unsaved}"
        error = DataError(text)
        error.shared, error.status = True, status
        raise error from failure

    # ---- evaluations ----

    def _due(self) -> list[tuple[Kind, Source]]:
        """The evaluations that belong after the last step, and at the end of the run all."""
        step, interval, last = self.progress.step, self._config.train.eval_interval, self.setup.last_step
        due: list[tuple[Kind, Source]] = []
        if interval and step and (step % interval == 0 or step == last):
            due += [("valid", source) for source in self.setup.data.valid]
        return due + [("test", source) for source in self.setup.data.test if step == last]

    def _never_made(self) -> list[tuple[Kind, Source]]:
        """Those that belong after the step of the checkpoint and that no earlier start has made."""
        if not (self.progress.may_lack_evaluations and (due := self._due())):
            return []
        file, made = Path(self._config.run.folder) / "metrics.jsonl", []
        with suppress(OSError):
            records = read_metrics(file) if self._world.rank == 0 else ()
            made = [[r.get("kind"), r.get("name")] for r in records if r.get("step") == self.progress.step]
        made = self._world.group.gather_values(made)[0]
        return [(kind, source) for kind, source in due if [kind, source.name] not in made]

    def _evaluate(self, report: Reporter) -> str | None:
        """Make the evaluations that are missing; why all ranks stop, if asked for meanwhile."""
        if not self._missing:
            return None
        with self._timers.phase("evaluate"), self._world.patient(self._config.run.io_timeout_seconds):
            while self._missing:
                kind, source = self._missing[0]
                most = self._config.train.eval_batches if kind == "valid" else None
                try:
                    numbers, consensus = evaluate(self.setup.worker, source, most, self._status)
                except Interrupted as early:
                    if early.consensus.failed:
                        self._end_together(early.failure)
                    self._log.info(f"evaluation on {source.name} ended {early}: the next start makes it again")
                    return early.consensus.stop_reason
                report.evaluation(kind, source.name, numbers)
                del self._missing[0]
                if consensus.stop_reason:
                    return consensus.stop_reason
        return None
