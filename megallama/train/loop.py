"""Step after step, to the end, a signal or a fault: training, evaluating, saving, stopping."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from megallama.comm.flight_record import BUDDY, COPIED, EXCESS, SLOWEST
from megallama.config.errors import DataError, InternalError, MegallamaError, counted
from megallama.data.loader import Loader
from megallama.data.samples import Source
from megallama.optim.lr import learning_rate
from megallama.plan.params import num_parameters
from megallama.plan.work import training_flops
from megallama.train.assemble import DTYPES
from megallama.train.continued import next_phase
from megallama.train.log import human_count
from megallama.train.metrics import MetricsWriter, Record, plot_loss, read_metrics
from megallama.train.setup import Setup, go_back
from megallama.train.signals import FINISHED, SAVED
from megallama.train.speed import Meter, Timers, peak_flops, peak_memory_bytes
from megallama.train.step import RankStatus, StepConsensus, Task, evaluate, evaluate_task, train_step
from megallama.train.watch import Watch


@contextmanager
def gc_schedule(interval: int) -> Iterator[Callable[[int], object]]:
    """Within, only calls with a step that `interval` divides collect garbage; 0: Python does."""
    if not interval:
        yield lambda step: None
        return
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()  # what existed before the first step is not looked at again
    gc.disable()  # Python collects at another moment on every rank, while the others wait
    try:
        yield lambda step: None if step % interval else gc.collect()
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


class Reporter:
    """Turns what the loop knows into lines, metrics and a plot."""

    def __init__(self, setup: Setup, timers: Timers) -> None:
        self._setup, self._progress, self._timers = setup, setup.progress, timers
        self.tokens = 0  # since the last line
        config, plan, log = setup.config, setup.plan, setup.log
        peak = peak_flops(setup.world.device, DTYPES[config.precision.dtype], config.run.peak_tflops)
        if peak is None:
            log.info("MFU is not shown: the peak of this device is not known; run.peak_tflops may give it")
        else:
            log.info(f"MFU is relative to {peak / 1e12:.3g} TFLOP/s per rank, counting causal attention")
        behind = self._progress.step, self._progress.samples, self._progress.tokens_read
        total = self._progress.tokens + replace(plan, behind=behind).tokens
        causal, full = (training_flops(config.model, config.batch.seq_length, causal=c) for c in (True, False))
        self._meter = Meter(plan.topology.world_size, (causal, full), peak, total)
        timers.lap()
        self.open()

    def open(self) -> None:
        """Write from the present step on: at the start, and after going back."""
        writer = MetricsWriter(self._setup.config, self._setup.log, self._progress.step)
        self.write, self.close, self.catch_up = writer.write, writer.close, writer.catch_up

    def step(self, result: StepConsensus, waited: float) -> None:
        """Tell of the steps since the last time; `waited` seconds for data so far."""
        seconds, phases = self._timers.lap()
        seconds -= phases.get("save", 0.0) + phases.get("evaluate", 0.0)  # speed is that of training
        progress = self._progress
        record: Record = {
            "kind": "train",
            "step": progress.step,
            **result.metrics,
            "lr": progress.lr,
            **self._meter.lap(self.tokens, seconds, progress.tokens),
            "peak_memory_bytes": peak_memory_bytes(self._setup.world.device),
            "consumed_tokens": progress.tokens,
            "consumed_samples": progress.samples,
            "skipped": not result.applied,
            "skipped_steps": progress.guard.skipped + (not result.applied),
            "loss_scale": progress.scaler.scale,
            "data_wait_seconds": waited,
            "phase_seconds": phases,
            "sources": self._setup.used(),
        }
        words = self._setup.world.record.words
        if words[SLOWEST]:  # by own work, and its time over that of its peers
            record |= {"slowest_rank": words[SLOWEST] - 1, "slowest_excess": words[EXCESS] / 1e6}
        self.tokens = 0
        self.write(record)

    def finished(self) -> None:
        config, log, progress = self._setup.config, self._setup.log, self._progress
        self._setup.world.record.at(step=progress.step)  # a start may have had none to make
        log.info(
            f"finished: {counted(progress.step, 'step')}, {counted(human_count(progress.tokens), 'token')}, "
            f"{human_count(num_parameters(config.model))} parameters; checkpoint in {config.checkpoint.folder}"
        )
        if config.log.plot and log.rank == 0:
            folder = Path(config.run.folder)
            png, reason = plot_loss(folder / "metrics.jsonl", folder / "loss.png")
            log.info(f"loss curve: {png}" if png else f"no loss curve: {reason}")


class TrainingLoop:
    """The steps of one rank."""

    def __init__(self, setup: Setup) -> None:
        self.progress, self._timers = setup.progress, Timers(record=setup.world.record)
        self._world, self._log, self._manager = setup.world, setup.log, setup.manager
        self._use(setup)
        self._missing: list[tuple[str, Source | Task]] = []  # kind, source: evaluations of the last step
        self._overflow = False  # of the loss scale, in the last step
        self._save_owed = False  # a save that was due while the steps were bad

    def _use(self, setup: Setup) -> None:
        self.setup, self._config, self._watch = setup, setup.config, Watch(setup)

    def run(self) -> int:
        """Train until `train.steps` or until something asks to stop; the exit status."""
        if self._leaves_at_once():
            return SAVED
        with gc_schedule(self._config.train.gc_interval) as collect_garbage:
            self._missing, goes_on = self._never_made(), True
            while goes_on:  # to the end of the run, or of its phase
                config, progress = self._config, self.progress
                with closing(Reporter(self.setup, self._timers)) as report, ExitStack() as loaders:
                    self._catch_up = report.catch_up
                    loader = loaders.enter_context(self._loader())
                    stopped = self._evaluate(report)
                    while progress.step < self.setup.last_step and stopped is None:
                        result = self._one_step(loader)
                        if self._watch.goes_back:
                            loader.close()
                            report.close()
                            self.setup, self._watch.goes_back = go_back(self.setup), False
                            report.open()
                            loader = loaders.enter_context(self._loader())
                            continue
                        report.tokens += result.tokens
                        self._world.bound(config.run.timeout_seconds)
                        most, made = config.train.stop_after_steps, progress.step - progress.first_step
                        enough = f"train.stop_after_steps={most} is reached"
                        stopped = result.stop_reason or (enough if most is not None and made >= most else None)
                        last = progress.step == self.setup.last_step
                        if progress.step % config.log.interval == 0 or last or stopped or not result.applied:
                            report.step(result, loader.wait_seconds)
                        else:  # with all bits, for `megallama replay`
                            numbers = f"loss {result.loss!r}, grad norm {result.grad_norm!r}"
                            self._log.note(f"step {progress.step}: {numbers}")
                        if result.applied:
                            self._manager.starts.over()
                        self._record_health(result)
                        self._missing = self._due()
                        self._save_if_due(leaving=last or stopped is not None)
                        self._copy_if_due(report)
                        stopped = stopped or self._evaluate(report)
                        collect_garbage(progress.step)
                goes_on = self.setup.goes_on and stopped is None
                if goes_on:
                    self._use(next_phase(self.setup))
            return self._leave(report, stopped)

    def _leaves_at_once(self) -> bool:
        """Whether a rank was asked to stop while setting up; a step's consensus tells from here on."""
        signals, group = self.setup.signals, self._world.group
        for rank, name in enumerate(group.gather_values(signals.last_call())):
            if name:
                signals.leave(f"{name} on rank {rank}")
                return True
        self._world.record.at(phase="between steps")
        signals.phase = "training"
        return False

    def _leave(self, report: Reporter, stopped: str | None) -> int:
        """Save what is not saved, and say how to go on; the exit status."""
        self.setup.worker.optimizer.wait()  # another rank may still receive its weights
        self._save_unsaved()
        self.setup.tracer.write()
        more = self.progress.step < self.setup.last_step or self.setup.goes_on
        unfinished = more or len(self._missing) > 0
        self.setup.signals.leaving(SAVED if unfinished else FINISHED)
        if unfinished:
            then = "continue" if more else "make the evaluations that are missing"
            again = f"start the same command again to {then}"
            if self._world.record.told("verdict"):  # the supervisors have asked
                again = "all ranks start again"
            self._log.info(f"stopped: {stopped}; saved at step {self.progress.step}, {again}")
            return SAVED
        report.finished()
        return FINISHED

    def _one_step(self, loader: Loader) -> StepConsensus:
        config, progress, plan = self._config, self.progress, self.setup.plan
        size, record = config.batch.size_after(progress.samples), self._world.record
        deal = config.batch.deal(size, plan.topology.dp)
        record.at(step=progress.step + 1)
        with self._timers.phase("data"):
            batches, failure = loader.next_or_zeros(deal[self.setup.worker.groups.dp.rank], config)
        lr = progress.lr = learning_rate(progress.step, config.optimizer, config.lr_schedule, progress.begun)
        schedule, masked = plan.schedule_for(len(batches)), config.data.document_mask
        failed = failure is not None or self._manager.not_finite
        scale, worker, watch = progress.scaler.scale, self.setup.worker, self._watch

        def status() -> RankStatus:
            watch.check_replicas()
            return self._status(failed)

        record.work_begins()
        with self.setup.tracer.step(worker.runtime, progress.step + 1, schedule):
            result = train_step(worker, schedule, batches, lr, scale, self._timers, masked, status, watch.refuses, deal)
        record.work_done()
        if result.failed:
            self._end_together(failure)
        progress.samples += size
        progress.tokens_read += size * config.batch.seq_length
        progress.step += 1
        progress.updates += result.applied
        progress.tokens += result.tokens
        self._overflow = progress.scaler.update(result.finite)
        if self._overflow:
            self._log.info(f"step {progress.step}: overflow; loss scale now {progress.scaler.scale:g}")
        watch.step(result, range(progress.samples - size, progress.samples), overflow=self._overflow)
        return result

    def _status(self, failed: bool) -> RankStatus:
        minutes = self._config.train.stop_after_minutes
        late = minutes is not None and time.monotonic() - self.progress.started >= 60 * minutes
        return RankStatus(self.setup.signals.received, late, failed)

    def _loader(self) -> Loader:
        config, batch, dp = self._config, self._config.batch, self.setup.worker.groups.dp
        firsts = {self.progress.step: self.progress.samples}  # step -> first sample: batches may grow

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
            share=self.setup.worker.share,
        )

    def _record_health(self, result: StepConsensus) -> None:
        """Count the step. Raises: TrainingStopped after too many bad ones."""
        guard, step, good = self.progress.guard, self.progress.step, None
        if not (result.finite or self._overflow) and guard.in_a_row + 1 >= guard.max_bad_steps:
            self._manager.wait(self._config.checkpoint.finish_seconds)
            with suppress(OSError):
                good = self._manager.newest_step(guard.last_good or 0) if self._world.rank == 0 else None
            good = self._world.group.gather_values(good)[0]
        guard.record(step, result.finite, overflow=self._overflow, checkpoint=good)
        guard.skipped += result.finite and not result.applied
        self._manager.keep_all = guard.in_a_row > 0

    def _save_if_due(self, leaving: bool) -> None:
        """Save when it is time; while steps are bad nobody knows since when the state is."""
        interval, step = self._config.checkpoint.interval, self.progress.step
        self._save_owed |= interval > 0 and step % interval == 0
        if leaving or (self._save_owed and not self.progress.guard.in_a_row):
            self._save_owed = False
            self._save(leaving)
        elif self._save_owed and step % interval == 0:
            self._log.info(f"step {step} is not saved before a step is good again; nothing is deleted meanwhile")

    def _save(self, leaving: bool) -> None:
        shards = self.setup.worker.optimizer.shards(owned_only=True)
        with self._timers.phase("save"), self._world.patient(self._config.run.io_timeout_seconds):
            self._catch_up(1.0)
            self._manager.save(self.progress.step, shards, self._counters(), behind=not leaving)
        self.setup.tell_sources()

    def _counters(self) -> dict[str, Any]:
        """What a checkpoint has beside tensors."""
        progress, train = self.progress, self.setup.train_data
        counters = progress.state_dict(evaluated=progress.step - bool(self._missing))
        counters |= train.state(progress.samples) if train else {}
        return counters | {"computes_with": self.setup.computes_with, "kernels": {**self.setup.named}}

    def _copy_if_due(self, report: Reporter) -> None:
        """Into memory that outlives this process."""
        copies, interval, words = self.setup.copies, self._config.checkpoint.memory_interval, self._world.record.words
        if copies is None or self.progress.step % interval or self.progress.guard.in_a_row:
            return
        with self._timers.phase("save"):
            if copies.ends:  # all have the last copy when the one before it is overwritten
                until = time.monotonic() + self._config.run.timeout_seconds / 2  # a host may be gone
                while late := words[BUDDY] >= 0 and words[COPIED] not in (0, words[BUDDY]):
                    if time.monotonic() > until:
                        break
                    time.sleep(0.001)
                if any(self._world.group.gather_values(late)):
                    self._log.info(f"step {self.progress.step} is not copied: the copy before it is not there yet")
                    return
            report.catch_up(1.0)
            counters, manager = self._counters() | {"lineage": self._manager.lineage}, self._manager
            copies.keep(self.progress.step, counters, [manager.saved_step, manager.begun])
            words[COPIED] = self.progress.step + 1

    def _save_unsaved(self) -> None:
        """All ranks are between two steps: what is not on disk goes there."""
        with suppress(MegallamaError, InternalError):  # it was told, and is made good here
            self._manager.finish()
        if self._manager.saved_step != self.progress.step > 0:
            self._save(leaving=True)

    def _end_together(self, failure: MegallamaError | None) -> NoReturn:
        """Some rank cannot go on, and all know: they save what is good, and raise its error."""
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

    def _due(self) -> list[tuple[str, Source | Task]]:
        """The evaluations that belong after the last step, and at the end of the run all."""
        step, own, setup = self.progress.step, self._config.eval, self.setup
        last = step == setup.last_step  # of the phase, which ends with a validation, or of the run
        end, rows = last and not setup.goes_on, list[tuple[str, Sequence[Source | Task], int, bool]]()
        rows += [("valid", setup.data.valid, own.interval, last and own.interval > 0)]
        rows += [("task", setup.tasks, own.tasks_interval, end), ("test", setup.data.test, 0, end)]
        due = [(kind, some) for kind, some, n, now in rows if step and (now or n and step % n == 0)]
        return [(kind, one) for kind, some in due for one in some]

    def _never_made(self) -> list[tuple[str, Source | Task]]:
        """Those due after the checkpoint's step that no earlier start has made."""
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
        self._world.record.at(step=self.progress.step)  # a start may make nothing else
        own, worker, until = self._config.eval, self.setup.worker, None
        with self._timers.phase("evaluate"), self._world.patient(self._config.run.io_timeout_seconds):
            while self._missing:
                kind, source = self._missing[0]
                if isinstance(source, Task):
                    until = until or time.monotonic() + own.max_seconds
                    numbers, known, failure = evaluate_task(worker, source, until, self._status)
                else:
                    most = own.batches if kind == "valid" else None
                    numbers, known, failure = evaluate(worker, source, most, self._status)
                if known.failed:
                    self._end_together(failure)
                if isinstance(numbers, str):
                    self._log.info(f"evaluation on {source.name} ended {numbers}: the next start makes it again")
                    return known.stop_reason
                at = {"step": self.progress.step, "consumed_tokens": self.progress.tokens}
                report.write({"kind": kind, "name": source.name, **at, **numbers})
                del self._missing[0]
                if known.stop_reason:
                    return known.stop_reason
        return None
