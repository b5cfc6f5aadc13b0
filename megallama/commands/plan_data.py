"""What a run takes from each source: `megallama plan --data [CONFIG.toml] [section.key=value ...] [--json]`.

Prints for every source its size, its share of the samples in every phase of the mixture, the tokens used, the epochs
at the end, and the step at which its max_epochs ends the data. Sizes come from the files where they are there, else
from num_tokens of the source. `--json` prints the same as one object. Needs neither torch nor the files.
Exit status 2 if the configuration has errors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megallama.analysis.sources import SourceShare, source_shares
from megallama.commands.parser import Parser, main_of
from megallama.config.errors import ConfigError, counted
from megallama.config.load import load
from megallama.config.schema import Config


def table(config: Config, rows: Sequence[SourceShare], firsts: Sequence[int]) -> str:
    """The plan as text."""
    b, steps = config.batch, config.train.steps
    samples = b.samples_after(steps)
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
        what = "refused" if config.data.on_exhausted == "error" else f"over after step {min(ends):,}"
        out += ["", f'with data.on_exhausted="{config.data.on_exhausted}" this run is {what}']
    return "\n".join(out)


def run(argv: Sequence[str] | None) -> int:
    """Print the plan. Raises: MegallamaError."""
    parser = Parser("plan --data", __doc__, config=True)
    parser.add_argument("--json", action="store_true", help="one object for programs")
    args = parser.read(argv)
    return show(*parser.config_of(args), as_json=args.json)


main = main_of(run)


def show(file: Path | None, overrides: Sequence[str], *, as_json: bool) -> int:
    """Print the plan of a configuration. Raises: MegallamaError."""
    config = load(file, overrides)
    if config.data.synthetic:
        raise ConfigError("data.synthetic=true takes nothing from any source; write data.train")
    rows, firsts = source_shares(config)
    described = {"phases": firsts, "sources": [asdict(row) for row in rows]}
    print(json.dumps(described) if as_json else table(config, rows, firsts))
    return 0
