"""What this machine can do: matrix products, the leaves of a layer and gloo, at the sizes of shapes S and M.

The GEMM rate measured here is the ceiling against which a training step is judged; the other tables
say which of several equal formulas is the fast one on this processor.

    python benchmarks/gemm.py                              everything (about 3 minutes)
    python benchmarks/gemm.py --only gemm,comm --threads 1
    python benchmarks/gemm.py --out results.md

Every figure is the best of several repetitions: other processes can only make a run slower.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

SECTIONS = ("gemm", "wgrad", "attention", "leaves", "adam", "comm")

# name: rows (tokens of a micro-batch), inputs, outputs
LINEARS = {
    "S.qkv": (2048, 256, 768),
    "S.o": (2048, 256, 256),
    "S.gate_up": (2048, 256, 1376),
    "S.down": (2048, 688, 256),
    "S.head": (2048, 256, 4096),
    "M.qkv": (1024, 768, 2304),
    "M.o": (1024, 768, 768),
    "M.gate_up": (1024, 768, 4096),
    "M.down": (1024, 2048, 768),
    "M.head": (1024, 768, 32000),
    "M.head/2 rows": (512, 768, 32000),
}
HEADS = {"S": (8, 4, 256, 64), "M": (2, 12, 512, 64)}  # batch, heads, sequence, head size
LEAVES = {"S": (2048, 256, 688, 4096), "M": (1024, 768, 2048, 32000)}  # tokens, hidden, ffn, vocabulary
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Row = dict[str, Any]


def best(work: Callable[[], Any], seconds: float) -> float:
    """Shortest time of `work` [s]: two unmeasured calls, then at least 5 and at least `seconds` worth."""
    work()
    work()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 500):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def attempt(work: Callable[[], Any], seconds: float) -> float | None:
    """`best`, or None where this build of torch refuses the operation."""
    try:
        return best(work, seconds)
    except (RuntimeError, TypeError, NotImplementedError):
        return None


def gemm_rows(seconds: float) -> list[Row]:
    """GFLOP/s of forward, input gradient and weight gradient, and of the same products called otherwise."""
    rows = []
    for name, (m, k, n) in LINEARS.items():
        for label, dtype in DTYPES.items():
            x, w, g = (torch.randn(s, dtype=dtype) for s in ((m, k), (n, k), (m, n)))
            y, dx, dw = torch.empty_like(g), torch.empty_like(x), torch.empty_like(w)
            yt, dxt, dwt = (torch.empty(s, dtype=dtype) for s in ((n, m), (k, m), (k, n)))
            h = m // 2
            works: dict[str, Callable[[], Any]] = {
                "fwd": lambda: torch.mm(x, w.t(), out=y),
                "dgrad": lambda: torch.mm(g, w, out=dx),
                "wgrad": lambda: torch.mm(g.t(), x, out=dw),
                "fwd halves": lambda: [
                    torch.mm(x[:h], w.t(), out=y[:h]),
                    torch.mm(x[h:], w.t(), out=y[h:]),
                ],
                "dgrad halves": lambda: [
                    torch.mm(g[:h], w, out=dx[:h]),
                    torch.mm(g[h:], w, out=dx[h:]),
                ],
                "fwd transposed": lambda: torch.mm(w, x.t(), out=yt),
                "dgrad transposed": lambda: torch.mm(w.t(), g.t(), out=dxt),
                "wgrad transposed": lambda: torch.mm(x.t(), g, out=dwt),
            }
            flop = 2 * m * k * n
            rates: Row = {"shape": name, "dtype": label}
            for key, work in works.items():
                rates[key] = round(flop / best(work, seconds) / 1e9)
            rates["fwd onednn"] = rate_of_linear(x, w, flop, seconds)
            rows.append(rates)
    return rows


def rate_of_linear(x: Tensor, w: Tensor, flop: int, seconds: float) -> int | None:
    """GFLOP/s of oneDNN's linear, which torch itself does not choose for fp32 (into a fresh tensor)."""
    time_s = attempt(lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""), seconds)
    return round(flop / time_s / 1e9) if time_s else None


