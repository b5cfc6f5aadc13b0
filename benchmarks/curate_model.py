"""A small model trained on the curated and on the raw text of the same pages: bits per byte of the same held-out text.

    python benchmarks/curate_model.py --mb 200 --steps 300

Pages, reference text and recipe are those of curate.py; of a tenth of the reference text, which no model of the recipe
has seen and which is no page, 200 texts are held out.  Raw text is the same recipe without its stages.  Both models
have the same tokenizer (trained on raw text), weights to begin with, settings and number of tokens; no corpus is seen
twice.  --steps 0 with --folder makes the corpora only.
Results: `results/curate_model.json`, `curate_model.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from curate import ROOT, ROOTS, own_recipe, raw_pages, reference_texts, text_of, write_archives, write_texts
from report import header, save, table

BATCH, LENGTH = 16, 256
SETTINGS = (
    *("model.hidden_size=128", "model.num_layers=4", "model.num_heads=4", "model.ffn_hidden_size=344"),
    *(f"batch.global_batch_size={BATCH}", "batch.micro_batch_size=8", f"batch.seq_length={LENGTH}"),
    *("precision.dtype=fp32", "optimizer.lr=3e-3", "checkpoint.interval=0", "run.threads=1"),
)


@dataclass(frozen=True)
class Trained:
    """A corpus: its documents and tokens, tokens trained on, bits per byte of the held-out text and of raw text."""

    corpus: str
    documents: int
    tokens: int
    trained: int
    reference_bits: float
    raw_bits: float


def megallama(*words: object) -> None:
    """Run a command of the program; what it says goes to standard error."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "megallama", *map(str, words)], env=env, check=True, stdout=sys.stderr)


def corpora(work: Path, args: argparse.Namespace) -> None:
    """Make both corpora as tokens, NAME/tokens; held-out texts beside them."""
    write_texts(work / "reference_held_out.jsonl", reference_texts(args.roots, 0))
    pages = [(media, data) for _, media, data in raw_pages(args.roots, int(args.mb * 1e6))]
    held = pages[::50]
    write_texts(work / "raw_held_out.jsonl", (text for page in held if (text := text_of(*page))))
    train = [page for number, page in enumerate(pages) if number % 50]
    write_archives(work / "raw" / "crawl", ((str(n), *page) for n, page in enumerate(train)))
    random = islice((text for page in train[::7] if (text := text_of(*page))), 3000)
    recipe = own_recipe(work, islice(reference_texts(args.roots, -1), args.reference), random)
    head = recipe.read_text().split("[[sources.stages]]")[0]
    (work / "as_it_is.toml").write_text(head)
    megallama("curate", recipe, "--train")
    for name, file in (("raw", work / "as_it_is.toml"), ("curated", recipe)):
        megallama("curate", file, "--output", work / name / "text", "--quiet")
    texts = {name: work / name / "text" / "commoncrawl" for name in ("raw", "curated")}
    megallama("tokenizer", texts["raw"], "--vocab-size", 4096, "--output", work / "tokenizer.model", "--quiet")
    for name, folder in texts.items():
        megallama("prepare", folder, "--tokenizer", work / "tokenizer.model", "--output", work / name / "tokens")


def trained(work: Path, name: str, tokens: Path, steps: int, seed: int) -> Trained:
    """Train and evaluate one model."""
    run, found = work / name / f"run{seed}", work / name / f"found{seed}.json"
    more = [f"train.steps={steps}", f"lr_schedule.warmup_steps={steps // 15}", "model.vocab_size=4096"]
    more += [f"data.tokenizer={work / 'tokenizer.model'}"]
    megallama("train", *SETTINGS, *more, f"data.train={tokens}", f"run.folder={run}", f"train.seed={seed}")
    held = [work / f"{kind}_held_out.jsonl" for kind in ("reference", "raw")]
    more = ["--limit", 200, "--tokenizer", work / "tokenizer.model", "--output", found]
    megallama("evaluate", run, "run.threads=1", "--data", *held, *more)
    texts = json.loads(found.read_text())["texts"]
    bits = [next(row["bits_per_byte"] for key, row in texts.items() if path.name in key) for path in held]
    size, documents = _size(tokens)
    return Trained(name, documents, size, steps * BATCH * LENGTH, *(round(value, 4) for value in bits))


def _size(tokens: Path) -> tuple[int, int]:
    """Tokens and documents of a prepared corpus."""
    facts = json.loads(Path(f"{tokens}.json").read_text())
    return int(facts["tokens"]), int(facts["documents"])


def main() -> None:
    """Make both corpora, train on both, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=200.0, help="raw pages")
    parser.add_argument("--steps", type=int, default=300, help=f"of {BATCH * LENGTH} tokens; 0: no model")
    parser.add_argument("--seeds", type=int, default=1, help="so many models of each corpus")
    parser.add_argument("--folder", help="keeps the corpora; if they are there, only models are trained")
    parser.add_argument("--reference", type=int, default=3000, help="reference texts for the recipe's models")
    parser.add_argument("--roots", nargs="+", default=list(ROOTS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="curate-model-") as temporary:
        work = Path(args.folder or temporary)
        tokens = {name: work / name / "tokens" for name in ("raw", "curated")}
        if not (work / "curated" / "tokens.json").exists():
            corpora(work, args)
        if not args.steps:
            return
        steps = min(args.steps, *(_size(path)[0] // (BATCH * LENGTH) for path in tokens.values()))
        rows = [trained(work, name, path, steps, seed) for seed in range(args.seeds) for name, path in tokens.items()]
    text = table(
        [
            {
                "corpus": row.corpus,
                "documents": f"{row.documents:,}",
                "tokens": f"{row.tokens:,}",
                "tokens trained on": f"{row.trained:,}",
                "bits per byte, reference text": f"{row.reference_bits:.4f}",
                "bits per byte, raw text": f"{row.raw_bits:.4f}",
            }
            for row in rows
        ]
    )
    save("curate_model", rows, header("A model of curated and of raw text", args) + text)


if __name__ == "__main__":
    main()
