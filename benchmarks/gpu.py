"""One GPU, whole training steps: tokens/s, MFU, share of the device's own ceiling, peak memory; beside transformers.

    python benchmarks/gpu.py                                 7B and 1.1B at a sequence of 2048
    python benchmarks/gpu.py --models 7b,3b --seqs 2048,4096 --systems ours,transformers --rounds 5
    python benchmarks/gpu.py --set memory.loss_chunk_mb=128        a setting of ours changed
    python benchmarks/gpu.py --seconds 240                   fewer rounds, and no row that may not end by then
    python benchmarks/gpu.py --device cpu                    all of it on a tiny model, on the CPU
    python benchmarks/gpu.py --out DIR                       where results go; default benchmarks/results

Systems: `ours` with the kernels it chooses, `ours-torch` without Transformer Engine, `ours-fp8` with
precision.fp8=tensorwise, `ours-compiled` with run.compile=true, and transformers' LlamaForCausalLM (fp32 weights under
bf16 autocast, SDPA, fused AdamW: it keeps fp32 master weights as ours does).  A system that here would be one before
it again (without Transformer Engine where it cannot be imported) is left out, with a line that says so.  A row is one
process; the systems take turns, `--rounds` times, each built anew, one step to warm up and then `--steps`, each timed;
a figure is the median over rounds.  Clocks, power and temperature are those of nvidia-smi while the steps of a round
ran.  In its first round a system makes one step more, under torch's profiler, for the time between kernels.

A step has `--tokens` tokens.  Micro-batch and recomputation are the first of CHOICES with which the plan's bytes, and
4 GB for work buffers, fit into 95 % of the device; what runs out of memory all the same goes on to the next.  A model
that fits nowhere loses layers, four at a time, and its name says so: nothing is extrapolated.

The ceiling is measured in the same process: every GEMM shape of the step and attention, alone, repeated, times how
often a step has them.  "Of ceiling" is that sum over the step's time.  MFU counts causal or full attention, relative
to the data sheet's bf16 peak (also with fp8).  Results are printed as they come, and `gpu.json` and `gpu.md` written
after each, so that a measurement that is cut off leaves what it had; on a CPU only with `--out`.  Ours and
transformers come first, of every model, then the other systems.
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

from report import add_place, choose_place, ending, header, machine, median, replace_file, table

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
SYSTEMS: dict[str, tuple[str, ...]] = {  # the most telling first: nobody knows how far it comes
    "ours": (), "transformers": (), "ours-fp8": ("precision.fp8=tensorwise",),
    "ours-compiled": ("run.compile=true",), "ours-torch": ('run.without_kernels=["Transformer Engine"]',),
}  # fmt: skip
FIRST = ("ours", "transformers")
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
    until: float = float("inf")  # by time.time(): no round begins that would not end by then, as it seems

    def run(self) -> None:
        """Measure, and say every result as a JSON line."""
        Measurement(self).run()


class Measurement:
    """What a row's process does; torch is imported here, not in the parent."""

    def __init__(self, row: Row) -> None:
        sys.path.insert(0, str(Path(__file__).resolve().parent / "drivers"))
        import gpu_state
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
        self.state, self.profiled, self.number = gpu_state.State(self.device), gpu_state.profiled, 0

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
        """Seconds of a step, of each one, its loss, the peak of memory, and what the device did meanwhile."""
        loss = once()
        self.one.synchronize(self.device)
        times = []
        with self.state.during() as device:
            for _ in range(self.row.steps):
                start = time.perf_counter()
                loss = once()  # it waits for the loss
                self.one.synchronize(self.device)
                times.append(time.perf_counter() - start)
        out = {"seconds": sum(times) / len(times), "step_seconds": [round(t, 5) for t in times], "loss": loss}
        out |= {"peak_bytes": self.one.peak_bytes(self.device), "device": device}
        return out | ({} if self.number else {"waits": self.profiled(once, self.device)})

    def again(self, system: str, choice: tuple[int, str]) -> str:
        """Why `system` is left out: which one before it, measured here or not, it would be once more."""
        if system == "transformers":
            return "" if self.one.installed("transformers") else "transformers is not installed"

        def key(name: str) -> str:
            config = self.config(*choice, SYSTEMS[name])
            chosen = [(c.operation, c.selected) for c in self.kernels_of(config, self.device).choices]
            return f"{chosen} {config.model_dump(exclude={'run'})}"

        for name in SYSTEMS:
            if name == system:
                return ""
            try:
                if name != "transformers" and key(name) == key(system):
                    return f"here it would be {name} again"
            except Exception:  # noqa: BLE001, S112 - whatever is wrong is said when it is measured
                continue
        return ""

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
        layers = f" with {config.model.num_layers} layers" if self.layers else ""
        self.name = f"{row.model}{layers} {row.seq}"
        self.one.say(kind="row", row=self.name, **self.one.describe(self.device), peak=f"{peak:.4g} {origin}")
        ceiling = self.ceiling(config)
        self.one.free(self.device)
        share = ceiling["attention"] / sum(ceiling.values())
        self.one.say(kind="ceiling", row=self.name, attention_share=round(share, 3), **ceiling)
        tight = 1.25 * self.planned_bytes(config) > self.one.capacity_bytes(self.device)
        full = [(tokens, "full") for tokens in sorted({c for c, _ in choices}, reverse=True)]
        theirs = full if tight else [*choices, *full]  # transformers keeps more: it may have to checkpoint
        seen: dict[str, list[dict[str, Any]]] = {}
        systems, longest = [*row.systems], 0.0
        for self.number in range(row.rounds):
            for system in [*systems]:
                start = time.time()
                if self.number == 0 and (why := self.again(system, choices[0])):
                    systems.remove(system)
                    self.one.say(kind="left out", row=self.name, system=system, why=why)
                    continue
                if seen and start + longest > row.until:
                    self.one.say(kind="cut", row=self.name, system=system, why=f"no time for round {self.number + 1}")
                    continue
                try:
                    own = self.one_round(system, theirs if system == "transformers" else choices)
                except Exception as error:  # noqa: BLE001 - the other systems go on
                    systems.remove(system)
                    why = f"{type(error).__name__}: {error}"[:500]
                    self.one.say(kind="failed", row=self.name, system=system, why=why)
                    continue
                longest = max(longest, time.time() - start)
                seen.setdefault(system, []).append(own)
                self.tell(system, seen[system], config, peak, sum(ceiling.values()))
        self.state.close()

    def tell(self, system: str, rounds: list[dict[str, Any]], config: Any, peak: float, ceiling: float) -> None:
        """Say what is known of a system after its newest round."""
        row = self.row
        causal, full = (self.work.training_flops(config.model, row.seq, causal=c) for c in (True, False))
        rates = [row.tokens / x["seconds"] for x in rounds]
        rate = median(rates)
        self.one.say(
            kind="result", row=self.name, system=system, rounds=[round(x, 1) for x in rates],
            tokens_per_second=round(rate, 1), mfu_causal=rate * causal / peak, mfu_full=rate * full / peak,
            of_ceiling=ceiling * rate / row.tokens, devices=[x["device"] for x in rounds],
            every_step=[x["step_seconds"] for x in rounds], **({"waits": rounds[0]["waits"]} | rounds[-1]),
        )  # fmt: skip


