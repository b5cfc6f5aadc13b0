"""One rank of LLaMA-65B on 2048 GPUs, on one GPU: its true shards, schedule and memory; the other ranks are pretended.

    python benchmarks/gpu_rank.py                              tp8 x pp8 and tp4 x pp8; first, middle and last stage
    python benchmarks/gpu_rank.py --layouts tp8pp8 --positions 3 --schedules zb-h1
    python benchmarks/gpu_rank.py --set memory.recompute=none  a setting changed
    python benchmarks/gpu_rank.py --seconds 60                 start nothing that may not end by then
    python benchmarks/gpu_rank.py --device cpu                 all of it on a tiny model, on the CPU
    python benchmarks/gpu_rank.py --out DIR                    where results go; default benchmarks/results

The rank runs the program's own training step.  Its groups pretend: a gather writes every byte of its output by copies
on the device, a reduction copies this rank's part, a receive makes random numbers, nothing is waited for.  So the
shapes, kernels, launches and allocations are those of the job; the loss means nothing, and communication costs what
its bytes cost the device's own memory, not a network.

Per stage and kind of action (forward, backward; input and weight gradient with zb-h1) the table has the time between
events on the device and the time in which the host issued it, medians over the micro-batches of a step; "issue /
device" is that of the whole pipeline part: near 1, the device waits for the host's launches.  Peak memory stands beside
the plan's: weights, gradients, optimizer, kept activations and a chunk of logits.  The rest are work buffers.

`gpu_rank.json` and `gpu_rank.md` are written after each rank; on a CPU only with `--out`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "drivers"))

import gpu_state  # noqa: E402
import one_rank  # noqa: E402
import torch  # noqa: E402
from report import add_place, choose_place, header, machine, median, replace_file, table  # noqa: E402

from megallama.pipeline.runtime import Observer  # noqa: E402
from megallama.plan.memory import rank_memory  # noqa: E402
from megallama.train.step import train_step  # noqa: E402

LAYOUTS = {
    "tp8pp8": (2048, ("model.preset=llama-65b", "parallel.tp=8", "parallel.pp=8", "batch.micro_batch_size=1")),
    "tp4pp8": (2048, ("model.preset=llama-65b", "parallel.tp=4", "parallel.pp=8", "batch.micro_batch_size=1")),
    "tiny": (
        16,
        ("model.hidden_size=64", "model.num_layers=4", "model.num_heads=4", "model.ffn_hidden_size=96",
         "model.vocab_size=128", "batch.seq_length=32", "batch.micro_batch_size=1", "parallel.tp=2", "parallel.pp=4"),
    ),
}  # fmt: skip
KINDS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}


class Clock(Observer):
    """Readings of the host's clock, each with an event on the device, at the ends of actions, by number."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._host: list[float] = []
        self._events: list[Any] = []
        self.timings: list[list[float]] = []  # start and end of every action, and of the wait for the last sends

    def started(self, action: Any) -> None:
        self.timings.append([self()])

    def ended(self) -> None:
        self.timings[-1].append(self())

    def __call__(self) -> float:
        self._host.append(time.perf_counter())
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        return float(len(self._host) - 1)

    def host(self, a: float, b: float) -> float:
        """Seconds between two readings on the host."""
        return self._host[int(b)] - self._host[int(a)]

    def device(self, a: float, b: float) -> float:
        """Seconds between them on the device, which must be done."""
        if not self._cuda:
            return self.host(a, b)
        return float(self._events[int(a)].elapsed_time(self._events[int(b)])) / 1e3


def actions(rank: Any, schedule: Any, batches: list[Any], device: torch.device) -> dict[str, dict[str, float]]:
    """Kind -> milliseconds of its median action, on the device and to issue; and of the whole pipeline part."""
    rank.runtime.observer = clock = Clock(device)
    begin = clock()
    train_step(rank, schedule, batches, lr=1e-5)
    one_rank.synchronize(device)
    rank.runtime.observer = Observer()
    seen: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for action, at in zip(schedule.steps[rank.groups.pp.rank], clock.timings, strict=False):
        if action.kind.is_compute:
            seen[KINDS[str(action.kind.value)]].append((clock.device(*at), clock.host(*at)))
    out = {
        kind: {
            "device_ms": 1e3 * median([d for d, _ in x]), "issue_ms": 1e3 * median([h for _, h in x]), "count": len(x),
        }
        for kind, x in seen.items()
    }  # fmt: skip
    whole = begin, clock.timings[-1][1]
    out["pipeline"] = {"device_ms": 1e3 * clock.device(*whole), "issue_ms": 1e3 * clock.host(*whole), "count": 1}
    return out


