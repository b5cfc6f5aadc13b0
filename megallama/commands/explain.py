"""Which documents a step trained on, or will: `megallama explain CONFIG.toml STEP [section.key=value ...]`.

STEP counts from 1, as in the log. Of every sample of its global batch: source, number in it, epoch, and the documents
it is made of, each with number, offset, and the text that is used. Read as training does, from files and configuration
alone; of a run that went back (train.on_spike), the newest checkpoint tells what was left out. A batch size that was
changed by a resume is taken for that of all steps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megallama.analysis.sources import parts_of
from megallama.commands.parser import Parser
from megallama.config.errors import ConfigError, counted
from megallama.config.load import is_setting, load
from megallama.config.schema import Config
from megallama.data.indexed import IndexedDataset
from megallama.data.sources import TrainDataset, open_sources
from megallama.data.tokenizer import Tokenizer, load_tokenizer
from megallama.plan.exchange import exchange
from megallama.plan.topology import Topology


@dataclass(frozen=True)
class Piece:
    """Part of a document: its tokens offset .. offset + length - 1."""

    document: int
    offset: int
    length: int
    tokens: list[int]
    text: str | None  # None without data.tokenizer


@dataclass(frozen=True)
class Explained:
    """One sample: where it comes from and what it is made of, in order."""

    sample: int  # of the run
    source: str
    path: str
    index: int  # of the source: its samples are 0, 1, 2, ...
    epoch: int
    pieces: list[Piece]


def pieces(dataset: IndexedDataset, offset: int, tokens: np.ndarray, tokenizer: Tokenizer | None) -> list[Piece]:
    """The documents in which the tokens from `offset` on lie; empty ones have no piece."""
    found, at, end = [], offset, offset + len(tokens)
    number = dataset.document_at(offset)
    while at < end:
        begin, stop = dataset.starts(number, number + 1).tolist()
        if ids := tokens[at - offset : min(stop, end) - offset].tolist():
            found.append(Piece(number, at - begin, len(ids), ids, tokenizer.decode(ids) if tokenizer else None))
        at, number = at + len(ids), number + 1
    return found


def explain(train: TrainDataset, tokenizer: Tokenizer | None, numbers: Sequence[int]) -> list[Explained]:
    """What these samples of the run are."""
    out, read = [], train.read(numbers).tokens
    for sample, (source, index, offset), tokens in zip(numbers, train.places(numbers), read, strict=True):
        parts, epoch = pieces(source.dataset, offset, tokens, tokenizer), index // source.num_sequences
        out.append(Explained(sample, source.name, source.dataset.prefix, index, epoch, parts))
    return out


def ledger_of(config: Config) -> dict[str, Any]:
    """The counters of the newest checkpoint, where it has any."""
    folder = Path(config.checkpoint.folder or "")
    with suppress(OSError, ValueError, KeyError, TypeError):  # checkpoint.folder would read them with torch
        newest = folder / (folder / "latest").read_text("utf-8").strip() / "manifest.json"
        return dict(json.loads(newest.read_text("utf-8"))["counters"])
    return {}


def numbers_of(
    config: Config, step: int, ranks: int | None, rank: int | None, micro: int | None,
    ledger: Mapping[str, Any] | None = None,
) -> list[int]:  # fmt: skip
    """The samples of a step, or what one rank reads of it. Raises: ConfigError if there is no such step or rank.

    ledger: counters that know what was left out (step -> samples after it), and where a run went on from another one.
    """
    p, batch, ledger = config.parallel, config.batch, ledger or {}
    begun = (ledger.get("mixture") or [{}])[0]  # where a run goes on from another one
    done, first = begun.get("step", 1) - 1, begun.get("sample", 0)
    if not done < step < 1 << 40:
        raise ConfigError(f"step {step} does not exist; steps count from {done + 1}, as in the log")
    for at, count in sorted((int(at), n) for at, n in ledger.get("left_out", {}).items() if done <= int(at) < step):
        done, first = at, batch.samples_after(at, done, first) + count
    first = batch.samples_after(step - 1, done, first)
    size = batch.size_after(first)
    if rank is None:
        if micro is not None or ranks is not None:
            raise ConfigError("--micro-batch and ranks= need --rank; write for example --rank 0 ranks=8")
        return list(range(first, first + size))
    if ranks is None or not 0 <= rank < ranks:
        raise ConfigError(f"--rank {rank} needs the number of ranks, above it; write for example ranks={abs(rank) + 1}")
    topology = Topology.fill(ranks, tp=p.tp, pp=p.pp, cp=p.cp, order=p.rank_order)
    found = batch.sample_ids(first, size, topology.dp, topology.coords(rank)["dp"])
    if micro is not None and not 0 <= micro < len(found):
        raise ConfigError(f"--micro-batch {micro} does not exist; step {step} has micro-batches 0 to {len(found) - 1}")
    return [i for ids in (found if micro is None else [found[micro]]) for i in ids]


def imbalance(starts: np.ndarray, cp: int, together: int) -> dict[str, float]:
    """Keys that queries of the busiest of cp ranks see over their mean; starts of documents [samples, s]."""
    seen = np.arange(starts.shape[1]) - starts + 1
    chunks = seen.reshape(-1, together, 2 * cp, starts.shape[1] // (2 * cp)).sum((1, 3))
    work = chunks[:, :cp] + chunks[:, : cp - 1 : -1]
    most, mean = work.max(1), work.mean(1)
    return {"cp_imbalance": float(most.sum() / mean.sum()), "cp_imbalance_worst": float((most / mean).max())}


def show(sample: Explained, *, tokens: bool, most: int) -> str:
    """A sample as text."""
    where = f"{sample.source} ({sample.path}) sample {sample.index}, epoch {sample.epoch}"
    lines = [f"sample {sample.sample}: {where}"]
    for piece in sample.pieces:
        span = f"tokens {piece.offset}..{piece.offset + piece.length - 1}"
        ids = tokens or piece.text is None
        said = " ".join(map(str, piece.tokens)) if ids else json.dumps(piece.text, ensure_ascii=False)
        cut = said if not most or len(said) <= most else said[:most] + "..."
        lines.append(f"  document {piece.document}, {span}: {cut}")
    return "\n".join(lines)


def run(argv: Sequence[str]) -> None:
    """Print the samples. Raises: MegallamaError."""
    parser = Parser("explain", __doc__, config=True, named=["ranks"])
    parser.usage = "%(prog)s CONFIG.toml STEP [section.key=value ...] [OPTIONS]"
    parser.add_argument("--json", action="store_true", help="one object, with the ids of every piece")
    parser.add_argument("--tokens", action="store_true", help="ids instead of text")
    parser.add_argument("--chars", type=int, default=160, metavar="N", help="most characters or ids of a piece; 0: all")
    parser.add_argument("--sample", type=int, metavar="I", help="only sample I of the run, from 0")
    parser.add_argument("--rank", type=int, metavar="R", help="only what rank R of ranks=N reads")
    parser.add_argument("--micro-batch", type=int, metavar="M", help="of that only micro-batch M")
    args = parser.read(argv)
    named = [word for word in args.words if not is_setting(word)]
    if len(named) != 2 or not named[1].lstrip("-").isdecimal():
        parser.error("the following arguments are required: a configuration and the number of a step")
    counts, step = args.ranks or [], int(named[1])
    if not all(count.isdecimal() and int(count) for count in counts):
        raise ConfigError(f"ranks={counts[-1]} is no number of ranks; write for example ranks=8")
    ranks = int(counts[-1]) if counts else None
    config = load(Path(named[0]), [word for word in args.words if word not in named], ranks=ranks)
    if config.data.synthetic:
        raise ConfigError("data.synthetic=true makes samples of random tokens: there are no documents to explain")
    tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
    parts = [*parts_of(config, lambda now: open_sources(now).train)]
    config, train, steps, samples = next((part for part in parts if step <= part[2].stop), parts[-1])
    here = {"mixture": [{"step": steps.start + 1, "sample": samples.start}]}
    ledger = here if config.train.phases else ledger_of(config)
    if config.checkpoint.continue_from and (config.train.phases or not ledger):
        why = "has phases, of which none" if config.train.phases else "has no checkpoint yet, which"
        raise ConfigError(f"the run {why} knows where it goes on in the data of the other run")
    if ledger.get("left_out") or config.checkpoint.continue_from:
        train.resume(ledger, ledger["step"], ledger["samples"])
    numbers = numbers_of(config, step, ranks, args.rank, args.micro_batch, ledger)
    if args.sample is not None and args.sample not in numbers:
        raise ConfigError(f"--sample {args.sample} is not in step {step}: {numbers[0]} to {numbers[-1]}")
    numbers = numbers if args.sample is None else [args.sample]
    explained = explain(train, tokenizer, numbers)
    cp, together = config.parallel.cp, min(len(numbers), config.batch.micro_batch_size)
    starts = train.read(numbers).starts if cp > 1 and exchange(config)[0] == "gather" else None
    balance = {} if starts is None else imbalance(starts[:, :-1], cp, together)
    if args.json:
        print(json.dumps({"step": step, "samples": [asdict(s) for s in explained], **balance}, ensure_ascii=False))
        return
    print(f"step {step}: {counted(len(explained), 'sample')} of {counted(config.batch.seq_length, 'token')}")
    if balance:
        whole, worst = balance.values()
        print(f"attention of the busiest cp rank over their mean: {whole:.2f}, in the worst micro-batch {worst:.2f}")
    print(*(show(sample, tokens=args.tokens, most=args.chars) for sample in explained), sep="\n")
