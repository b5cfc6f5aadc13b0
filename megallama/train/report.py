"""What the run tells of its steps and evaluations, and at its end."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megallama.config.words import counted
from megallama.data.ledger import TrainData
from megallama.plan.flops import training_flops
from megallama.plan.params import num_parameters
from megallama.plan.plan import Plan
from megallama.train.assemble import DTYPES
from megallama.train.log import Logger, human_count
from megallama.train.metrics import MetricsWriter, peak_memory_bytes
from megallama.train.peak import peak_flops
from megallama.train.plot import plot_loss
from megallama.train.timers import Timers


@dataclass
class Counters:
    """How far the run is. Saved with every checkpoint."""

    step: int = 0  # batches used, skipped ones included
    updates: int = 0  # optimizer steps
    samples: int = 0  # sequences used
    tokens: int = 0  # tokens whose loss counted


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
            self._laps.clear()  # the first step warms everything up: it says nothing about the others
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
    """Turns what the trainer knows into lines, metrics and a plot."""

    def __init__(
        self, plan: Plan, device: torch.device, log: Logger, timers: Timers, train: TrainData | None, step: int
    ) -> None:
        config = plan.config
        self._config, self._device, self._log, self._timers, self._train = config, device, log, timers, train
        self.tokens = 0  # since the last line
        peak = peak_flops(device, DTYPES[config.precision.dtype], config.run.peak_tflops)
        if peak is None:
            log.info("MFU is not shown: the peak of this device is not known; run.peak_tflops may give it")
        else:
            log.info(f"MFU is relative to {peak / 1e12:.3g} TFLOP/s per rank, counting causal attention")
        total = plan.batch.samples_after(config.train.steps) * config.batch.seq_length
        causal, full = (training_flops(config.model, config.batch.seq_length, causal=c) for c in (True, False))
        self._meter = Meter(plan.topology.world_size, causal, full, peak, total)
        timers.lap()
        folder, settings = Path(config.run.folder), config.model_dump(mode="json")
        self.writer = MetricsWriter(folder, log, config.log, steps=config.train.steps, step=step, settings=settings)

    def step(self, counters: Counters, **values: Any) -> None:
        """Tell of a step, and of those since the last that was told of; `values` are more of its numbers by name."""
        seconds, phases = self._timers.lap()
        seconds -= phases.get("save", 0.0) + phases.get("evaluate", 0.0)  # speed is that of training
        self.writer.write(
            {
                "kind": "train",
                "step": counters.step,
                **values,
                **self._meter.lap(self.tokens, seconds, counters.tokens),
                "peak_memory_bytes": peak_memory_bytes(self._device),
                "consumed_tokens": counters.tokens,
                "consumed_samples": counters.samples,
                "phase_seconds": phases,
                "sources": used_sources(self._train, counters.samples),
            }
        )
        self.tokens = 0

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