def cells(result: dict[str, Any]) -> dict[str, str]:
    """A line of the table."""
    tokens, recompute = result["choice"]
    waits, devices = result["waits"], [x for x in result["devices"] if x]
    state = "{sm_mhz:.0f} ({sm_mhz_least:.0f}), {watts:.0f}, {celsius:.0f}"
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
        "GPU idle between kernels": f"{100 * waits['idle_share']:.1f}%" if "idle_share" in waits else "",
        "MHz (least), W, C": "; ".join(state.format(**x) for x in devices),
        "kernels": "; ".join(result.get("kernels", ())),
    }


def write(output: list[dict[str, Any]], args: argparse.Namespace, name: str = "gpu") -> str:
    """The table of what was said so far; also into the folder for results, where there is one."""
    last = {(x["row"], x["system"]): x for x in output if x["kind"] == "result"}
    others = [x for x in output if x["kind"] in ("failed", "left out", "cut")]
    notes = [f"- {x['row']}: {x['system']} {x['kind']}: {x['why']}" for x in others]
    about = [f"- {key}: {value}" for x in output[:1] for key, value in x.items() if key not in ("kind", "row")]
    lines = [header("Training steps on one GPU", args) + "\n".join(about), "", table([cells(x) for x in last.values()])]
    lines += ["Seconds of every step, round by round:", ""] if last else []
    for (row, system), x in last.items():
        steps = "; ".join(" ".join(f"{t:.3f}" for t in one) for one in x["every_step"])
        lines.append(f"- {row}, {system}: {steps}")
    text = "\n".join([*lines, "", *notes, ""])
    if args.out and last:
        args.out.mkdir(parents=True, exist_ok=True)
        content = {**machine(), "command": sys.argv, "said": output}
        replace_file(args.out / f"{name}.json", json.dumps(content, indent=1) + "\n")
        replace_file(args.out / f"{name}.md", text)
    return text


