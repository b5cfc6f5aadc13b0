"""What a run takes from each source: reported, kept in every checkpoint, held against the configuration on resuming.

The order of the samples is a function of the files, the seed, the sample length and the weights of every step so far.
A checkpoint records them all; a run that would go on with others is refused with what to write instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from megallama.config.describe import literal
from megallama.config.errors import counted
from megallama.config.schema import BatchConfig, DataConfig
from megallama.data.errors import DataError
from megallama.data.mixture import Mixture, Phase, limits_of, phases_of
from megallama.data.samples import Samples, Source

ANEW = "begin another run from these weights with checkpoint.weights_from and a new run.folder"


class TrainDataset:
    """The training sources, read in the order of their mixture, and what was consumed."""

    def __init__(self, config: DataConfig, sources: Sequence[Source], batch: BatchConfig) -> None:
        self.sources, self._config, self._batch = tuple(sources), config, batch
        self._identities = [source.identity() for source in sources]
        self._order = {"batch.seq_length": sources[0].seq_length, "train.seed": sources[0].seed}
        self._done = self._consumed = 0
        self.mixture = Mixture([s.label for s in config.train], phases_of(config, batch.samples_after))

    def read(self, ids: Sequence[int]) -> Samples:
        """The samples with these numbers."""
        located, indices = self.mixture.locate(np.asarray(ids, np.int64))
        parts = [self.sources[number].read(indices[located == number]) for number in sorted(set(located.tolist()))]
        row = np.argsort(np.argsort(located, kind="stable"))  # of each sample in the parts, one after the other
        starts = [part.starts for part in parts if part.starts is not None]
        tokens = np.concatenate([part.tokens for part in parts])
        return Samples(tokens[row], np.concatenate(starts)[row] if starts else None)

    def consumption(self, samples: int) -> dict[str, dict[str, float]]:
        """What the first `samples` samples took: source name -> {"samples", "tokens", "epochs"}."""
        counts = self.mixture.counts(samples)
        return {
            name: {"samples": n, "tokens": n * source.seq_length, "epochs": n / source.num_sequences}
            for name, source, n in zip(self.mixture.names, self.sources, counts, strict=True)
        }

    def last_step(self, steps: int) -> tuple[int, str]:
        """(the last of `steps` steps in which no source passes its max_epochs, why it is the last or "").

        Raises: DataError if that is not all of them and data.on_exhausted is "error", or it is none.
        """
        limits = limits_of(self._config.train, [source.num_sequences for source in self.sources])
        past = self.mixture.first_step_past(limits, steps, self._samples_after)
        if past is None:
            return steps, ""
        counts = self.mixture.counts(self._samples_after(past))
        which = next(i for i, limit in enumerate(limits) if limit is not None and counts[i] > limit)
        source, epochs = self._config.train[which], counts[which] / self.sources[which].num_sequences
        why = (
            f"step {past} would take source {literal(source.label)} to {counted(f'{epochs:.4g}', 'epoch')}, "
            f"over max_epochs={source.max_epochs:g}"
        )
        if self._config.on_exhausted == "error" or past == 1:
            total = self.mixture.counts(self._samples_after(steps))[which] / self.sources[which].num_sequences
            fewer = f'train.steps={past - 1}, data.on_exhausted="stop", ' if past > 1 else ""
            raise DataError(
                f"{why} (all of train.steps={steps}: {total:.4g}); use {fewer}a larger max_epochs, or a smaller weight "
                "(from some step on: data.mixture_schedule)"
            )
        return past - 1, why

    # ---- checkpoints ----

    def state(self, samples: int) -> dict[str, Any]:
        """What a checkpoint after `samples` samples keeps, for `resume`."""
        named = zip(self.consumption(samples).items(), self.sources, self._identities, strict=True)
        return {
            "sources": [
                {"name": name, "path": source.dataset.prefix, **used, "identity": identity}
                for (name, used), source, identity in named
            ],
            "mixture": [asdict(phase) for phase in self.mixture.phases if phase.sample < max(samples, 1)],
            "order": self._order,
        }

    def resume(self, saved: Mapping[str, Any], step: int, samples: int) -> None:
        """Go on from a checkpoint made after `step` steps and `samples` samples.

        Raises: DataError if files, seed, sample length or the weights of these steps are not those of the checkpoint.
        """
        if not saved.get("mixture"):
            return  # made by an older version, or with synthetic data
        for key, now in self._order.items():
            if (was := saved["order"][key]) != now:
                raise DataError(
                    f"{key}={now} would change the order of the samples, {samples} of which were used with "
                    f"{key}={was}; write {key}={was}, or {ANEW}"
                )
        for old in saved["sources"]:
            if old["samples"]:
                self._check_source(old, step)
        past = [Phase(**phase) for phase in saved["mixture"]]
        self._check_weights(past, step)
        self._done, self._consumed = step, samples
        later = [p for p in phases_of(self._config, self._samples_after) if p.step > step]
        self.mixture = Mixture(self.mixture.names, [*past, *later])
        used = self.consumption(samples)
        for old in saved["sources"]:
            if old["samples"] and (gives := used[old["name"]]["samples"]) != old["samples"]:
                raise DataError(
                    f"the checkpoint of step {step} says that source {literal(old['name'])} gave {old['samples']} "
                    f"samples, its weights give {gives}: another version of this program wrote it; {ANEW}"
                )

    def _samples_after(self, steps: int) -> int:
        known = (self._done, self._consumed) if steps >= self._done else (0, 0)
        return self._batch.samples_after(steps, *known)

    def _check_source(self, old: Mapping[str, Any], step: int) -> None:
        """That a source of which samples were used is still there, and the same."""
        name, was = old["name"], old["identity"]
        if name not in self.mixture.names:
            change = [{"step": step + 1, "weights": {name: 0.0}}]
            raise DataError(
                f"data.train has no source {literal(name)} ({old['path']}), of which this run used {old['samples']} "
                f"samples; keep it, and take no more of it with data.mixture_schedule={literal(change)}"
            )
        number = self.mixture.names.index(name)
        items = self._identities[number].items()
        if differing := [f"{key} {was.get(key)}, now {now}" for key, now in items if was.get(key) != now]:
            raise DataError(
                f"data.train source {literal(name)}: {self.sources[number].dataset.prefix}.bin/.idx is not what this "
                f"run was trained on ({'; '.join(differing)}); put the files and their documents range back, or {ANEW}"
            )

    def _check_weights(self, past: Sequence[Phase], step: int) -> None:
        """That the configuration gives the steps that were made the weights they were made with."""
        present = [p for p in self.mixture.phases if p.step <= max(step, 1)]
        if [(p.step, _used(p)) for p in present] == [(p.step, _used(p)) for p in past]:
            return
        new = [] if _used(present[-1]) == _used(past[-1]) else [Phase(step + 1, 0, present[-1].weights)]
        phases = [*past, *new, *(p for p in self.mixture.phases if p.step > step)]
        first, *then = ({name: p.weights.get(name, 0.0) for name in self.mixture.names} for p in phases)
        changes = [{"step": p.step, "weights": weights} for p, weights in zip(phases[1:], then, strict=True)]
        were, now = (", ".join(f"{literal(_used(p))} from step {p.step}" for p in made) for made in (past, present))
        raise DataError(
            "the weights of data.train and data.mixture_schedule are not those of "
            f"the {counted(step, 'step')} that were made: they were {were}, now they say {now}. What is past cannot "
            f"change; keep in data.train the weights {literal(first)} and write "
            f"data.mixture_schedule={literal(changes)}"
        )


def _used(phase: Phase) -> dict[str, float]:
    return {name: weight for name, weight in phase.weights.items() if weight}
