"""Convert a checkpoint: `megallama convert SOURCE TARGET --to megatron --tp 2 --pp 2 --compare-logits`.

SOURCE is a step or run folder of ours, a Hugging Face folder, Meta's release (params.json, consolidated.NN.pth) or
Megatron-style shards (mp_rank_*/model.safetensors and config.json); TARGET must not exist.  Tensors are streamed.  Exit
status: 0 done, 1 not verified (the result is kept as TARGET.unverified), 2 wrong input or failed (nothing is left).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megallama.commands.parser import Parser, size


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser("convert", __doc__)
    parser.add_argument("source", type=Path, help="folder of any of the formats")
    parser.add_argument("target", type=Path, help="folder to write; it must not exist")
    parser.add_argument("--to", required=True, choices=("step", "hf", "meta", "megatron"), help="format to write")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks (meta: model-parallel files) (1)")
    parser.add_argument("--pp", type=int, default=1, help="pipeline-parallel ranks of megatron (1)")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="number format; default the source's")
    parser.add_argument("--shard-gb", type=size, default=5.0, help="largest file of step and hf [1e9 bytes] (5)")
    parser.add_argument("--vocab-multiple", type=int, default=128, help="megatron pads to this times tp rows (128)")
    parser.add_argument("--context", type=int, help="longest sequence, which Meta's release does not say [tokens]")
    parser.add_argument("--head", choices=("auto", "tied"), default="auto", help="tied: leave out a head called tied")
    what = "compare logits of source and target on random tokens"
    parser.add_argument("--compare-logits", "--verify", action="store_true", help=what)
    return parser.read(arguments)


def run(argv: Sequence[str]) -> int:
    """Check the options, convert, tell."""
    options = parse(argv)
    from megallama.config.errors import ConfigError, say
    from megallama.convert.compare_logits import compare_logits, compare_with_others
    from megallama.convert.convert import ConvertOptions, UnverifiedError, convert
    from megallama.convert.source import Source, foreign_kind, open_source
    from megallama.data.writer import alone
    from megallama.inference.generate import find_model
    from megallama.plan.params import num_parameters

    for name in ("tp", "pp", "vocab_multiple", "context"):
        if (value := getattr(options, name)) is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')}={value}: use a number above 0")
    if options.tp > 1 and options.to not in ("meta", "megatron") or options.pp > 1 and options.to != "megatron":
        given = f"--tp={options.tp} --pp={options.pp}"
        raise ConfigError(f"{given}: --to={options.to} has no ranks; --tp is for meta and megatron, --pp for megatron")
    folder, done = options.source if foreign_kind(options.source) else find_model(options.source, say), []

    def check(source: Source, result: Path, dtype: str) -> None:
        for note in source.notes:
            say(note)
        what = f"{source.kind}, {num_parameters(source.model):,} parameters"
        done.append(f"{source.folder} ({what}) -> {options.target} ({options.to}, {dtype})")
        if options.compare_logits:
            step = next(result.glob("step-*"), result) if options.to == "step" else result
            with open_source(step, context=options.context) as target:
                worst = compare_logits(source, target, dtype)
                sides = {"source": source, "result": target}
                found = {name: compare_with_others(side, dtype) for name, side in sides.items()}
            theirs = {name: value for name, value in found.items() if value is not None}
            worst = max(worst, *(value for value, _ in theirs.values()), 0.0)
            by = "".join(f", from {who}'s for the {name}" for name, (_, who) in theirs.items())
            done.append(f"verified: logits of random tokens differ by at most {worst:.1e} of the largest{by}")

    start, shard_bytes = time.perf_counter(), int(options.shard_gb * 1e9)
    wanted = ConvertOptions(
        options.to, options.tp, options.pp, options.dtype, shard_bytes, options.vocab_multiple, options.head
    )
    try:
        with alone(options.target):
            convert(folder, options.target, wanted, options.context, check)
    except UnverifiedError as error:
        print(f"NOT VERIFIED: {error}; the result is kept as {options.target}.unverified", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in options.target.rglob("*") if path.is_file())
    print(*done, f"{size:,} bytes, {time.perf_counter() - start:.1f} s", sep="\n")
    return 0
