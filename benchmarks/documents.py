"""What attention within documents costs: steps of shape S on one sample of 4096 tokens, beside those without documents.

    python benchmarks/documents.py --dtypes fp32,bf16 --tokens 4096

The sample is one document, or documents of so many tokens each (the last one what is left).  One rank, one process a
row; seconds of the median step after one warm-up, peak memory of the process.  Results: `results/documents.json` and
`documents.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from drivers.work import SHAPES
from launch import launch
from report import header, median, save, table

HERE = Path(__file__).resolve().parent
LENGTHS = (0, 4096, 2048, 512, 100, 16, 1)  # of documents, cut at the sample's length; 0: without


@dataclass(frozen=True)
class Row:
    """Of documents of one length in one format."""

    dtype: str
    length: int
    seconds: list[float]
    peak_mib: int


def steps(dtype: str, tokens: int, length: int, count: int) -> list[float]:
    """Seconds of each of `count` steps, in this process."""
    import torch

    from megallama.comm.group import Solo, build_groups
    from megallama.config.load import load
    from megallama.kernels.attention import Documents
    from megallama.layers.batch import MicroBatch
    from megallama.plan.plan import make_plan
    from megallama.train.assemble import assemble, initialize, kernels_of
    from megallama.train.step import train_step

    s = SHAPES["S"]
    model = f"hidden_size={s.hidden} num_layers={s.layers} num_heads={s.heads} ffn_hidden_size={s.ffn}"
    words = [f"model.{word}" for word in f"{model} vocab_size={s.vocab}".split()]
    words += [f"batch.seq_length={tokens}", "batch.micro_batch_size=1", "batch.global_batch_size=1"]
    config = load(None, [*words, f"precision.dtype={dtype}", "data.synthetic=true", "eval.interval=0"], ranks=1)
    config = config.model_copy(update={"data": config.data.model_copy(update={"document_mask": length > 0})})
    plan, device = make_plan(config, 1), torch.device("cpu")
    groups = build_groups(plan.topology, 0, s.heads, lambda name, parts: Solo(name))
    rank = assemble(plan, groups, device, kernels_of(config, device))
    initialize(rank, 1)
    ids = torch.randint(s.vocab, (1, tokens + 1), generator=torch.Generator().manual_seed(0))
    at = torch.arange(tokens)[None]
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        documents = Documents.of(at // length * length) if length else None
        batch = MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None, documents)
        train_step(rank, plan.schedule, [batch], 1e-4)
        seconds.append(time.perf_counter() - started)
    return seconds


def measure(args: argparse.Namespace, dtype: str, length: int) -> Row:
    """One row, in a process of its own."""
    own = ["--tokens", str(args.tokens), "--steps", str(args.steps), "--one", dtype, str(length)]
    outcome = launch([sys.executable, __file__, *own], 1, args.threads, env={"PYTHONPATH": str(HERE.parent)})
    return Row(dtype, length, json.loads(outcome.stdout.splitlines()[-1]), outcome.peak_rss_mib[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=6, help="per row; the first is not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("DTYPE", "LENGTH"), help="one row, in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(steps(args.one[0], args.tokens, int(args.one[1]), args.steps)))
        return
    rows, shown = [], []
    for dtype in args.dtypes.split(","):
        for length in (n for n in LENGTHS if n <= args.tokens):
            rows.append(measure(args, dtype, length))
            (bare,) = (row for row in rows if row.dtype == dtype and not row.length)
            now, before = median(rows[-1].seconds[1:]), median(bare.seconds[1:])
            name = f"of {length:,} tokens" if 0 < length < args.tokens else "one" if length else "without"
            shown.append({
                "row": f"{dtype} {args.tokens:,} tokens", "documents": name, "seconds of a step": f"{now:.2f}",
                "of those without": f"{now / before:.2f}", "peak MiB": f"{rows[-1].peak_mib:,}",
            })  # fmt: skip
            print(shown[-1], flush=True)
    save("documents", rows, header("Attention within documents", args) + table(shown))


if __name__ == "__main__":
    main()