def wgrad_rows(seconds: float) -> list[Row]:
    """Milliseconds of a weight gradient added into an fp32 buffer, each way torch offers."""
    rows = []
    for name, (m, k, n) in LINEARS.items():
        main = torch.zeros(n, k)
        for label, dtype in DTYPES.items():
            x, g, dw = torch.randn(m, k, dtype=dtype), torch.randn(m, n, dtype=dtype), torch.empty(n, k, dtype=dtype)
            works: dict[str, Callable[[], Any]] = {
                "mm": lambda: torch.mm(g.t(), x, out=dw),
                "mm then add": lambda: main.add_(torch.mm(g.t(), x, out=dw)),
                "add alone": lambda: main.add_(dw),
                "addmm into main": lambda: torch.addmm(main, g.t(), x, out=main),
                "mm fp32 output": lambda: torch.mm(g.t(), x, out_dtype=torch.float32),
                "copy alone": lambda: main.copy_(dw),
            }
            row: Row = {"shape": name, "dtype": label}
            for key, work in works.items():
                time_s = attempt(work, seconds)
                row[key] = None if time_s is None else round(time_s * 1e3, 3)
            rows.append(row)
    return rows


def explicit_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention as two batched products: (output, probabilities)."""
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    p = torch.softmax(scores, -1)
    return torch.bmm(p, v), p


def explicit_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, p: Tensor) -> tuple[Tensor, ...]:
    """Gradients of `explicit_forward`: dS = P * (dO V' - rowsum(dO * O))."""
    dv = torch.bmm(p.transpose(1, 2), do)
    dp = torch.bmm(do, v.transpose(1, 2))
    ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
    scale = q.shape[-1] ** -0.5
    return torch.bmm(ds, k).mul_(scale), torch.bmm(ds.transpose(1, 2), q).mul_(scale), dv


def attention_rows(seconds: float) -> list[Row]:
    """Milliseconds of causal attention of one layer and micro-batch."""
    rows = []
    for name, (b, n, s, d) in HEADS.items():
        for label, dtype in DTYPES.items():
            q, k, v, do = (torch.randn(b, n, s, d, dtype=dtype) for _ in range(4))
            tq, tk, tv = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
            flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            o, lse = flash(q, k, v, 0.0, True)
            fq, fk, fv, fo = (x.reshape(b * n, s, d).contiguous() for x in (q, k, v, do))
            bias = torch.full((1, s, s), float("-inf"), dtype=dtype).triu(1)
            eo, p = explicit_forward(fq, fk, fv, bias)
            works: dict[str, Callable[[], Any]] = {
                "flash fwd": lambda: flash(q, k, v, 0.0, True),
                "flash fwd [s,n,d] strides": lambda: flash(tq, tk, tv, 0.0, True),
                "flash bwd": lambda: back(do, q, k, v, o, lse, 0.0, True),
                "bmm fwd": lambda: explicit_forward(fq, fk, fv, bias),
                "bmm bwd": lambda: explicit_backward(fo, fq, fk, fv, eo, p),
            }
            ms = {key: round(best(work, seconds) * 1e3, 3) for key, work in works.items()}
            rows.append({"shape": name, "dtype": label, **ms})
    return rows


def one_pass_loss(x: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy whose gradient overwrites the logits [T, v]; fp32 only per chunk of rows."""
    total = torch.zeros(())
    for part, label in zip(x.split(64), labels.split(64), strict=True):
        f = part.float()
        lse = f.logsumexp(-1, keepdim=True)
        total += (lse.squeeze(1) - f.gather(1, label[:, None]).squeeze(1)).sum()
        f.sub_(lse).exp_()
        f.scatter_add_(1, label[:, None], torch.full((len(label), 1), -1.0))
        part.copy_(f)
    return total


def leaf_rows(seconds: float) -> list[Row]:
    """Milliseconds of the operations between the matrix products, eager."""
    rows = []
    for name, (t, h, f, v) in LEAVES.items():
        for label, dtype in DTYPES.items():
            x, w = torch.randn(t, h, dtype=dtype), torch.ones(h, dtype=dtype)
            g, gu = torch.randn(t, f, dtype=dtype), torch.randn(t, 2 * f, dtype=dtype)
            logits, labels = torch.randn(t, v, dtype=dtype), torch.randint(v, (t,))
            xg, wg = x.clone().requires_grad_(), w.clone().requires_grad_()
            ug = gu.clone().requires_grad_()
            lg = logits.clone().requires_grad_()
            big = torch.empty(t, v, dtype=dtype)
            works: dict[str, Callable[[], Any]] = {
                "rms_norm fwd": lambda: F.rms_norm(x, (h,), w, 1e-5),
                "rms_norm fwd by hand": lambda: (
                    x * (x.float().square().mean(-1, keepdim=True) + 1e-5).rsqrt().to(x.dtype)
                ).mul_(w),
                "rms_norm fwd+bwd": lambda: torch.autograd.grad(F.rms_norm(xg, (h,), wg, 1e-5), (xg, wg), x),
                "layer_norm fwd+bwd": lambda: torch.autograd.grad(F.layer_norm(xg, (h,), wg), (xg, wg), x),
                "swiglu fwd": lambda: F.silu(gu[:, :f]) * gu[:, f:],
                "swiglu fwd+bwd": lambda: torch.autograd.grad(F.silu(ug[:, :f]) * ug[:, f:], ug, g),
                "add residual": lambda: x + x,
                "cross entropy fwd+bwd (float)": lambda: torch.autograd.grad(F.cross_entropy(lg.float(), labels), lg),
                "cross entropy one pass": lambda: one_pass_loss(big.copy_(logits), labels),
                "copy of the logits": lambda: big.copy_(logits),
                "cast fp32<->bf16 of the logits": lambda: logits.to(
                    torch.bfloat16 if dtype == torch.float32 else torch.float32
                ),
            }
            ms = {key: round(best(work, seconds) * 1e3, 3) for key, work in works.items()}
            rows.append({"shape": name, "dtype": label, **ms})
    return rows


def adam_rows(seconds: float) -> list[Row]:
    """Milliseconds per million parameters of optimizer work on one flat shard."""
    n = 8_000_000
    p, g, m, v = torch.randn(n), torch.randn(n), torch.zeros(n), torch.zeros(n)
    low, step = torch.empty(n, dtype=torch.bfloat16), torch.tensor(1.0)
    adam: Row = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8}
    adam |= {"amsgrad": False, "maximize": False}
    works: dict[str, Callable[[], Any]] = {
        "fused AdamW": lambda: torch._fused_adamw_([p], [g], [m], [v], [], [step], **adam),
        "norm by dot": lambda: torch.dot(g, g),
        "norm by vector_norm": lambda: torch.linalg.vector_norm(g),
        "zero": lambda: g.zero_(),
        "fp32 -> bf16": lambda: low.copy_(p),
        "bf16 -> fp32": lambda: p.copy_(low),
        "fp32 += bf16": lambda: g.add_(low),
        "fp32 += fp32": lambda: g.add_(p),
        "fp32 *= scalar": lambda: g.mul_(0.999),
    }
    return [{"operation": key, "ms per M": round(best(w, seconds) * 1e3 / (n / 1e6), 3)} for key, w in works.items()]


def comm_rows(seconds: float) -> list[Row]:
    """Milliseconds of each operation between two processes over gloo; run by both of them."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    rows = []
    for name, mib in (("4 B", 4 / 2**20), ("1.5 MiB", 1.5), ("3 MiB", 3.0), ("64 MiB", 64.0)):
        full = torch.ones(max(2, int(mib * 2**20) // 4) // 2 * 2)
        half, low = torch.empty(len(full) // 2), full.bfloat16()

        def exchange(full: Tensor = full) -> None:
            (dist.send if rank == 0 else dist.recv)(full, 1 - rank)

        def pair(full: Tensor = full) -> None:
            ops = [dist.P2POp(dist.isend, full, 1 - rank), dist.P2POp(dist.irecv, full.clone(), 1 - rank)]
            for work in dist.batch_isend_irecv(ops):
                work.wait()

        works: dict[str, Callable[[], Any]] = {
            "send/recv": exchange,
            "send and recv at once": pair,
            "all_reduce": lambda: dist.all_reduce(full.fill_(1.0)),
            "all_reduce bf16 (half the bytes)": lambda: dist.all_reduce(low.fill_(1.0)),
            "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(half, full),
            "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(full, half),
        }
        row: Row = {"full tensor": name}
        for key, work in works.items():
            dist.barrier()
            times = []
            for _ in range(8 if mib > 32 else 30):
                start = time.perf_counter()
                work()
                times.append(time.perf_counter() - start)
            dist.barrier()
            row[key] = round(min(times[2:]) * 1e3, 3)
        rows.append(row)
    dist.destroy_process_group()
    return rows


MEASURE: dict[str, Callable[[float], list[Row]]] = {
    "gemm": gemm_rows,
    "wgrad": wgrad_rows,
    "attention": attention_rows,
    "leaves": leaf_rows,
    "adam": adam_rows,
    "comm": comm_rows,
}
UNITS = {
    "gemm": "GFLOP/s",
    "wgrad": "ms",
    "attention": "ms",
    "leaves": "ms",
    "adam": "ms per million fp32 elements",
    "comm": "ms, 2 processes",
}


def probe(dtype: torch.dtype) -> float:
    """GFLOP/s of a 1024-cubed product, through torch or oneDNN, whichever is faster here."""
    a, b = (torch.randn(1024, 1024, dtype=dtype) for _ in range(2))
    ways = (lambda: torch.mm(a, b.t()), lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    times = [attempt(way, 1.0) for way in ways]
    return 2 * 1024**3 / min(t for t in times if t) / 1e9


def child(section: str, threads: int, seconds: float, ranks: int = 1) -> list[Row]:
    """Measure one section in fresh processes (so that the number of threads holds from the start)."""
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for rank in range(ranks):
            env = os.environ | {"OMP_NUM_THREADS": str(threads), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577", "MALLOC_MMAP_MAX_": "0"}
            env |= {"MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456"}
            out = Path(folder) / f"{rank}.json"
            command = [sys.executable, __file__, "--child", section, "--seconds", str(seconds), "--out", str(out)]
            running.append((subprocess.Popen(command, env=env), out))
        for process, _ in running:
            if process.wait():
                raise SystemExit(f"measuring {section} with {threads} threads failed")
        rows: list[Row] = json.loads(running[0][1].read_text())
    return rows


def table(rows: list[Row]) -> str:
    """Rows of equal keys as a Markdown table."""
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    for row in rows:
        lines.append("| " + " | ".join("-" if row[k] is None else str(row[k]) for k in keys) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma-separated")
    parser.add_argument("--threads", default="1,2", help="thread counts, comma-separated")
    parser.add_argument("--seconds", type=float, default=0.1, help="time per figure")
    parser.add_argument("--out", type=Path, help="also write the tables here")
    parser.add_argument("--probe", choices=DTYPES, help="print only the GFLOP/s of a large product")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        print(round(probe(DTYPES[args.probe]), 1))
        return
    if args.child:
        torch.manual_seed(0)
        args.out.write_text(json.dumps(MEASURE[args.child](args.seconds)))
        return
    text = f"torch {torch.__version__}, {os.cpu_count()} cores\n"
    print(text)
    for section in args.only.split(","):
        counts = [1] if section == "comm" else [int(n) for n in args.threads.split(",")]
        for threads in counts:
            rows = child(section, threads, args.seconds, ranks=2 if section == "comm" else 1)
            part = f"\n## {section}, {threads} thread(s) [{UNITS[section]}]\n\n{table(rows)}"
            print(part, flush=True)
            text += part
            if args.out:
                args.out.write_text(text)


if __name__ == "__main__":
    main()
