"""What a rank looks at besides training: copies of the weights, and steps that stand out."""

from contextlib import suppress
from math import inf
from statistics import median, median_low

import torch

from megallama.config.errors import CorruptionError, InternalError, MegallamaError, counted
from megallama.optim.update import wrong_copies
from megallama.train.setup import Setup
from megallama.train.step import StepConsensus

WRONG, UNUSUAL = 20.0, 5.0  # times the median: of one rank's gradient; of all, to look at each
SAID = 8  # pieces of weights, samples


class Watch:
    """Looks at every step of one rank; what follows from it is the same on all ranks."""

    def __init__(self, setup: Setup) -> None:
        self._setup, self._config, self._progress = setup, setup.config, setup.progress
        self._found: dict[str, float] = {}  # what stands out in this step, with its typical value
        self.goes_back = False  # after this step, to the newest checkpoint

    def check_replicas(self) -> None:
        """Compare copies of weights where it is due. Raises: CorruptionError, on all ranks."""
        step, interval, worker = self._progress.step + 1, self._config.train.check_replicas, self._setup.worker
        if found := wrong_copies(worker.optimizer, worker.groups) if interval and step % interval == 0 else []:
            said = [f"{key} on {' or '.join(map(self._rank, ranks))}" for key, ranks in found]
            more = f"; and {counted(len(said) - SAID, 'more piece')}" if len(said) > SAID else ""
            raise CorruptionError(
                f"step {step}: weights have other bits than their masters or copies: {'; '.join(said[:SAID])}{more}. "
                "Memory or a link changed them; of this step nothing is applied or saved. Take that host out and "
                "start again: the same command goes on from the newest checkpoint"
            )

    def refuses(self, result: StepConsensus) -> bool:
        """Look at a finite step before its update; whether train.on_spike wants it left out."""
        train, manager = self._config.train, self._setup.manager
        self._found = self._progress.spikes.found(result.metrics)
        if self._found and train.on_spike == "rollback" and self._progress.rollbacks < train.max_rollbacks:
            with suppress(MegallamaError, InternalError):  # of a save; it was told
                manager.finish()
            self.goes_back = manager.saved_step is not None
        return self.goes_back or (train.on_spike == "skip" and "grad_norm" in self._found)

    def step(self, result: StepConsensus, samples: range, *, overflow: bool) -> None:
        """Say what stood out of a step, its samples, and whose gradient was wrong."""
        spikes, found, values = self._progress.spikes, self._found, result.metrics
        self._found, norms = {}, spikes.windows["grad_norm"]
        if found or not (result.finite or overflow) or (norms and result.grad_norm > UNUSUAL * median(norms)):
            self._compare_gradients()
        for name, typical in found.items():
            then = "" if result.applied else "; its update is left out"
            self._warn(f"{name} {values[name]:.4g} stands out, typically {typical:.4g}{then}")
        if found:
            self._say_samples(samples)
        if result.finite and spikes.seen(values, found):
            self._warn(f"{spikes.MOST} steps in a row stood out: the statistics begin again")
        if result.applied and (text := self._progress.high_loss.seen(result.loss)):
            self._warn(text)

    def _compare_gradients(self) -> None:
        own = [norm for sync in self._setup.worker.optimizer.syncs for norm in sync.norms]
        norm = float(torch.stack(own).norm()) if own else 0.0
        norms = self._setup.world.group.gather_values(norm if norm < inf else inf)
        for ranks in self._setup.plan.topology.groups("dp", "cp"):
            typical = median_low(norms[rank] for rank in ranks)  # of two the smaller
            for rank in (rank for rank in ranks if norms[rank] > WRONG * typical > 0):
                here = f"norm {norms[rank]:.4g} before the reduction, those of the same weights {typical:.4g}"
                self._warn(f"the gradient of {self._rank(rank)} had {here}; if that host does it again, take it out")

    def _say_samples(self, samples: range) -> None:
        """The first aloud, with source and documents; in each rank's file its own."""
        setup, log, dp = self._setup, self._setup.log, self._setup.worker.groups.dp
        own = [i for ids in self._config.batch.sample_ids(samples.start, len(samples), dp.size, dp.rank) for i in ids]
        for say, what, ids in ((log.info, "begins with", samples[:SAID]), (log.note, "has on this rank", own)):
            said = ", ".join(f"{i} ({text})" for i, text in zip(ids, setup.data.train.documents(ids), strict=True))
            say(f"step {self._progress.step} {what} the samples {said}")

    def _warn(self, text: str) -> None:
        self._setup.log.info(f"warning: step {self._progress.step}: {text}")

    def _rank(self, rank: int) -> str:
        return f"rank {rank} ({self._setup.world.hosts[rank]})"
