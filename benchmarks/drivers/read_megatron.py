"""One figure of megatron-core's reading: `python read_megatron.py ROW PREFIX SAMPLES`; a line of JSON on stdout.

Its own `BlendedMegatronDatasetBuilder` with `GPTDataset`, its compiled index helpers, an empty cache folder.  Samples
are stacked into a batch as a data loader's default collation does.  The mixture is built for SAMPLES samples.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from reading import BATCH, SEQ_LENGTH, SHARES, resident_mib, say


class Tokenizer:
    """What the dataset asks of one."""

    vocab_size, eod, pad, bos, eos = 32000, 2, 31999, 1, 2
    unique_identifiers = OrderedDict({"class": "none"})


def main(row: str, prefix: str, samples: int) -> None:
    """Build, read, tell."""
    shares = SHARES if row == "mixture" else {"one": 1.0}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    count = samples if row == "mixture" else 2_400_000  # one epoch of the source
    with tempfile.TemporaryDirectory() as cache:
        config = GPTDatasetConfig(
            random_seed=1234, sequence_length=SEQ_LENGTH, split="1,0,0", path_to_cache=cache, tokenizer=Tokenizer(),
            blend=([prefix] * len(shares), list(shares.values())), reset_position_ids=False,
            reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        )  # fmt: skip
        before, start = resident_mib(), time.perf_counter()
        dataset = BlendedMegatronDatasetBuilder(GPTDataset, [count, 0, 0], lambda: True, config).build()[0]
        batch(dataset, range(BATCH))
        seconds = time.perf_counter() - start
        if row != "samples":
            return say(seconds=seconds, mib=resident_mib() - before, samples=count)
        order = np.random.default_rng(0).permutation(count)[:samples].tolist()
        rates, held = [], []
        for _ in range(3):
            start = time.perf_counter()
            for first in range(0, samples, BATCH):
                batch(dataset, order[first : first + BATCH])
            rates.append(samples / (time.perf_counter() - start))
            held.append(resident_mib())
        say(rate=max(rates[1:]), mib=held[-1] - before, samples=samples)


def batch(dataset: Any, numbers: Any) -> dict[str, torch.Tensor]:
    """Samples by number, stacked."""
    return torch.utils.data.default_collate([dataset[i] for i in numbers])  # type: ignore[no-any-return]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
