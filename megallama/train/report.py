"""What the run tells of its steps and evaluations, and at its end."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Self

from megallama.config.errors import counted
from megallama.optim.lr import learning_rate
from megallama.plan.params import num_parameters
from megallama.plan.work import training_flops
from megallama.train.assemble import DTYPES
from megallama.train.log import human_count
from megallama.train.metrics import MetricsWriter, Record, peak_memory_bytes
from megallama.train.peak import peak_flops
from megallama.train.plot import plot_loss
from megallama.train.setup import Setup
from megallama.train.step import StepConsensus
from megallama.train.timers import Timers


class Meter:
    """Turns (tokens, seconds) into rates, utilisation and the time left.

    `flops_causal` and `flops_full` are model FLOPs per token, forward and backward, without any
    recomputation, counting the attention that a causal mask leaves, or the whole square, as most published figures do.
    """

    def __init__(
        self, ranks: int, flops_causal: float, flops_full: float, peak_flops: float | None, total_tokens: int
    ) -> None:
        self._ranks, self._total_tokens = ranks, total_tokens
        self._flops, self._peak = (flops_causal, flops_full), peak_flops  # the peak is one rank's
        self._laps: deque[tuple[int, float]] = deque(maxlen=20)
        self._only_first: bool | None = None  # None before the first step

    def lap(self, tokens: int, seconds: float, consumed_tokens: int) -> dict[str, float | None]:
        """Of `tokens` tokens of all ranks in `seconds`."""
        if self._only_first:
            self._laps.clear()  # the first step warms everything up: it tells nothing
        self._only_first = self._only_first is None
        self._laps.append((tokens, seconds))
        rate = tokens / seconds
        causal, full = (flops * rate / self._ranks / self._peak if self._peak else None for flops in self._flops)
        recent = sum(n for n, _ in self._laps) / sum(s for _, s in self._laps)
        return {
            "tokens": tokens,
            "step_seconds": seconds,
            "tokens_per_second": rate,
            "tokens_per_second_per_rank": rate / self._ranks,
            "mfu_causal": causal,
            "mfu_full": full,
            "eta_seconds": max(0, self._total_tokens - consumed_tokens) / recent,
        }


class Reporter:
    """Turns what the loop knows into lines, metrics and a plot. A context manager."""

    def __init__(self, setup: Setup, timers: Timers) -> None:
        self._setup, self._progress, self._timers = setup, setup.progress, timers
        self.tokens = 0  # since the last line
        config, plan, log = setup.config, setup.plan, setup.log
        peak = peak_flops(setup.world.device, DTYPES[config.precision.dtype], config.run.peak_tflops)
        if peak is None:
            log.info("MFU is not shown: the peak of this device is not known; run.peak_tflops may give it")
        else:
            log.info(f"MFU is relative to {peak / 1e12:.3g} TFLOP/s per rank, counting causal attention")
        total = config.batch.samples_after(config.train.steps) * config.batch.seq_length
        causal, full = (training_flops(config.model, config.batch.seq_length, causal=c) for c in (True, False))
        self._meter = Meter(plan.topology.world_size, causal, full, peak, total)
        timers.lap()
        self._writer = MetricsWriter(config, log, self._progress.step)

    def step(self, result: StepConsensus, waited: float) -> None:
        """Tell of the steps since the last that was told of; `waited` seconds for data so far."""
        seconds, phases = self._timers.lap()
        seconds -= phases.get("save", 0.0) + phases.get("evaluate", 0.0)  # speed is that of training
        progress, config = self._progress, self._setup.config
        record = {
            "kind": "train",
            "step": progress.step,
            **result.metrics,
            "lr": learning_rate(progress.step - 1, config.optimizer, config.lr_schedule),
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
        self.tokens = 0
        self._writer.write(record)

    def evaluation(self, kind: str, name: str, numbers: Record) -> None:
        """Tell of an evaluation after the last step."""
        at = {"kind": kind, "name": name, "step": self._progress.step, "consumed_tokens": self._progress.tokens}
        self._writer.write(at | numbers)

    def finished(self) -> None:
        """All steps are done."""
        config, log, progress = self._setup.config, self._setup.log, self._progress
        log.info(
            f"finished: {counted(progress.step, 'step')}, {counted(human_count(progress.tokens), 'token')}, "
            f"{human_count(num_parameters(config.model))} parameters; checkpoint in {config.checkpoint.folder}"
        )
        if config.log.plot and log.rank == 0:
            folder = Path(config.run.folder)
            png, reason = plot_loss(folder / "metrics.jsonl", folder / "loss.png")
            log.info(f"loss curve: {png}" if png else f"no loss curve: {reason}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.close()