def rows(args: argparse.Namespace) -> list[Row]:
    """The rows asked for, the most telling first: ours and transformers of every model, then the other systems."""
    systems = args.systems.split(",")
    first = tuple(system for system in systems if system in FIRST)
    return [
        Row(model, int(seq), group, args.rounds, args.steps, args.tokens, tuple(args.set), args.device)
        for seq in args.seqs.split(",")
        for group in (first, tuple(system for system in systems if system not in first))
        for model in args.models.split(",")
        if group
    ]


def weight(row: Row) -> int:
    """How much of the time a row has beside others: large models, and ours beside transformers, have more."""
    return {"7b": 4, "3b": 2}.get(row.model, 1) * (2 if set(row.systems) & set(FIRST) else 1)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One process per row; what they said. A row that dies costs its own results only."""
    output: list[dict[str, Any]] = []
    begin, first = time.monotonic(), 0.0  # first: seconds until a row had a result, the longest so far
    todo = rows(args)
    for number, row in enumerate(todo):
        start, before = time.monotonic(), len(output)
        left = args.seconds - (start - begin)
        if left < first:
            print(f"not measured, {left:.0f} s are left: {row.model} {row.seq}", flush=True)
            continue
        others = [weight(other) for other in todo[number:] if other.seq == row.seq]
        row.until = time.time() + 0.95 * left * weight(row) / sum(others)
        command = [sys.executable, __file__, "--row", json.dumps(row.__dict__)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, ending(process):
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                if line.startswith("{"):
                    output.append(json.loads(line))
                    said = [x["kind"] for x in output[before:]]
                    if said[-1] == "result":
                        first = max(first, time.monotonic() - start if said.count("result") == 1 else 0.0)
                        write(output, args)
        if process.returncode:
            why = f"status {process.returncode}"
            output.append({"kind": "failed", "row": f"{row.model} {row.seq}", "system": "the row", "why": why})
        write(output, args)
    return output


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="7b,1.1b")
    parser.add_argument("--seqs", default="2048")
    parser.add_argument("--systems", help=f"default: {','.join(SYSTEMS)}; on a CPU without ours-compiled")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="timed steps per round")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens per step")
    parser.add_argument("--seconds", type=float, default=3600, help="start no row that may not end within this")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of ours")
    add_place(parser)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        arguments = json.loads(args.row)
        Row(**{k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}).run()
        return 0
    on_cpu = choose_place(args) == "cpu"
    args.systems = args.systems or ",".join(name for name in SYSTEMS if not (on_cpu and name == "ours-compiled"))
    if on_cpu:
        args.models, args.seqs, args.tokens, args.rounds = "tiny", "32", 128, 2
    output = measure(args)
    print("\n" + write(output, args))
    return int(not any(x["kind"] == "result" for x in output))


if __name__ == "__main__":
    sys.exit(main())
