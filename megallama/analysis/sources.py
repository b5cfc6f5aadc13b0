"""What a run takes from each source, before it starts: by the files, else by num_tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megallama.config.errors import ConfigError, counted
from megallama.config.schema import Config, SourceConfig
from megallama.data.indexed import IndexedDataset
from megallama.data.mixture import Mixture, phases_of
from megallama.data.samples import Source


@dataclass(frozen=True)
class SourceShare:
    """What the run takes from one source."""

    source: str
    tokens: int  # of one epoch: what is used of the corpus
    measured: bool  # from the files, not from num_tokens
    shares: tuple[float, ...]  # of the samples, in each phase
    used_tokens: int
    epochs: float
    max_epochs: float | None
    last_step: int | None  # the last step before max_epochs is passed; None: it is not


def size_of(source: SourceConfig, config: Config) -> tuple[int, int, bool]:
    """Sequences and tokens of one epoch, and whether the files say so. Raises: ConfigError if nothing tells."""
    seq_length = config.batch.seq_length
    if Path(source.path.removesuffix(".bin").removesuffix(".idx") + ".idx").exists():
        opened = Source(IndexedDataset(source.path), seq_length, 0, documents=source.documents)
        return opened.num_sequences, opened.num_tokens, True
    if source.num_tokens is None:
        raise ConfigError(
            f"there are no files {source.path}.bin and .idx to take the size of source {source.label!r} from; write "
            f'data.train=[{{path = "{source.path}", num_tokens = 1_000_000_000}}] with its number of tokens'
        )
    tokens = round(source.num_tokens * (source.documents[1] - source.documents[0]))
    if tokens <= seq_length:
        have = counted(tokens, "token")
        raise ConfigError(f"source {source.label!r} has {have}, less than one sample of {seq_length + 1}")
    return (tokens - 1) // seq_length, tokens, False


def source_shares(config: Config) -> tuple[list[SourceShare], list[int]]:
    """The rows, in the order of data.train, and the first step of every phase."""
    batch, sources, steps = config.batch, config.data.train, config.train.steps
    phases = [p for p in phases_of(config.data, batch.samples_after) if p.step <= steps]
    sizes = [size_of(source, config) for source in sources]
    mixture = Mixture([source.label for source in sources], phases)
    counts, rows = mixture.counts(batch.samples_after(steps)), []
    for i, (source, (sequences, tokens, measured)) in enumerate(zip(sources, sizes, strict=True)):
        shares = tuple(p.weights[source.label] / sum(p.weights.values()) for p in phases)
        past = mixture.step_past(source, sequences, steps, batch.samples_after)
        used, epochs = counts[i] * config.batch.seq_length, counts[i] / sequences
        last = None if past is None else past - 1
        rows.append(SourceShare(source.label, tokens, measured, shares, used, epochs, source.max_epochs, last))
    return rows, [p.step for p in phases]
