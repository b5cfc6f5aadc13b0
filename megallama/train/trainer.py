"""The training run: build the parts, resume, then step after step until the end, a signal or a fault.

Only this file knows all rooms.  Whatever can fail on one rank alone while the run is set up is agreed
on by all ranks, so that a fault ends the run with its message instead of leaving others waiting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from megallama.checkpoint.errors import agree
from megallama.checkpoint.manager import CheckpointManager
from megallama.comm.launch import World
from megallama.comm.recording import Tape
from megallama.config.schema import Config
from megallama.data.ledger import TrainData
from megallama.data.loader import Loader
from megallama.data.sources import Data, open_sources
from megallama.kernels.select import Kernels
from megallama.optim.lr import learning_rate
from megallama.optim.scaler import LossScaler
from megallama.plan.flops import training_flops
from megallama.plan.params import num_parameters
from megallama.plan.plan import Plan
from megallama.train.assemble import DTYPES, Rank, assemble, initialize, kernels_of, same_kernels
from megallama.train.collect import Collector
from megallama.train.determinism import set_deterministic
from megallama.train.evaluate import evaluate
from megallama.train.health import BadSteps, SignalFlag
from megallama.train.log import Logger, human_count
from megallama.train.metrics import Meter, MetricsWriter, peak_memory_bytes
from megallama.train.peak import peak_flops
from megallama.train.plot import plot_loss
from megallama.train.step import StepResult, train_step
from megallama.train.timers import Timers
from megallama.train.trace import StepTracer, timed

FINISHED = 0  # exit status: all steps are done
SAVED = 75  # exit status: saved after a signal or a stop that was asked for; the same command continues

T = TypeVar("T")


@dataclass
class Counters:
    """How far the run is. Saved with every checkpoint."""

    step: int = 0  # batches used, skipped ones included
    updates: int = 0  # optimizer steps
    samples: int = 0  # sequences used
    tokens: int = 0  # tokens whose loss counted


class Trainer:
    """One rank of a training run."""

    def __init__(self, config: Config, plan: Plan, world: World, log: Logger) -> None:
        self._config = config
        self._plan = plan
        self._world = world
        self._log = log
        self._counters = Counters()
        self._scaler = LossScaler(config.precision)
        self._bad = BadSteps(config.train.max_bad_steps)
        self._timers = Timers()
        self._tape = Tape()
        self._started = time.monotonic()
        set_deterministic(config.train.deterministic)

    def run(self) -> int:
        """Train until `train.steps` or until something asks to stop; the exit status."""
        with SignalFlag() as signals:
            self._signals = signals
            kernels = self._describe()
            self._data = self._agreed("data", self._open_data)
            self._manager = self._checkpoints()
            self._manager.acquire()
            try:
                self._rank = self._agreed("model", lambda: self._build(kernels))
                self._restore()
                with Collector(self._config.train.gc_interval) as self._collector:
                    return self._loop()
            finally:
                self._manager.release()

    # ---- setting up ----

    def _agreed(self, what: str, work: Callable[[], T]) -> T:
        """Run `work` on every rank; if it fails anywhere, it has failed everywhere."""
        kept: list[T] = []
        agree(self._world.group, what, lambda: kept.append(work()))
        return kept[0]

    def _describe(self) -> Kernels:
        config = self._config
        kernels = self._agreed("kernels", lambda: kernels_of(config, self._world.device))
        same_kernels(self._world.group.gather_values([(c.operation, c.selected) for c in kernels.choices]))
        for line in str(self._plan).splitlines():
            self._log.info(line)
        for text in [*self._world.notes, *(f"kernel for {choice}" for choice in kernels.choices)]:
            self._log.info(text)
        return kernels

    def _open_data(self) -> Data:
        return open_sources(self._config)

    def _checkpoints(self) -> CheckpointManager:
        folder = self._config.checkpoint.folder
        assert folder is not None, "filled in when a configuration is loaded"
        tokenizer = self._data.tokenizer
        return CheckpointManager(
            self._config,
            Path(folder),
            self._world.rank,
            self._world.host_group("checkpoint"),
            tokenizer.path if tokenizer else None,
            self._log.info,
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
            at = f"step {self._counters.step}, {human_count(self._counters.tokens)} tokens"
            self._log.info(f"resumed after {at}")
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

    def _find_last_step(self) -> tuple[int, str]:
        steps = self._config.train.steps
        return self._train_data.last_step(steps) if self._train_data else (steps, "")

    # ---- state ----

    def _save_counters(self) -> dict[str, Any]:
        return {
            **asdict(self._counters),
            "scaler": self._scaler.state_dict(),
            "bad_steps": self._bad.state_dict(),
            **(self._train_data.state(self._counters.samples) if self._train_data else {}),
        }

    def _load_counters(self, saved: dict[str, Any]) -> None:
        self._counters = Counters(**{name: saved[name] for name in ("step", "updates", "samples", "tokens")})
        self._scaler.load_state_dict(saved["scaler"])
        self._bad.load_state_dict(saved["bad_steps"])

    def _save(self, leaving: bool) -> None:
        shards = self._rank.optimizer.shards(owned_only=True)
        with self._timers.phase("save"):
            self._manager.save(self._counters.step, shards, self._save_counters(), behind=not leaving)
        self._tell_sources()

    # ---- the loop ----

    def _loop(self) -> int:
        config, counters = self._config, self._counters
        folder = Path(config.run.folder) / "trace"
        self._tracer = StepTracer(self._rank, config.log.trace_steps, folder, self._log, self._tape)
        writer = self._writer()
        loader = self._loader()
        stopped: str | None = None
        try:
            while counters.step < self._last_step and stopped is None:
                result = self._one_step(loader)
                stopped = result.stop_reason or self._asked_to_stop()
                last = counters.step == self._last_step
                if counters.step % config.log.interval == 0 or last or stopped or not result.applied:
                    self._report(writer, result, loader)
                if not (result.applied or self._excused):
                    self._manager.finish()  # a run that ends here keeps, and names, the save under way
                saved = self._manager.saved_step
                self._bad.record(counters.step, result.applied, excused=self._excused, checkpoint=saved)
                interval = config.train.eval_interval
                if interval and (counters.step % interval == 0 or last):
                    self._evaluate(writer, "valid")
                if last:
                    self._evaluate(writer, "test")
                if last or stopped or (config.checkpoint.interval and counters.step % config.checkpoint.interval == 0):
                    self._save(leaving=last or stopped is not None)
                self._collector.step(counters.step)
            self._rank.optimizer.wait()  # no rank leaves while another one still receives its weights
            self._tracer.write()
            self._manager.finish()
        finally:
            loader.close()
            writer.close()
        if counters.step < self._last_step:
            self._log.info(
                f"stopped: {stopped}; saved at step {counters.step}, start the same command again to continue"
            )
            return SAVED
        self._finished()
        return FINISHED

    def _one_step(self, loader: Loader) -> StepResult:
        config, counters = self._config, self._counters
        with self._timers.phase("data"):
            batches = loader.next()
        lr = learning_rate(counters.step, config.optimizer, config.lr_schedule)
        minutes = config.train.stop_after_minutes
        late = minutes is not None and time.monotonic() - self._started >= 60 * minutes
        schedule = self._plan.schedule_for(len(batches))
        received, masked = self._signals.received, config.data.document_mask
        with self._tracer.step(counters.step + 1, schedule):
            result = train_step(
                self._rank, schedule, batches, lr, self._scaler.scale, self._timers, received, late, masked
            )
        counters.samples += self._plan.batch.global_batch(counters.samples)
        counters.step += 1
        counters.updates += result.applied
        counters.tokens += result.tokens
        self._excused = self._scaler.update(result.applied)
        if self._excused:
            self._log.info(f"step {counters.step}: overflow; loss scale now {self._scaler.scale:g}")
        self._last_lr = lr
        self._interval_tokens += result.tokens
        return result

    def _asked_to_stop(self) -> str | None:
        steps = self._config.train.stop_after_steps
        if steps is not None and self._counters.step - self._first_step >= steps:
            return f"train.stop_after_steps={steps} steps are done"
        return None

    def _loader(self) -> Loader:
        config, batch, dp = self._config, self._plan.batch, self._rank.groups.dp
        self._first_step = self._counters.step
        self._interval_tokens = 0
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

    # ---- telling ----

    def _writer(self) -> MetricsWriter:
        config, counters = self._config, self._counters
        peak, origin = peak_flops(self._world.device, DTYPES[config.precision.dtype], config.run.peak_tflops)
        self._log.info(f"MFU is relative to {peak / 1e12:.3g} TFLOP/s per rank ({origin})")
        total = self._plan.batch.samples_after(config.train.steps) * config.batch.seq_length
        causal, full = (training_flops(config.model, config.batch.seq_length, causal=c) for c in (True, False))
        self._meter = Meter(self._world.world_size, causal, full, peak, total)
        self._timers.lap()
        return MetricsWriter(
            Path(config.run.folder),
            self._log,
            config.log,
            steps=config.train.steps,
            step=counters.step,
            settings=config.model_dump(mode="json"),
        )

    def _report(self, writer: MetricsWriter, result: StepResult, loader: Loader) -> None:
        counters = self._counters
        seconds, phases = self._timers.lap()
        seconds -= phases.get("save", 0.0) + phases.get("evaluate", 0.0)  # speed is that of training
        metrics = self._meter.step(
            tokens=self._interval_tokens,
            seconds=seconds,
            consumed_tokens=counters.tokens,
            step=counters.step,
            loss=result.loss,
            lr=self._last_lr,
            grad_norm=result.grad_norm,
            peak_memory_bytes=peak_memory_bytes(self._world.device),
            consumed_samples=counters.samples,
            skipped=not result.applied,
            skipped_steps=self._bad.skipped + (not result.applied),
            loss_scale=self._scaler.scale,
            data_wait_seconds=loader.wait_seconds,
            sources=self._sources(),
            phase_seconds=phases,
        )
        self._interval_tokens = 0
        writer.train(metrics)

    def _evaluate(self, writer: MetricsWriter, kind: Literal["valid", "test"]) -> None:
        """The loss on each validation source, on part of it, or on each test source, on all of it."""
        most = self._config.train.eval_batches if kind == "valid" else None
        with self._timers.phase("evaluate"):
            for source in self._data.valid if kind == "valid" else self._data.test:
                metrics = evaluate(self._rank, source, self._counters.step, self._counters.tokens, most)
                writer.valid(replace(metrics, kind=kind))

    def _tell_sources(self) -> None:
        for name, used in self._sources().items():
            tokens = human_count(used["tokens"])
            self._log.info(f"data source {name}: {used['epochs']:.4f} epochs, {tokens} tokens used")

    def _sources(self) -> dict[str, dict[str, float]]:
        return self._train_data.account(self._counters.samples) if self._train_data else {}

    def _finished(self) -> None:
        config = self._config
        self._log.info(
            f"finished: {self._counters.step} steps, {human_count(self._counters.tokens)} tokens, "
            f"{human_count(num_parameters(config.model))} parameters; checkpoint in {config.checkpoint.folder}"
        )
        if config.log.plot and self._world.rank == 0:
            folder = Path(config.run.folder)
            png, reason = plot_loss(folder / "metrics.jsonl", folder / "loss.png")
            self._log.info(f"loss curve: {png}" if png else f"no loss curve: {reason}")