def measure(
    layout: str, position: int, schedule: str, args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """One rank: build it, warm it up, time whole steps, then one step action by action."""
    ranks, settings = LAYOUTS[layout]
    overrides = [*settings, f"parallel.schedule={schedule}", *args.set]
    parallel = one_rank.config_of(settings, ranks).parallel
    dp = ranks // (parallel.tp * parallel.pp)
    config = one_rank.config_of([*overrides, f"batch.global_batch_size={dp * args.microbatches}"], ranks)
    topology = one_rank.make_plan(config, ranks).topology
    here = {"pp": position, "tp": 0, "dp": 0}
    own = next(r for r in range(ranks) if topology.coords(r).items() >= here.items())
    one_rank.free(device)
    rank, kernels = one_rank.build(config, device, ranks, own)
    batches = one_rank.random_batches(rank.plan, device)
    steps = rank.plan.schedule_for(len(batches))
    if not train_step(rank, steps, batches, lr=1e-5).applied:
        raise ArithmeticError("the pretended numbers are not finite: nothing of the optimizer was measured")
    one_rank.synchronize(device)
    step_seconds = []
    with args.state.during() as gpu:
        for _ in range(args.steps):
            start = time.perf_counter()
            train_step(rank, steps, batches, lr=1e-5)
            one_rank.synchronize(device)
            step_seconds.append(time.perf_counter() - start)
    planned = rank_memory(config, rank.plan.stages, rank.plan.schedule, dp, position)
    times = actions(rank, steps, batches, device)
    busy = sum(x["device_ms"] * x["count"] for kind, x in times.items() if kind != "pipeline")
    return {
        "layout": layout, "position": position, "schedule": schedule,
        "layers": [len(rank.plan.stages[s]) for s in rank.stages],
        "step_seconds": median(step_seconds), "every_step": [round(t, 5) for t in step_seconds], "gpu": gpu,
        "microbatches": len(batches), "times": times,
        "issue_over_device": times["pipeline"]["issue_ms"] / times["pipeline"]["device_ms"],
        "outside_actions": 1 - busy / times["pipeline"]["device_ms"],
        "peak_bytes": one_rank.peak_bytes(device), "planned_bytes": planned.total,
        "persistent_bytes": planned.persistent,
        "kernels": kernels,
    }  # fmt: skip


def cells(result: dict[str, Any]) -> dict[str, str]:
    """A line of the table."""
    times = result["times"]

    def both(kind: str) -> str:
        x = times.get(kind)
        return f"{x['device_ms']:.2f} ({x['issue_ms']:.2f})" if x else ""

    return {
        "rank": f"{result['layout']}, stage {result['position']} ({result['layers'][0]} layers), {result['schedule']}",
        **{f"{kind} [ms], device (issued in)": both(kind) for kind in KINDS.values()},
        "step [s]": f"{result['step_seconds']:.3f}",
        "issue / device": f"{result['issue_over_device']:.2f}",
        "peak GB": f"{result['peak_bytes'] / 1e9:.2f}",
        "plan GB": f"{result['planned_bytes'] / 1e9:.2f}",
        "peak / plan": f"{result['peak_bytes'] / result['planned_bytes']:.3f}",
    }


def write(results: list[dict[str, Any]], failed: list[str], args: argparse.Namespace, device: torch.device) -> str:
    """The table; also into the folder for results, where there is one."""
    about = [f"- {key}: {value}" for key, value in one_rank.describe(device).items()]
    about += [f"- kernels: {'; '.join(results[0]['kernels'])}"] if results else []
    start = header("One rank of LLaMA-65B on one GPU", args)
    lines = [start + "\n".join(about), "", table([cells(x) for x in results])]
    lines += [
        f"{args.microbatches} micro-batches a step; times are medians over the micro-batches of one step. Where "
        "issue / device is near 1, the device waits for the host.", *failed, "",
    ]  # fmt: skip
    text = "\n".join(lines)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        content = {**machine(), **one_rank.describe(device), "command": sys.argv, "runs": results, "failed": failed}
        replace_file(args.out / "gpu_rank.json", json.dumps(content, indent=1) + "\n")
        replace_file(args.out / "gpu_rank.md", text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", default="tp8pp8,tp4pp8")
    parser.add_argument("--positions", default="3,7,0", help="pipeline positions, in this order")
    parser.add_argument("--schedules", default="zb-h1,1f1b")
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="timed steps")
    parser.add_argument("--seconds", type=float, default=3600, help="start nothing that may not end within this")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting")
    add_place(parser)
    args = parser.parse_args()
    device = torch.device(choose_place(args))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(one_rank.NO_GPU)
    args.state = gpu_state.State(device)
    if device.type == "cpu":
        args.layouts, args.microbatches, args.positions = "tiny", 4, "1,3,0"
    results: list[dict[str, Any]] = []
    failed: list[str] = []
    begin, longest = time.monotonic(), 0.0
    rows = [
        (layout, int(position), schedule)
        for position in args.positions.split(",")
        for layout in args.layouts.split(",")
        for schedule in args.schedules.split(",")
    ]
    for row in rows:
        start = time.monotonic()
        if args.seconds - (start - begin) < longest:
            failed.append(f"- {row}: not measured, the time was over")
            continue
        try:
            results.append(measure(*row, args, device))
            one_rank.say(**results[-1])
        except Exception as error:  # noqa: BLE001 - the other ranks go on
            failed.append(f"- {row} failed: {type(error).__name__}: {error}"[:500])
            one_rank.say(failed=failed[-1])
        write(results, failed, args, device)
        longest = max(longest, time.monotonic() - start)
    args.state.close()
    print("\n" + write(results, failed, args, device))
    return int(not results)


if __name__ == "__main__":
    sys.exit(main())
