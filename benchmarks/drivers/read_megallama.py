"""One figure of megallama's reading: `python read_megallama.py ROW PREFIX SAMPLES`; a line of JSON on stdout.

Samples are delivered by the `Loader`, steps of 64 in micro-batches of 4, without its background thread.
"""

from __future__ import annotations

import sys
import time

from reading import BATCH, RUN_SAMPLES, SEQ_LENGTH, SHARES, resident_mib, say

from megallama.config.schema import Config
from megallama.data.loader import Loader
from megallama.data.sources import TrainDataset, open_sources


def ids_of_step(step: int) -> list[range]:
    """The samples of a step's micro-batches."""
    return [range(first, first + 4) for first in range(step * BATCH, (step + 1) * BATCH, 4)]


def main(row: str, prefix: str, samples: int) -> None:
    """Open, read, tell."""
    shares = SHARES if row == "mixture" else {"one": 1.0}
    config = Config.model_validate({
        "data": {"train": [{"path": prefix, "name": name, "weight": w} for name, w in shares.items()]},
        "model": {"vocab_size": 32000},
        "batch": {"seq_length": SEQ_LENGTH, "global_batch_size": 2048},
        "train": {"steps": RUN_SAMPLES // 2048, "seed": 1234},
    })  # fmt: skip
    before, start = resident_mib(), time.perf_counter()
    train = open_sources(config).train
    assert isinstance(train, TrainDataset)
    train.last_step(config.train.steps)
    batches = next(Loader(train.read, ids_of_step, prefetch=0))
    seconds = time.perf_counter() - start
    assert sum(len(batch.labels) for batch in batches) == BATCH
    if row != "samples":
        return say(seconds=seconds, mib=resident_mib() - before, samples=RUN_SAMPLES)
    rates, held = [], []
    for _ in range(4):  # the first turn brings the pages in
        start = time.perf_counter()
        for _ in Loader(train.read, ids_of_step, stop_step=samples // BATCH, prefetch=0):
            pass
        rates.append(samples / (time.perf_counter() - start))
        held.append(resident_mib())
    say(rate=max(rates[1:]), mib=held[-1] - before, samples=samples)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
