"""Full training steps of megallama: tokens/s, peak memory of each rank, and share of the measured GEMM rate.

    python benchmarks/step.py                                     every row
    python benchmarks/step.py --shapes S --layouts a,e --dtypes bf16 --rounds 3
    python benchmarks/step.py --set memory.recompute=none          a setting changed

A row is `python -m megallama.pretrain` on random tokens, one process per rank; the rate is that of the
median step after two warm-ups, in `metrics.jsonl`; the shares of time come from a further run under the profiler
(`drivers/shares.py`).  Shapes and layouts: `drivers/work.py`.  Results:
`benchmarks/results/step.json` and `step.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from drivers.work import BETAS, CLIP, DECAY, EPS, LAYOUTS, LR, SHAPES, WARM_UP, Layout, Shape, result
from launch import Outcome, launch, wait_for_calm
from report import Run, header, median, save, table

HERE = Path(__file__).resolve().parent


def settings(shape: Shape, layout: Layout, dtype: str, folder: str) -> list[str]:
    """The overrides that make `megallama.pretrain` do the work of a row."""
    values: dict[str, Any] = {
        "model.hidden_size": shape.hidden,
        "model.num_layers": shape.layers,
        "model.num_heads": shape.heads,
        "model.ffn_hidden_size": shape.ffn,
        "model.vocab_size": shape.vocab,
        "batch.seq_length": shape.seq,
        "batch.micro_batch_size": shape.micro_batch,
        "batch.global_batch_size": shape.micro_batch * layout.dp * layout.microbatches,
        "parallel.tp": layout.tp,
        "parallel.pp": layout.pp,
        "precision.dtype": dtype,
        "memory.recompute": "selective",
        "optimizer.lr": LR,
        "optimizer.beta1": BETAS[0],
        "optimizer.beta2": BETAS[1],
        "optimizer.eps": EPS,
        "optimizer.weight_decay": DECAY,
        "optimizer.clip_grad": CLIP,
        "lr_schedule.kind": "constant",
        "lr_schedule.warmup_steps": 0,
        "data.synthetic": "true",
        "train.steps": 1000000,  # it is killed after the steps asked for: no checkpoint is written
        "checkpoint.resume": "fresh",
        "log.tensorboard": "false",
        "run.folder": folder,
        "run.device": "cpu",
        "run.threads": layout.threads,
        "run.supervisor": "false",  # whose memory would be taken for the rank's; `watching.py` measures it
    }
    return [f"{key}={value}" for key, value in values.items()]


def measure(shape: str, layout: str, dtype: str, steps: int, extra: list[str], timeout: float = 600.0) -> Run:
    """One run of ours."""
    place = LAYOUTS[layout]
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.jsonl"

        def lines() -> list[dict[str, Any]]:
            text = metrics.read_text() if metrics.exists() else ""
            return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

        command = [sys.executable, "-m", "megallama.pretrain", *settings(SHAPES[shape], place, dtype, folder), *extra]
        outcome = launch(
            command,
            place.ranks,
            place.threads,
            env={"PYTHONPATH": str(HERE.parent)},
            timeout=timeout,
            done=lambda: len(lines()) >= steps,
        )
        seen = [x for x in lines() if x["kind"] == "train"][:steps]
    tokens = SHAPES[shape].micro_batch * SHAPES[shape].seq * place.dp * place.microbatches
    assert all(x["tokens"] == tokens for x in seen), "a step did other work than the row says"
    return Run(
        system="megallama",
        shape=shape,
        layout=layout,
        dtype=dtype,
        keeps_master=True,
        peak_rss_mib=outcome.peak_rss_mib,
        other_load=outcome.other_load,
        **result(tokens, [x["step_seconds"] for x in seen], seen[-1]["loss"]),  # type: ignore[arg-type]
    )


def shares(shape: str, layout: str, dtype: str, extra: list[str]) -> dict[str, float]:
    """Share of the time of a step by kind, on rank 0, from a run of its own under torch's profiler."""
    place = LAYOUTS[layout]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / "drivers" / "shares.py")]
        command += [*settings(SHAPES[shape], place, dtype, folder), *extra]
        outcome = launch(command, place.ranks, place.threads, env={"PYTHONPATH": str(HERE.parent)})
    found: dict[str, float] = json.loads(outcome.stdout.splitlines()[-1])
    return found


def probe(layout: str, dtype: str) -> float:
    """GEMM GFLOP/s of this machine right now, with the processes and threads of `layout` [all together, <= cores]."""
    place = LAYOUTS[layout]
    ranks = min(place.ranks, 2)  # four ranks on two cores share them: their rates do not add up
    command = [sys.executable, str(HERE / "gemm.py"), "--probe", dtype]
    outcome: Outcome = launch(command, ranks, place.threads)
    return ranks * float(outcome.stdout)


def flops_per_token(shape: Shape) -> int:
    """6 per parameter outside the input embedding, and the full square of attention."""
    layer = 4 * shape.hidden**2 + 3 * shape.hidden * shape.ffn + 2 * shape.hidden
    parameters = shape.layers * layer + shape.hidden + shape.vocab * shape.hidden
    return 6 * parameters + 12 * shape.layers * shape.hidden * shape.seq


def rows(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """(shape, dtype, layout) of the rows asked for. Raises: SystemExit where there are too few steps."""
    if args.steps <= WARM_UP:
        raise SystemExit(f"error: --steps {args.steps} leaves nothing to count after {WARM_UP} warm-up steps")
    return [
        (shape, dtype, layout)
        for shape in args.shapes.split(",")
        for dtype in args.dtypes.split(",")
        for layout in args.layouts.split(",")
    ]


def add_row_options(parser: argparse.ArgumentParser) -> None:
    """The options that choose rows."""
    parser.add_argument("--shapes", default="S,M")
    parser.add_argument("--dtypes", default="bf16,fp32")
    parser.add_argument("--layouts", default="a,b,c,d,e")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=9, help="per run; the first two are not counted")
    parser.add_argument("--calm", type=float, default=0, help="wait at most this long for an idle machine [s]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_row_options(parser)
    args = parser.parse_args()
    runs: list[Run] = []
    lines = []
    for shape, dtype, layout in rows(args):
        wait_for_calm(args.calm)
        rate = probe(layout, dtype)
        own = []
        for _ in range(args.rounds):
            wait_for_calm(args.calm)
            own.append(measure(shape, layout, dtype, args.steps, args.set))
        runs += own
        speed = median([r.tokens_per_second for r in own])
        kinds = shares(shape, layout, dtype, args.set)
        used = speed * flops_per_token(SHAPES[shape]) / 1e9
        line = {
            "row": f"{shape} {dtype} {layout}",
            "tokens/s": f"{speed:.0f}",
            "rounds": " ".join(f"{r.tokens_per_second:.0f}" for r in own),
            "GFLOP/s": f"{used:.0f}",
            "GEMM rate here": f"{rate:.0f}",
            "MFU": f"{100 * used / rate:.0f}%",
            "GEMM + attention": f"{100 * (kinds['products'] + kinds['attention']):.0f}%",
            "share of time by kind": ", ".join(f"{kind} {100 * share:.0f}" for kind, share in kinds.items()),
            "peak MiB of each rank": " ".join(str(x) for x in own[-1].peak_rss_mib),
            "others' load": " ".join(str(r.other_load) for r in own),
        }
        lines.append(line)
        print(json.dumps(line), flush=True)
    note = "Others' load: cores that other processes kept busy meanwhile; above 0.15 a figure is too low.\n"
    save("step", runs, header("Training steps of megallama", args) + table(lines) + "\n" + note)


if __name__ == "__main__":
    main()
