"""What a run takes from each source, before it starts: by the files, else by num_tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megallama.config.errors import ConfigError, counted
from megallama.config.schema import Config, SourceConfig
from megallama.data.indexed import IndexedDataset
from megallama.data.mixture import phases_of
from megallama.data.samples import Source
from megallama.data.sources import TrainDataset


def parts_of(config: Config, opened: Callable[[Config], Any]) -> Iterator[tuple[Config, Any, range, range]]:
    """Of each phase, or of all: configuration; data, `opened` of it, going on after the one before; steps; samples."""
    steps, samples, before = range(0), range(0), None
    for number, end in enumerate(config.train.phase_ends() or [config.train.steps]):
        now, done, first = config.at(number), steps.stop, samples.stop
        train, steps, samples = opened(now), range(done, end), range(first, now.batch.samples_after(end, done, first))
        if before is not None:
            train.take_over(before.state(first), done, first)
        yield now, (before := train), steps, samples


def sized(source: SourceConfig, seq_length: int) -> Any:
    """The source, or as much of one as a mixture counts with. Raises: ConfigError if nothing tells its size."""
    path, name = source.path, source.label
    if Path(path.removesuffix(".bin").removesuffix(".idx") + ".idx").exists():
        return Source(IndexedDataset(path), seq_length, 0, documents=source.documents, name=name)
    if source.num_tokens is None:
        raise ConfigError(
            f"there are no files {path}.bin and .idx to take the size of source {name!r} from; write "
            f'data.train=[{{path = "{path}", num_tokens = 1_000_000_000}}] with its number of tokens'
        )
    tokens = round(source.num_tokens * (source.documents[1] - source.documents[0]))
    if (count := (tokens - 1) // seq_length) < 1:
        have = counted(tokens, "token")
        raise ConfigError(f"source {name!r} has {have}, less than one sample of {seq_length + 1}")
    like = {"name": name, "seq_length": seq_length, "seed": 0, "num_tokens": tokens, "num_sequences": count}
    return SimpleNamespace(**like, identity=dict, dataset=SimpleNamespace(prefix=path))


def source_shares(config: Config) -> tuple[list[dict[str, Any]], list[int], list[tuple[int, int]]]:
    """A row per source of data.train, the first step of every phase of the mixture, and of each part of the run its
    samples, and of how many tokens they are.

    A row: `source`, `tokens` of one epoch, whether they are `measured`, `shares` of the samples in each phase,
    `used_tokens`, `epochs`, `max_epochs`, and the `last_step` before they are passed, None where they are not.
    """
    rows, phases, sizes, ends = list[dict[str, Any]](), [], [], dict[str, int]()

    def opened(now: Config) -> TrainDataset:
        return TrainDataset(now.data, [sized(each, now.batch.seq_length) for each in now.data.train], now.batch)

    for now, train, steps, samples in parts_of(config, opened):
        after = partial(now.batch.samples_after, consumed=samples.start)
        phases += [(steps.start + p.step, p.weights) for p in phases_of(now.data, after) if p.step <= len(steps)]
        sizes.append((len(samples), now.batch.seq_length))
        for source, like in zip(now.data.train, train.sources, strict=True):
            past = train.mixture.step_past(source, like.num_sequences, len(steps), after)
            if past is not None:
                ends.setdefault(source.label, steps.start + past - 1)
    for source, like in zip(config.data.train, train.sources, strict=True):
        name, used = source.label, train.consumption(samples.stop)[source.label]
        row = {"source": name, "tokens": like.num_tokens, "measured": isinstance(like, Source)}
        row |= {"shares": [weights[name] / sum(weights.values()) for _, weights in phases]}
        row |= {"used_tokens": int(used["tokens"]), "epochs": used["epochs"]}
        rows.append(row | {"max_epochs": source.max_epochs, "last_step": ends.get(name)})
    return rows, [step for step, _ in phases], sizes
