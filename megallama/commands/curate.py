"""Make a corpus of raw pages: filter, remove duplicates, and report what was dropped and why.

    megallama curate examples/curate/commoncrawl.toml --output data/crawl --workers 8
    megallama prepare data/crawl/commoncrawl --tokenizer tokenizer.model --output data/tokens/commoncrawl

Writes OUTPUT/SOURCE/NNNNN.jsonl, report.html, report.json and removed.jsonl (near-duplicates and what they resemble).
The same command, on several machines or as the tasks of a Slurm array, shares the work, and continues what was killed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megallama.commands.parser import Parser, filled
from megallama.config.errors import say


def run(argv: Sequence[str]) -> None:
    """Carry out a recipe, or train its models. Raises: MegallamaError."""
    parser = Parser("curate", __doc__)
    add = parser.add_argument
    add("recipe", type=Path, help="a .toml file: the sources and their stages")
    add("--output", type=filled, metavar="FOLDER", help="where the corpus goes")
    add("--train", action="store_true", help="train the models that stages name, from the texts that they name")
    add("--workers", type=int, default=1, metavar="N", help="processes on this machine (1)")
    add("--quiet", action="store_true", help="no progress")
    args = parser.read(argv)
    if args.workers < 1 or bool(args.train) == bool(args.output):
        parser.error("give --output FOLDER or --train; --workers must be 1 or more")
    from megallama.curate.recipe import load_recipe, train
    from megallama.curate.run import curate

    recipe = load_recipe(args.recipe)
    if args.train:
        return train(recipe, lambda text: print(text, file=sys.stderr, flush=True))
    new = curate(recipe, Path(args.output), args.workers, args.quiet)
    print(f"{args.output}/report.html" + ("" if new else ": finished before"))
    report = json.loads((Path(args.output) / "report.json").read_text("utf-8"))
    left = [
        f"not all was read, as of {file}: {[*why][0]}; see the report" for file, why in report["bad"].items()
    ]
    empty = [name for name, row in report["sources"].items() if not row["raw"]["documents"]]
    for line in [*left[:1], *(f"no document was read of {name}" for name in empty)]:
        say(line)
