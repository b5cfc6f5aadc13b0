"""Preprocessing as Megatron-LM does it, in the peers' environment: JSON lines -> .bin/.idx.

    python run_megatron_preprocess.py --input A.jsonl --output PREFIX --tokenizer T --workers 2 [--megatron CHECKOUT]

With a checkout its own tools/preprocess_data.py runs.  Where that checkout's `megatron.training` cannot be imported (it
needs triton and Python 3.12), its two helpers are replaced here: the tokenizer options by ours, and `build_tokenizer`
by the bare library, which starts faster than Megatron's own.  Without a checkout a loop of the same design runs: a
pool of processes that get lines in groups of 32 and return lists of ids, and megatron-core's IndexedDatasetBuilder.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import runpy
import sys
import types
from pathlib import Path
from typing import Any

from megatron.core.datasets import indexed_dataset


class Bare:
    """A tokenizer library with the names Megatron uses."""

    def __init__(self, path: str) -> None:
        if path.endswith(".model"):
            import sentencepiece

            model = sentencepiece.SentencePieceProcessor(model_file=path)
            self.tokenize, self.eod, self.vocab_size = model.encode, model.eos_id(), model.vocab_size()
        else:
            import tokenizers

            fast = tokenizers.Tokenizer.from_file(path)
            fast.encode_special_tokens = True
            self.tokenize = lambda text: fast.encode(text, add_special_tokens=False).ids
            self.eod, self.vocab_size = fast.token_to_id("<|end_of_text|>"), fast.get_vocab_size()


def substitute(path: str) -> None:
    """Stand in for what cannot be imported of a checkout."""

    def options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.add_argument("--tokenizer-type", default="bare")
        return parser

    def build(_args: Any) -> Bare:
        return Bare(path)

    for name in ("megatron.training", "megatron.core.tokenizers.utils"):
        sys.modules.setdefault(name, types.ModuleType(name))
    for name, values in (
        ("megatron.training.arguments", {"_add_tokenizer_args": options}),
        ("megatron.training.tokenizer", {"build_tokenizer": build}),
        ("megatron.core.tokenizers.utils.build_tokenizer", {"build_tokenizer": build}),
    ):
        module = types.ModuleType(name)
        vars(module).update(values)
        sys.modules[name] = module


def run_theirs(checkout: Path, args: argparse.Namespace) -> str:
    """Their file; says how."""
    sys.path.insert(0, str(checkout))
    kind = "SentencePieceTokenizer" if args.tokenizer.endswith(".model") else "HuggingFaceTokenizer"
    how, options = "as it is", ["--tokenizer-type", kind, "--tokenizer-model", args.tokenizer]
    try:
        importlib.import_module("megatron.training.arguments")
    except Exception:
        substitute(args.tokenizer)
        how, options = "without megatron.training", []
    sys.argv = ["preprocess_data.py", "--input", args.input, "--output-prefix", args.output, *options]
    sys.argv += ["--workers", str(args.workers), "--append-eod"]
    try:
        runpy.run_path(str(checkout / "tools" / "preprocess_data.py"), run_name="__main__")
    except Exception as error:  # some versions fail after everything is written
        if not Path(args.output + "_text_document.idx").exists():
            raise
        how += f", which fails at its end ({type(error).__name__})"
    return how


class Worker:
    """What each process of the pool runs."""

    tokenizer: Bare

    def __init__(self, path: str) -> None:
        self.path = path

    def start(self) -> None:
        """Load the tokenizer."""
        Worker.tokenizer = Bare(self.path)

    def encode(self, line: str) -> list[int]:
        """The ids of a line's document."""
        return [*Worker.tokenizer.tokenize(json.loads(line)["text"]), Worker.tokenizer.eod]


def run_like(args: argparse.Namespace) -> str:
    """A loop of the same design."""
    dtype = indexed_dataset.DType.optimal_dtype(Bare(args.tokenizer).vocab_size)
    builder = indexed_dataset.IndexedDatasetBuilder(args.output + "_text_document.bin", dtype=dtype)
    worker = Worker(args.tokenizer)
    with multiprocessing.Pool(args.workers, initializer=worker.start) as pool, open(args.input, encoding="utf-8") as f:
        for ids in pool.imap(worker.encode, f, 32):
            builder.add_document(ids, [len(ids)])
    builder.finalize(args.output + "_text_document.idx")
    return "a loop of its design"


def main() -> None:
    """Run and say as JSON what ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--input", "--output", "--tokenizer"):
        parser.add_argument(name, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--megatron", type=Path)
    args = parser.parse_args()
    how = run_theirs(args.megatron, args) if args.megatron else run_like(args)
    print("\n" + json.dumps({"how": how}))


if __name__ == "__main__":
    main()
