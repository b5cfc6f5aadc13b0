"""The layouts that are compared with one rank: every pair of settings occurs together in at least one of them.

    python -m tests.parity.matrix        prints the table: layout, largest deviation of loss and gradient norm

The pairs are those of VALUES; further schedules follow in rows of their own.

Each row trains 20 steps on gloo processes and is compared with one rank that trains on the same data
in whole batches: in float64, where everything must agree to rounding, and in float32, where AdamW
amplifies rounding.
"""

from __future__ import annotations

import functools
import itertools
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from megallama.comm.launch import World
from megallama.config.schema import Config
from megallama.kernels import attention
from megallama.plan.plan import make_plan
from megallama.train.assemble import Worker
from tests.pool import Pool
from tests.small import build, curve, deviation, documents, small_config, tokens, train

STEPS = 20
LIMITS = {"fp64": 1e-10, "fp32": 1e-4}
MAX_RANKS = 8
TOGETHER = 3  # of the 8 tokens of a sample: attention has some documents alone, some together


@dataclass(frozen=True)
class Layout:
    """One row: how the job is cut, and the variant of the model."""

    tp: int = 1
    sequence_parallel: bool = True
    pp: int = 1
    chunks: int = 1
    schedule: str = "1f1b"
    dp: int = 1
    accumulation: int = 4
    recompute: str = "selective"
    tied: bool = False
    kv_heads: int = 4
    uneven: bool = False
    vocab: int = 64
    documents: bool = False
    tp_chunks: int = 1
    cp: int = 1
    exchange: str = "gather"
    keep: bool = False  # gathered keys and values
    dealt: int = 0  # micro-batches of one sample, dealt to the replicas unevenly; 0: 8 samples, divided evenly

    @property
    def ranks(self) -> int:
        """Processes of the job."""
        return self.tp * self.cp * self.pp * self.dp

    @property
    def few_layers(self) -> int:
        """Enough for a first, one in between and a last where stages are few, else one on each."""
        stages = self.pp * self.chunks
        return {1: 3, 2: 4}.get(stages, stages)

    @property
    def legal(self) -> bool:
        """Whether such a job exists and every setting of it has an effect."""
        return (
            self.ranks <= MAX_RANKS
            and (self.tp > 1 or (self.sequence_parallel and self.kv_heads == 4 and self.vocab == 64))
            and (self.pp > 1 or (self.chunks == 1 and self.schedule == "1f1b" and not self.uneven))
            and not (self.chunks > 1 and (self.schedule == "zb-h1" or self.accumulation % self.pp))
            and (self.exchange == "gather" or (4 // self.tp % self.cp == 0 and self.cp > 1 and not self.keep))
            and (self.cp > 1 or not self.keep)
            and not (self.sequence_parallel and 64 // (self.accumulation * self.dp * self.cp) % self.tp)
        )

    def config(self, dtype: str, alone: bool = False, layers: int = 8) -> Config:
        """The configuration of this row, or of the one rank it is compared with; one layer more where uneven."""
        layers += self.uneven
        model = {
            "num_layers": layers,
            "tie_embeddings": self.tied,
            "num_kv_heads": self.kv_heads,
            "vocab_size": self.vocab,
        }
        size = self.dealt or 8
        batch = {"seq_length": 8, "global_batch_size": size, "micro_batch_size": size, "uneven": self.dealt > 0}
        settings: dict[str, Any] = {"model": model, "batch": batch, "precision": {"dtype": dtype}}
        settings["data"] = {"document_mask": self.documents}
        if not alone:
            batch["micro_batch_size"] = 1 if self.dealt else 8 // (self.accumulation * self.dp)
            stages = self.pp * self.chunks
            of_stages = [layers // stages + (s == 0) * (layers % stages) for s in range(stages)]
            own = str(Path(__file__).parent / "own.csv") if self.schedule == "csv" else None
            settings["parallel"] = {
                "schedule_file": own,
                "tp": self.tp,
                "cp": self.cp,
                "cp_exchange": self.exchange,
                "sequence_parallel": self.sequence_parallel,
                "pp": self.pp,
                "chunks": self.chunks,
                "schedule": self.schedule,
                "stage_layers": of_stages if self.uneven else None,
            }
            settings["memory"] = {"recompute": self.recompute, "cp_keep_kv": self.keep}
            settings["overlap"] = {"tensor_parallel_chunks": self.tp_chunks}
        return small_config(**settings)

    def __str__(self) -> str:
        sp = " sp" if self.tp > 1 and self.sequence_parallel else ""
        pipe = (
            f" pp{self.pp} {self.schedule}" + (f" chunks{self.chunks}" if self.chunks > 1 else "")
            if self.pp > 1
            else ""
        )
        extra = "".join(
            text
            for text, on in (
                (" tied", self.tied),
                (f" kv{self.kv_heads}", self.kv_heads != 4),
                (" uneven", self.uneven),
                (" padded", self.vocab != 64),
                (" documents", self.documents),
                (f" {self.tp_chunks} pieces", self.tp_chunks > 1),
                (" kept", self.keep),
            )
            if on
        )
        count = f"{self.dealt} dealt" if self.dealt else f"acc{self.accumulation}"
        context = f" cp{self.cp} {self.exchange}" if self.cp > 1 else ""
        return f"tp{self.tp}{sp}{context}{pipe} dp{self.dp} {count} {self.recompute}{extra}"


VALUES: dict[str, tuple[Any, ...]] = {
    "tp": (2, 4, 1),
    "sequence_parallel": (True, False),
    "pp": (2, 4, 1),
    "chunks": (1, 2),
    "schedule": ("1f1b", "gpipe", "zb-h1"),
    "dp": (1, 2),
    "accumulation": (4, 1),
    "recompute": ("selective", "none", "full"),
    "tied": (False, True),
    "kv_heads": (4, 1),
    "uneven": (False, True),
    "vocab": (64, 61),
    "documents": (False, True),
}


OF_CONTEXT = {"cp": (2, 4), "exchange": ("gather", "heads"), "keep": (False, True)}

CONTEXT = (  # together they hold every pair with a setting of OF_CONTEXT that can occur; then further schedules
    Layout(accumulation=1, recompute="none", cp=2, keep=True),
    Layout(accumulation=1, documents=True, cp=4, exchange="heads"),
    Layout(pp=4, schedule="zb-h1", recompute="none", tied=True, uneven=True, documents=True, cp=2, keep=True),
    Layout(pp=2, schedule="zb-h1", dp=2, recompute="none", documents=True, cp=2, exchange="heads"),
    Layout(pp=4, schedule="gpipe", accumulation=1, recompute="full", tied=True, documents=True, cp=2, exchange="heads"),
    Layout(dp=2, recompute="none", tied=True, documents=True, cp=4, keep=True),
    Layout(pp=2, chunks=2, schedule="gpipe", recompute="full", uneven=True, cp=4, keep=True),
    Layout(pp=2, schedule="zb-h1", recompute="full", tied=True, uneven=True, cp=4, keep=True),
    Layout(
        tp=2,
        sequence_parallel=False,
        pp=2,
        chunks=2,
        schedule="gpipe",
        tied=True,
        kv_heads=1,
        uneven=True,
        vocab=61,
        documents=True,
        cp=2,
        keep=True,
    ),
    Layout(
        tp=2,
        sequence_parallel=False,
        pp=2,
        chunks=2,
        schedule="gpipe",
        recompute="full",
        tied=True,
        kv_heads=1,
        uneven=True,
        vocab=61,
        cp=2,
        exchange="heads",
    ),
    Layout(tp=2, sequence_parallel=False, recompute="none", kv_heads=1, vocab=61, documents=True, cp=4),
    Layout(tp=4, sequence_parallel=False, accumulation=1, recompute="full", kv_heads=1, cp=2, keep=True),
    Layout(tp=4, accumulation=1, vocab=61, documents=True, cp=2),
    Layout(cp=2, pp=2, schedule="zb-h2", recompute="full", documents=True),
    Layout(cp=2, pp=2, chunks=2, schedule="zb-v", dp=2, exchange="heads", tied=True, documents=True),
    Layout(cp=4, pp=2, chunks=2, schedule="v-half", exchange="heads", kv_heads=1, documents=True),
    Layout(cp=2, pp=2, chunks=2, schedule="dualpipe-v", tp=2, vocab=61, kv_heads=1),
    Layout(cp=2, pp=2, chunks=2, schedule="csv", dp=2, documents=True),
    Layout(cp=2, dp=3, dealt=4, documents=True),
    Layout(cp=2, pp=2, dp=2, dealt=5, schedule="zb-h1", exchange="heads", documents=True),
)

FURTHER = (
    Layout(pp=2, schedule="zb-h2", recompute="none", uneven=True),
    Layout(pp=2, chunks=2, schedule="zb-v", dp=2, tied=True, uneven=True),
    Layout(pp=4, chunks=2, schedule="zb-v", accumulation=1, recompute="full", documents=True),
    Layout(pp=4, chunks=2, schedule="v-half", tp=2, kv_heads=1, tied=True, uneven=True),
    Layout(pp=2, chunks=2, schedule="dualpipe-v", tp=2, sequence_parallel=False, dp=2, recompute="none", vocab=61),
    Layout(pp=2, chunks=2, schedule="csv", dp=2, tied=True, documents=True),
    Layout(tp=2, pp=2, schedule="zb-h1", dp=2, recompute="none", kv_heads=1, tp_chunks=4),
    Layout(tp=4, sequence_parallel=False, recompute="full", vocab=61, tp_chunks=2),
    Layout(dp=3, dealt=8, documents=True),
    Layout(dp=3, dealt=4, tied=True, vocab=61),
    Layout(pp=2, dp=2, dealt=5, schedule="zb-h1", tp=2, documents=True),
    Layout(pp=2, chunks=2, dp=2, dealt=5, schedule="gpipe", recompute="full"),
    Layout(pp=3, chunks=2, dp=2, dealt=5, schedule="zb-v", tied=True),  # whose replicas end in different orders
)


def pairs(layout: Layout) -> set[tuple[tuple[str, Any], ...]]:
    """All pairs of settings of a row."""
    settings = [(f.name, getattr(layout, f.name)) for f in fields(layout)]
    return set(itertools.combinations(settings, 2))


def context_pairs(layout: Layout) -> set[tuple[tuple[str, Any], ...]]:
    """Those of them with a setting of context parallelism."""
    own = [(name, getattr(layout, name)) for name in OF_CONTEXT]
    settings = [(f.name, getattr(layout, f.name)) for f in fields(layout) if f.name not in OF_CONTEXT]
    return {*itertools.product(settings, own), *itertools.combinations(own, 2)}


def possible(context: bool = False) -> Iterator[Layout]:
    """Every legal row; with sequences cut, or without."""
    values = VALUES | OF_CONTEXT if context else VALUES
    for chosen in itertools.product(*values.values()):
        layout = Layout(**dict(zip(values, chosen, strict=True)))
        if layout.legal:
            yield layout


@functools.cache
def matrix() -> tuple[Layout, ...]:
    """Few rows that together hold every pair of settings that can occur; always the same ones."""
    candidates = list(possible())
    random.Random(1).shuffle(candidates)
    cover = {layout: pairs(layout) for layout in candidates}
    wanted = set().union(*cover.values())
    rows = []
    while wanted:
        best = max(candidates, key=lambda layout: (len(cover[layout] & wanted), -layout.ranks))
        rows.append(best)
        wanted -= cover[best]
    return tuple(sorted(rows, key=lambda layout: (layout.ranks, str(layout))))


def run(world: World, layout: Layout, dtype: str, alone: bool, steps: int = STEPS) -> list[float]:
    """Train on one rank of a job; losses and gradient norms. Called in the processes of the pool."""
    config = layout.config(dtype, alone)
    plan = make_plan(config, world.world_size)
    rank = build(plan, world.groups(plan.topology, config.model.num_kv_heads or 1), world.device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "TOGETHER", TOGETHER)
        return trained(rank, layout, steps)


def trained(rank: Worker, layout: Layout, steps: int = STEPS) -> list[float]:
    """Losses and gradient norms of one rank."""
    config = rank.plan.config
    starts = documents(config, STEPS)[:steps] if layout.documents else None
    return curve(train(rank, tokens(config, STEPS)[:steps], starts=starts))


class Comparison:
    """Runs rows and remembers the runs of one rank."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._alone: dict[tuple[Config, int], list[float]] = {}

    def deviations(self, layout: Layout, dtype: str, steps: int = STEPS) -> tuple[float, float]:
        """Largest relative deviation of the loss and of the gradient norm over all ranks and `steps` steps."""
        known = layout.config(dtype, alone=True), steps
        if known not in self._alone:
            (self._alone[known],) = self._pool.run(1, "tests.parity.matrix:run", layout, dtype, True, steps)
        want = self._alone[known]
        results = self._pool.run(layout.ranks, "tests.parity.matrix:run", layout, dtype, False, steps)
        return tuple(max(deviation(ours[i::2], want[i::2]) for ours in results) for i in (0, 1))  # type: ignore[return-value]


def main() -> None:
    """Print the table."""
    pool = Pool()
    comparison = Comparison(pool)
    print("| ranks | layout | loss fp64 | norm fp64 | loss fp32 | norm fp32 |\n|---|---|---|---|---|---|")
    for layout in [*matrix(), *FURTHER, *CONTEXT]:
        numbers = [x for dtype in LIMITS for x in comparison.deviations(layout, dtype)]
        print(f"| {layout.ranks} | {layout} | " + " | ".join(f"{x:.1e}" for x in numbers) + " |", flush=True)
    pool.close()


if __name__ == "__main__":
    sys.exit(main())
