"""What a run takes from each source: `megallama plan --data [CONFIG.toml] [section.key=value ...] [--json]`.

Prints for every source its size, its share of the samples in every phase (data.changes), the tokens used, the epochs
at the end, and the step at which its max_epochs ends the data. Sizes come from the files where they are there, else
from num_tokens of the source. `--json` prints the same as one object. Needs neither torch nor the files.
Exit status 2 if the configuration has errors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megallama.commands.parser import Parser
from megallama.config.errors import ConfigError, exit_status
from megallama.config.load import load
from megallama.config.schema import Config, SourceConfig
from megallama.config.words import counted
from megallama.data.indexed import IndexedDataset
from megallama.data.mixture import Mixture, limits_of, phases_of
from megallama.data.samples import Source
from megallama.plan.batch import BatchPlan


@dataclass(frozen=True)
class Row:
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
    """Windows and tokens of one epoch, and whether the files say so. Raises: ConfigError if nothing tells."""
    seq_length = config.batch.seq_length
    if Path(source.path.removesuffix(".bin").removesuffix(".idx") + ".idx").exists():
        opened = Source(IndexedDataset(source.path), seq_length, 0, documents=source.documents)
        return opened.num_windows, opened.num_tokens, True
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


def plan(config: Config) -> tuple[list[Row], list[int]]:
    """The rows, in the order of data.train, and the first step of every phase."""
    batch, sources, steps = BatchPlan(config.batch, 1), config.data.train, config.train.steps
    phases = [p for p in phases_of(config.data, batch.samples_after) if p.step <= steps]
    sizes = [size_of(source, config) for source in sources]
    mixture = Mixture([source.label for source in sources], phases)
    counts, rows = mixture.counts(batch.samples_after(steps)), []
    limits = limits_of(sources, [windows for windows, _, _ in sizes])
    for i, (source, (windows, tokens, measured)) in enumerate(zip(sources, sizes, strict=True)):
        shares = tuple(p.weights[source.label] / sum(p.weights.values()) for p in phases)
        alone = [limit if j == i else None for j, limit in enumerate(limits)]
        past = mixture.first_step_past(alone, steps, batch.samples_after)
        used, epochs = counts[i] * config.batch.seq_length, counts[i] / windows
        last = None if past is None else past - 1
        rows.append(Row(source.label, tokens, measured, shares, used, epochs, source.max_epochs, last))
    return rows, [p.step for p in phases]


def table(config: Config, rows: Sequence[Row], firsts: Sequence[int]) -> str:
    """The plan as text."""
    b, steps = config.batch, config.train.steps
    samples = BatchPlan(b, 1).samples_after(steps)
    phases = [f"share from step {n:,}" for n in firsts]
    lines = [["source", "tokens", *phases, "used tokens", "epochs", "max", "last step"]]
    for row in rows:
        size = f"{row.tokens:,}{'' if row.measured else '*'}"
        shares = [f"{100 * share:.2f} %" for share in row.shares]
        cap = [f"{x:{form}}" if x is not None else "" for x, form in ((row.max_epochs, "g"), (row.last_step, ","))]
        lines.append([row.source, size, *shares, f"{row.used_tokens:,}", f"{row.epochs:.2f}", *cap])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    size = f"{counted(samples, 'sample', ',')} of {b.seq_length} = {counted(samples * b.seq_length, 'token', ',')}"
    out = [f"{counted(steps, 'step', ',')}, {size}", ""]
    for line in lines:
        name, *cells = line
        out.append("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]).rstrip())
    if not all(row.measured for row in rows):
        out += ["", "* num_tokens of the configuration; the files are not here"]
    ends = [row.last_step for row in rows if row.last_step is not None]
    if ends:
        what = "refused" if config.data.at_max_epochs == "error" else f"over after step {min(ends):,}"
        out += ["", f'with data.at_max_epochs="{config.data.at_max_epochs}" this run is {what}']
    return "\n".join(out)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; 0, or 2 with the errors on stderr."""
    return exit_status(lambda: run(argv))


def run(argv: Sequence[str] | None) -> int:
    """Print the plan. Raises: MegallamaError."""
    parser = Parser("plan --data", __doc__, config=True)
    parser.add_argument("--json", action="store_true", help="one object for programs")
    args = parser.read(argv)
    return show(*parser.config_of(args), as_json=args.json)


def show(file: Path | None, overrides: Sequence[str], *, as_json: bool) -> int:
    """Print the plan of a configuration. Raises: MegallamaError."""
    config = load(file, overrides)
    if config.data.synthetic:
        raise ConfigError("data.synthetic=true takes nothing from any source; write data.train")
    rows, firsts = plan(config)
    described = {"phases": firsts, "sources": [asdict(row) for row in rows]}
    print(json.dumps(described) if as_json else table(config, rows, firsts))
    return 0
