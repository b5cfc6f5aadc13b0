"""The layout does not show, over NCCL: the parity matrix with several ranks on the one GPU, against one rank.

    python benchmarks/gpu_nccl.py                          bf16 and fp32, all rows, up to 8 ranks
    python benchmarks/gpu_nccl.py --dtypes fp64 --rows 6   six rows that together use every axis
    python benchmarks/gpu_nccl.py --seconds 90             start no row that may not end by then
    python benchmarks/gpu_nccl.py --device cpu --rows 2    the same over gloo: does the script work?
    python benchmarks/gpu_nccl.py --out DIR                where results go; default benchmarks/results

NCCL refuses two ranks on one GPU unless it takes them for different hosts: every rank has an NCCL_HOSTID of its own,
and talks through sockets (`tests.pool.sharing_a_gpu`).  Each row trains 20 steps, as in `tests/parity/matrix.py`; the
numbers are the largest relative deviations of loss and gradient norm over steps and ranks.  LIMITS are wider than on
the CPU, where sums have one order: kernels of a GPU add in an order of their own.  The exit status is 1 if a row is
beyond them.  `gpu_nccl.json` and `gpu_nccl.md` are written after each row; on a CPU only with `--out`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from report import add_place, choose_place, header, machine, replace_file, table  # noqa: E402

from tests.parity.matrix import FURTHER, VALUES, Comparison, Layout, matrix  # noqa: E402
from tests.pool import Pool, WorkerError  # noqa: E402

LIMITS = {"fp64": (1e-10, 1e-10), "fp32": (1e-3, 1e-3), "bf16": (5e-3, 5e-2)}  # of loss, of gradient norm


def ordered(layouts: list[Layout]) -> list[Layout]:
    """Each next row has the most values of settings that no row before it had; fewer ranks first among equals.

    Rows of one rank, which talk to nobody, come last.
    """
    seen: set[tuple[str, Any]] = set()
    out: list[Layout] = []
    while layouts:

        def new(layout: Layout) -> set[tuple[str, Any]]:
            return {(name, getattr(layout, name)) for name in VALUES} - seen

        best = max(layouts, key=lambda layout: (layout.ranks > 1, len(new(layout)), -layout.ranks))
        seen |= new(best)
        layouts.remove(best)
        out.append(best)
    return out


def write(rows: list[dict[str, str]], args: argparse.Namespace) -> str:
    """The table; also into the folder for results, where there is one."""
    limits = ", ".join(f"{dtype} {loss:g} and {norm:g}" for dtype, (loss, norm) in LIMITS.items())
    text = header("The parity matrix over NCCL on one GPU", args) + table(rows)
    text += f"\nLimits of loss and norm: {limits}.\n"
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        content = {**machine(), "command": sys.argv, "rows": rows}
        replace_file(args.out / "gpu_nccl.json", json.dumps(content, indent=1) + "\n")
        replace_file(args.out / "gpu_nccl.md", text)
    return text


def compare(comparison: Comparison, layout: Layout, dtypes: list[str]) -> dict[str, str]:
    """A line of the table."""
    line = {"ranks": str(layout.ranks), "layout": str(layout)}
    fine = True
    for dtype in dtypes:
        try:
            loss, norm = comparison.deviations(layout, dtype)
            good = loss <= LIMITS[dtype][0] and norm <= LIMITS[dtype][1]
            line |= {f"loss {dtype}": f"{loss:.1e}", f"norm {dtype}": f"{norm:.1e}"}
        except WorkerError as error:
            print(f"{layout} {dtype}: {error}", file=sys.stderr, flush=True)
            good, why = False, str(error).strip().splitlines()[-1][:80].replace("|", "/")
            line |= {f"loss {dtype}": f"failed: {why}", f"norm {dtype}": ""}
        fine = fine and good
    return line | {"within limits": "yes" if fine else "NO"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_place(parser)
    parser.add_argument("--dtypes", default="bf16,fp32")
    parser.add_argument("--rows", type=int, default=1000, help="at most so many")
    parser.add_argument("--seconds", type=float, default=3600, help="start no row that may not end within this")
    args = parser.parse_args()
    if choose_place(args) == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"error: torch {torch.__version__} finds no GPU; --device cpu compares over gloo")
    begin, longest = time.monotonic(), 0.0
    pool = Pool(args.device)
    comparison = Comparison(pool)
    rows: list[dict[str, str]] = []
    try:
        for layout in ordered([*matrix(), *FURTHER])[: args.rows]:
            start = time.monotonic()
            if args.seconds - (start - begin) < longest:
                print(f"not compared, the time was over: {layout}", flush=True)
                continue
            rows.append(compare(comparison, layout, args.dtypes.split(",")))
            print(json.dumps(rows[-1]), flush=True)
            write(rows, args)
            longest = max(longest, time.monotonic() - start)
    finally:
        pool.close()
    print("\n" + write(rows, args))
    return int(not rows or any(row["within limits"] == "NO" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
