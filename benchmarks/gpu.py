"""One GPU, whole training steps: tokens/s, MFU, share of the device's own ceiling, peak memory; beside transformers.

    python benchmarks/gpu.py                                 1.1B, 3B, 7B at sequences of 2048 and 4096
    python benchmarks/gpu.py --models 7b --seqs 2048 --systems ours,transformers --rounds 5
    python benchmarks/gpu.py --set memory.loss_chunk_mb=128        a setting of ours changed
    python benchmarks/gpu.py --seconds 240                   fewer rounds, and no row that may not end by then
    python benchmarks/gpu.py --cpu-check                     all of it on a tiny model, on the CPU; writes nothing

Systems: `ours` with the kernels it chooses, `ours-torch` without Transformer Engine, `ours-fp8` with
precision.fp8=tensorwise, and transformers' LlamaForCausalLM (fp32 weights under bf16 autocast, SDPA, fused AdamW: it
keeps fp32 master weights as ours does).  A row is one process; the systems take turns, `--rounds` times, each built
anew, one step to warm up and then `--steps` without a pause; a figure is the median over rounds.

A step has `--tokens` tokens.  Micro-batch and recomputation are the first of CHOICES with which the plan's bytes, and
4 GB for work buffers, fit into 95 % of the device; what runs out of memory all the same goes on to the next.  A model
that fits nowhere loses layers, four at a time, and its name says so: nothing is extrapolated.

The ceiling is measured in the same process: every GEMM shape of the step and attention, alone, repeated, times how
often a step has them.  "Of ceiling" is that sum over the step's time.  MFU counts causal or full attention, relative
to the data sheet's bf16 peak (also with fp8).  Rows are printed as they come; on a GPU `results/gpu.json` and `gpu.md`
are written after each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import RESULTS, header, machine, median, table

MODELS = {
    "7b": ("model.preset=llama-7b",),
    "1.1b": (
        "model.hidden_size=2048", "model.num_layers=22", "model.num_heads=16", "model.ffn_hidden_size=5632",
        "model.vocab_size=32000",
    ),
    "3b": (
        "model.hidden_size=3072", "model.num_layers=28", "model.num_heads=24", "model.ffn_hidden_size=8192",
        "model.vocab_size=32000",
    ),
    "tiny": (
        "model.hidden_size=64", "model.num_layers=2", "model.num_heads=4", "model.ffn_hidden_size=96",
        "model.vocab_size=128",
    ),
}  # fmt: skip
CHOICES = (  # tokens of a micro-batch, memory.recompute
    (8192, "none"), (4096, "none"), (8192, "selective"), (4096, "selective"), (2048, "none"), (2048, "selective"),
    (4096, "full"), (2048, "full"),
)  # fmt: skip
SYSTEMS: dict[str, tuple[str, ...]] = {
    "ours": (), "transformers": (), "ours-torch": ('run.without_kernels=["Transformer Engine"]',),
    "ours-fp8": ("precision.fp8=tensorwise",),
}  # fmt: skip
WORK_BYTES = 4e9


@dataclass
class Row:
    """One process: a model at a sequence length."""

    model: str
    seq: int
    systems: tuple[str, ...]
    rounds: int
    steps: int
    tokens: int
    settings: tuple[str, ...]
    device: str
    until: float = float("inf")  # by time.time(): no system begins a second round after it

    def run(self) -> None:
        """Measure, and say every result as a JSON line."""
        Measurement(self).run()


class Measurement:
    """What a row's process does; torch is imported here, not in the parent."""

    def __init__(self, row: Row) -> None:
        sys.path.insert(0, str(Path(__file__).resolve().parent / "drivers"))
        import one_rank
        import torch

        from megallama.plan import memory, plan, work
        from megallama.train import assemble, speed, step

        self.row, self.one, self.torch = row, one_rank, torch
        self.work, self.memory, self.plan, self.step = work, memory, plan, step
        self.kernels_of, self.dtypes, self.peak_flops = assemble.kernels_of, assemble.DTYPES, speed.peak_flops
        self.device = torch.device(row.device)
        if self.device.type == "cuda":
            if not torch.cuda.is_available():
                raise SystemExit(one_rank.NO_GPU)
            torch.cuda.set_device(self.device)
        self.layers: list[str] = []  # an override that takes layers away
        self.given_up: dict[str, int] = {}  # system -> choices that ran out of memory

    # ---- what fits ----

    def config(self, tokens: int, recompute: str, extra: tuple[str, ...] = ()) -> Any:
        """Of a micro-batch of `tokens`."""
        row = self.row
        batch = [f"batch.seq_length={row.seq}", f"batch.micro_batch_size={tokens // row.seq}"]
        batch += [f"batch.global_batch_size={row.tokens // row.seq}", f"memory.recompute={recompute}"]
        return self.one.config_of([*MODELS[row.model], *batch, *self.layers, *row.settings, *extra])

    def planned_bytes(self, config: Any) -> int:
        """The plan's total for this configuration."""
        plan = self.plan.make_plan(config, 1)
        return self.memory.rank_memory(config, plan.stages, plan.schedule, 1, 0).total

    def fitting(self) -> list[tuple[int, str]]:
        """The choices that fit, best first; layers are taken away until there is one."""
        row = self.row
        room = 0.95 * self.one.capacity_bytes(self.device) - WORK_BYTES * (row.model != "tiny")
        choices = [c for c in CHOICES if c[0] % row.seq == 0 and row.tokens % c[0] == 0]
        if row.model == "tiny":
            choices = [(row.seq, "none"), (row.seq, "selective")]
        layers = self.config(*choices[0]).model.num_layers
        while True:
            fit = [c for c in choices if self.planned_bytes(self.config(*c)) <= room]
            if fit or layers <= 4:
                return fit or choices[-1:]
            layers -= 4
            self.layers = [f"model.num_layers={layers}"]

    # ---- the ceiling ----

    def ceiling(self, config: Any) -> dict[str, float]:
        """Seconds of a step's GEMMs and attention, each at the best rate seen here."""
        torch, one, dev = self.torch, self.one, self.device
        m, b = config.model, config.batch
        n, k, d = m.num_heads, m.num_kv_heads, m.head_dim
        tokens, dtype = b.micro_batch_size * b.seq_length, self.dtypes[config.precision.dtype]
        micro = b.global_batch_size // b.micro_batch_size
        h, f = m.hidden_size, m.ffn_hidden_size
        shapes = [(h, (n + 2 * k) * d, m.num_layers), (n * d, h, m.num_layers), (h, 2 * f, m.num_layers)]
        shapes += [(f, h, m.num_layers), (h, m.vocab_size, 1)]
        gemm = 0.0
        for inside, out, times in shapes:
            sizes = (tokens, inside), (tokens, out), (out, inside)
            x, dy, w = (torch.randn(size, device=dev, dtype=dtype) for size in sizes)
            works = (lambda: x @ w.t(), lambda: dy @ w, lambda: dy.t() @ x)
            gemm += times * sum(one.seconds_per_call(work, dev) for work in works)
        attention = min(self.attention_seconds(attend, config) for attend in self.attentions(config))
        return {"gemm": gemm * micro, "attention": attention * m.num_layers * micro}

    def attentions(self, config: Any) -> list[Any]:
        """The chosen attention, and torch's."""
        from megallama.kernels.attention import sdpa

        m = config.model
        return [self.kernels_of(config, self.device).attention(m.num_heads, m.num_kv_heads, m.head_dim), sdpa]

    def attention_seconds(self, attend: Any, config: Any) -> float:
        """Forward and backward of one layer's attention."""
        b, m = config.batch, config.model
        q, k, v = (
            self.torch.randn(
                b.micro_batch_size, b.seq_length, heads, m.head_dim,
                device=self.device, dtype=self.dtypes[config.precision.dtype], requires_grad=True,
            )
            for heads in (m.num_heads, m.num_kv_heads, m.num_kv_heads)
        )  # fmt: skip
        out = attend(q, k, v)
        grad = self.torch.randn_like(out)

        def both() -> None:
            self.torch.autograd.grad(attend(q, k, v), (q, k, v), grad)

        return self.one.seconds_per_call(both, self.device)

    # ---- the systems ----

    def ours(self, system: str, choice: tuple[int, str]) -> dict[str, Any]:
        """A round of our own training step."""
        config = self.config(*choice, SYSTEMS[system])
        rank, kernels = self.one.build(config, self.device)
        batches = self.one.random_batches(rank.plan, self.device)
        schedule = rank.plan.schedule_for(len(batches))

        def once() -> float:
            return self.step.train_step(rank, schedule, batches, lr=1e-5).loss

        return {**self.timed(once), "kernels": kernels, "planned_bytes": self.planned_bytes(config)}

    def transformers(self, system: str, choice: tuple[int, str]) -> dict[str, Any]:
        """A round of transformers' model under a plain loop; checkpointing where our choice recomputes in full."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch, dev, config = self.torch, self.device, self.config(*choice)
        m = config.model
        settings = LlamaConfig(
            vocab_size=m.vocab_size, hidden_size=m.hidden_size, intermediate_size=m.ffn_hidden_size,
            num_hidden_layers=m.num_layers, num_attention_heads=m.num_heads, num_key_value_heads=m.num_kv_heads,
            max_position_embeddings=self.row.seq, use_cache=False, tie_word_embeddings=False,
            attn_implementation="sdpa",
        )  # fmt: skip
        with torch.device("meta"):
            model = LlamaForCausalLM(settings)
        model.to_empty(device=dev)
        for name, weight in model.named_parameters():
            torch.nn.init.ones_(weight) if "norm" in name else torch.nn.init.normal_(weight, std=0.02)
        model.model.rotary_emb = type(model.model.rotary_emb)(settings).to(dev)  # its buffers are no parameters
        model.train()
        if choice[1] == "full":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
        )
        batches = self.one.random_batches(self.plan.make_plan(config, 1), dev)

        def once() -> float:
            total = 0.0
            for batch in batches:
                with torch.autocast(dev.type, torch.bfloat16):
                    loss = model(input_ids=batch.tokens, labels=batch.tokens).loss
                (loss / len(batches)).backward()
                total = total + loss.detach() / len(batches)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return float(total)

        return self.timed(once)

    def timed(self, once: Any) -> dict[str, Any]:
        """Seconds of a step, its loss and the peak of memory."""
        loss = once()
        self.one.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(self.row.steps):
            loss = once()
        self.one.synchronize(self.device)
        seconds = (time.perf_counter() - start) / self.row.steps
        return {"seconds": seconds, "loss": loss, "peak_bytes": self.one.peak_bytes(self.device)}

    def one_round(self, system: str, choices: list[tuple[int, str]]) -> dict[str, Any]:
        """A round with the first choice that does not run out of memory."""
        work = self.transformers if system == "transformers" else self.ours
        while True:
            at = self.given_up.get(system, 0)
            self.one.free(self.device)
            try:
                return {**work(system, choices[at]), "choice": choices[at]}
            except self.torch.cuda.OutOfMemoryError:
                if at + 1 == len(choices):
                    raise
                self.given_up[system] = at + 1

    def run(self) -> None:
        """Rounds in turn; a system that fails is named and left out."""
        row, choices = self.row, self.fitting()
        config = self.config(*choices[0])
        known = self.peak_flops(self.device, self.dtypes["bf16"])
        peak = known or self.one.measure_peak(self.device, self.dtypes["bf16"])
        origin = "known" if known else "measured"
        per_token = {c: self.work.training_flops(config.model, row.seq, causal=c) for c in (True, False)}
        name = row.model + (f" with {config.model.num_layers} layers" if self.layers else "")
        self.one.say(kind="row", row=f"{name} {row.seq}", **self.one.describe(self.device), peak=f"{peak:.4g} {origin}")
        ceiling = self.ceiling(config)
        self.one.free(self.device)
        share = ceiling["attention"] / sum(ceiling.values())
        self.one.say(kind="ceiling", row=f"{name} {row.seq}", attention_share=round(share, 3), **ceiling)
        tight = 1.25 * self.planned_bytes(config) > self.one.capacity_bytes(self.device)
        full = [(tokens, "full") for tokens in sorted({c for c, _ in choices}, reverse=True)]
        theirs = full if tight else [*choices, *full]  # transformers keeps more: it may have to checkpoint
        seen: dict[str, list[dict[str, Any]]] = {}
        for number in range(row.rounds):
            for system in list(row.systems):
                if number and (system not in seen or time.time() > row.until):
                    continue
                try:
                    own = self.one_round(system, theirs if system == "transformers" else choices)
                except Exception as error:  # noqa: BLE001 - the other systems go on
                    seen.pop(system, None)
                    why = f"{type(error).__name__}: {error}"[:500]
                    self.one.say(kind="failed", row=f"{name} {row.seq}", system=system, why=why)
                    continue
                seen.setdefault(system, []).append(own)
                rates = [row.tokens / x["seconds"] for x in seen[system]]
                rate = median(rates)
                self.one.say(
                    kind="result", row=f"{name} {row.seq}", system=system, rounds=[round(x, 1) for x in rates],
                    tokens_per_second=round(rate, 1), mfu_causal=rate * per_token[True] / peak,
                    mfu_full=rate * per_token[False] / peak,
                    of_ceiling=sum(ceiling.values()) * rate / row.tokens, **own,
                )  # fmt: skip


def cells(result: dict[str, Any]) -> dict[str, str]:
    """A line of the table."""
    tokens, recompute = result["choice"]
    planned = f" ({result['planned_bytes'] / 1e9:.1f})" if "planned_bytes" in result else ""
    return {
        "model, sequence": result["row"],
        "system": result["system"],
        "micro-batch [tokens], recompute": f"{tokens}, {recompute}",
        "tokens/s": f"{result['tokens_per_second']:.0f}",
        "rounds": " ".join(f"{x:.0f}" for x in result["rounds"]),
        "MFU causal": f"{100 * result['mfu_causal']:.1f}%",
        "MFU full": f"{100 * result['mfu_full']:.1f}%",
        "of ceiling": f"{result['of_ceiling']:.2f}",
        "peak GB (plan)": f"{result['peak_bytes'] / 1e9:.1f}{planned}",
        "kernels": "; ".join(result.get("kernels", ())),
    }


def write(output: list[dict[str, Any]], args: argparse.Namespace, name: str = "gpu") -> str:
    """The table of what was said so far; on a GPU also into `results/`."""
    last = {(x["row"], x["system"]): x for x in output if x["kind"] == "result"}
    notes = [f"- {x['row']}: {x['system']} failed: {x['why']}" for x in output if x["kind"] == "failed"]
    about = [f"- {key}: {value}" for x in output[:1] for key, value in x.items() if key not in ("kind", "row")]
    lines = [header("Training steps on one GPU", args) + "\n".join(about), "", table([cells(x) for x in last.values()])]
    text = "\n".join([*lines, *notes, ""])
    if args.device == "cuda" and last:
        content = {**machine(), "command": sys.argv, "said": output}
        (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
        (RESULTS / f"{name}.md").write_text(text)
    return text


def rows(args: argparse.Namespace) -> list[Row]:
    """The rows asked for, the most telling first."""
    sequences, systems = [int(s) for s in args.seqs.split(",")], tuple(args.systems.split(","))
    return [
        Row(model, seq, systems, args.rounds, args.steps, args.tokens, tuple(args.set), args.device)
        for seq in sequences
        for model in args.models.split(",")
    ]


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One process per row; what they said. A row that dies costs its own results only."""
    output: list[dict[str, Any]] = []
    begin, longest = time.monotonic(), 0.0
    todo = rows(args)
    for number, row in enumerate(todo):
        start = time.monotonic()
        left = args.seconds - (start - begin)
        if left < longest:
            print(f"not measured, {left:.0f} s are left: {row.model} {row.seq}", flush=True)
            continue
        same = sum(other.seq == row.seq for other in todo[number:])
        row.until = time.time() + 0.8 * left / same
        command = [sys.executable, __file__, "--row", json.dumps(row.__dict__)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                if line.startswith("{"):
                    output.append(json.loads(line))
        if process.returncode:
            why = f"status {process.returncode}"
            output.append({"kind": "failed", "row": f"{row.model} {row.seq}", "system": "the row", "why": why})
        write(output, args)
        longest = max(longest, time.monotonic() - start)
    return output


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="7b,1.1b,3b")
    parser.add_argument("--seqs", default="2048,4096")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps per round")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens per step")
    parser.add_argument("--seconds", type=float, default=3600, help="start no row that may not end within this")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of ours")
    parser.add_argument("--cpu-check", action="store_true", help="a tiny model on the CPU: does the script work?")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.device = "cuda"
    if args.row:
        arguments = json.loads(args.row)
        Row(**{k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}).run()
        return 0
    if args.cpu_check:
        args.device, args.models, args.seqs, args.tokens, args.rounds = "cpu", "tiny", "32,64", 128, 2
    output = measure(args)
    print("\n" + write(output, args))
    return int(not any(x["kind"] == "result" for x in output))


if __name__ == "__main__":
    sys.exit(main())
