"""Greedy text after 8 prompts: our batch of 8 and of 1 beside transformers' batch of 8, same weights, one thread.

    python benchmarks/generate.py                                every row
    python benchmarks/generate.py --shapes S --dtypes fp32 --rounds 5

The prompts have 24 to 64 tokens, and 48 follow each.  The rate is new tokens per second of the whole
call, the prompts' forward pass included; the three take turns, and each figure is the median of the
rounds; ratios are medians of the rounds' own, by CPU seconds, which other programs disturb less,
beside those by the clock.  Shapes: `drivers/work.py`; weights are random (standard deviation 0.05).

"same rows": all of whose tokens are those of transformers.  In bf16 the two round at other places,
and random weights make many tokens about as likely: a row goes its own way at the first such place.
"far from fp32" says whose choices are the better ones: the share of tokens, over all rows and each
after its own text so far, that are not the likeliest by the same weights in fp32.

Results: `benchmarks/results/generate.json` and `generate.md`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from drivers.work import SHAPES
from report import header, median, save, table

from megallama.inference.generate import Sampling, generate_batch, load_llama

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GREEDY, NEW = Sampling(temperature=0), 48
Rows = list[list[int]]


@dataclass(frozen=True)
class Row:
    """One shape and format: tokens per second by the clock and by CPU seconds, a number a round."""

    shape: str
    dtype: str
    by_clock: dict[str, list[float]]
    by_cpu: dict[str, list[float]]
    same_rows: int
    same_rows_alone: int
    far_from_fp32: dict[str, float]

    def ratio(self, a: str, b: str, by: dict[str, list[float]]) -> float:
        """The median of the rounds' ratios a / b."""
        return median([x / y for x, y in zip(by[a], by[b], strict=True)])


def model(shape: str, dtype: torch.dtype) -> Any:
    """transformers' LLaMA of that shape with random weights."""
    s = SHAPES[shape]
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=s.vocab,
        hidden_size=s.hidden,
        intermediate_size=s.ffn,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.heads,
        max_position_embeddings=1024,
        initializer_range=0.05,
        eos_token_id=None,
        bos_token_id=None,
        dtype=dtype,
    )
    made: Any = transformers.LlamaForCausalLM(config)
    return made.to(dtype).eval()


def prompts(shape: str) -> Rows:
    """Random tokens of random lengths."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(24, 65, (8,), generator=generator).tolist()
    return [torch.randint(SHAPES[shape].vocab, (n,), generator=generator).tolist() for n in lengths]


def theirs(llama: Any, given: Rows) -> Rows:
    """What transformers makes of a batch, padded on the left."""
    longest = max(map(len, given))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in given])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in given])
    out = llama.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    made: Rows = out[:, longest:].tolist()
    return made


def far(exact: Any, given: Rows, made: Rows) -> float:
    """The share of tokens that the model in fp32 would not have chosen after the same text."""
    wrong = 0
    with torch.inference_mode():
        for prompt, new in zip(given, made, strict=True):
            logits = exact(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
            wrong += int((logits.argmax(-1) != torch.tensor(new)).sum())
    return wrong / sum(map(len, made))


def measure(shape: str, dtype: str, rounds: int) -> Row:
    """One row."""
    peer, given = model(shape, DTYPES[dtype]), prompts(shape)
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        ours = load_llama(Path(folder))
    calls: dict[str, Callable[[], Rows]] = {
        "transformers 8": lambda: theirs(peer, given),
        "ours 8": lambda: [row.tokens for row in generate_batch(ours, given, NEW, GREEDY)],
        "ours 1": lambda: [row.tokens for row in generate_batch(ours, given, NEW, GREEDY, max_rows=1)],
    }
    generate_batch(ours, given, 2, GREEDY)  # packs the weights
    clock: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    made: dict[str, Rows] = {}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter(), time.process_time()
            made[name] = call()
            clock[name].append(round(8 * NEW / (time.perf_counter() - start[0]), 1))
            cpu[name].append(round(8 * NEW / (time.process_time() - start[1]), 1))
    exact = peer.float()
    same = sum(a == b for a, b in zip(made["ours 8"], made["transformers 8"], strict=True))
    alone = sum(a == b for a, b in zip(made["ours 8"], made["ours 1"], strict=True))
    return Row(shape, dtype, clock, cpu, same, alone, {name: round(far(exact, given, made[name]), 4) for name in calls})


def line(row: Row) -> dict[str, str]:
    """One line of the table."""
    rates = {f"{name}, tokens/s": f"{median(row.by_clock[name]):.0f}" for name in row.by_clock}
    ratios = {
        title: " / ".join(f"{row.ratio('ours 8', to, by):.2f}" for by in (row.by_cpu, row.by_clock))
        for title, to in (("8 to 1, CPU / clock", "ours 1"), ("to transformers 8, CPU / clock", "transformers 8"))
    }
    far_off = ", ".join(f"{100 * row.far_from_fp32[name]:.1f}%" for name in ("ours 8", "transformers 8"))
    same = {"same rows": f"{row.same_rows} of 8", "same rows alone": f"{row.same_rows_alone} of 8"}
    return {"row": f"{row.shape} {row.dtype}", **rates, **ratios, **same, "far from fp32: ours, theirs": far_off}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="S,M")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(s, d, args.rounds) for s in args.shapes.split(",") for d in args.dtypes.split(",")]
    about = f"transformers {transformers.__version__}; one thread\n\n"
    save("generate", rows, header("Batched generation", args) + about + table([line(row) for row in rows]))


if __name__ == "__main__":
    main()
