"""What the run tells of its steps and evaluations, and at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megallama.config.words import counted
from megallama.data.ledger import TrainData
from megallama.optim.scaler import LossScaler
from megallama.plan.flops import training_flops
from megallama.plan.params import num_parameters
from megallama.plan.plan import Plan
from megallama.train.assemble import DTYPES
from megallama.train.health import BadSteps
from megallama.train.log import Logger, human_count
from megallama.train.metrics import Meter, MetricsWriter, peak_memory_bytes
from megallama.train.peak import peak_flops
from megallama.train.plot import plot_loss
from megallama.train.step import StepResult
from megallama.train.timers import Timers


@dataclass
class Counters:
    """How far the run is. Saved with every checkpoint."""

    step: int = 0  # batches used, skipped ones included
    updates: int = 0  # optimizer steps
    samples: int = 0  # sequences used
    tokens: int = 0  # tokens whose loss counted


class Reporter:
    """Turns what the trainer knows into lines, metrics and a plot."""

    def __init__(
        self,
        plan: Plan,
        device: torch.device,
        log: Logger,
        timers: Timers,
        train: TrainData | None,
        step: int,
    ) -> None:
        config = plan.config
        self._config = config
        self._device = device
        self._log = log
        self._timers = timers
        self._train = train
        self.tokens = 0  # since the last line
        peak = peak_flops(device, DTYPES[config.precision.dtype], config.run.peak_tflops)
        if peak is None:
            log.info("MFU is not shown: the peak of this device is not known; run.peak_tflops may give it")
        else:
            log.info(f"MFU is relative to {peak / 1e12:.3g} TFLOP/s per rank, counting causal attention")
        total = plan.batch.samples_after(config.train.steps) * config.batch.seq_length
        causal, full = (training_flops(config.model, config.batch.seq_length, causal=c) for c in (True, False))
        self._meter = Meter(plan.topology.world_size, causal, full, peak, total)
        self._timers.lap()
        self.writer = MetricsWriter(
            Path(config.run.folder),
            log,
            config.log,
            steps=config.train.steps,
            step=step,
            settings=config.model_dump(mode="json"),
        )

    def step(
        self,
        counters: Counters,
        result: StepResult,
        lr: float,
        bad: BadSteps,
        scaler: LossScaler,
        waited: float,
    ) -> None:
        """Tell of a step, and of those since the last that was told of; `waited` seconds for data so far."""
        seconds, phases = self._timers.lap()
        seconds -= phases.get("save", 0.0) + phases.get("evaluate", 0.0)  # speed is that of training
        metrics = self._meter.step(
            tokens=self.tokens,
            seconds=seconds,
            consumed_tokens=counters.tokens,
            step=counters.step,
            loss=result.loss,
            lr=lr,
            grad_norm=result.grad_norm,
            peak_memory_bytes=peak_memory_bytes(self._device),
            consumed_samples=counters.samples,
            skipped=not result.applied,
            skipped_steps=bad.skipped + (not result.applied),
            loss_scale=scaler.scale,
            data_wait_seconds=waited,
            sources=used_sources(self._train, counters.samples),
            phase_seconds=phases,
        )
        self.tokens = 0
        self.writer.train(metrics)

    def finished(self, counters: Counters) -> None:
        """All steps are done."""
        config = self._config
        self._log.info(
            f"finished: {counted(counters.step, 'step')}, {counted(human_count(counters.tokens), 'token')}, "
            f"{human_count(num_parameters(config.model))} parameters; checkpoint in {config.checkpoint.folder}"
        )
        if config.log.plot and self._log.rank == 0:
            folder = Path(config.run.folder)
            png, reason = plot_loss(folder / "metrics.jsonl", folder / "loss.png")
            self._log.info(f"loss curve: {png}" if png else f"no loss curve: {reason}")


def used_sources(train: TrainData | None, samples: int) -> Mapping[str, Mapping[str, float]]:
    """What the first `samples` samples took of each source; nothing is known of synthetic data."""
    return train.account(samples) if train else {}
