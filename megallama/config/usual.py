"""What LLaMA-like models were trained with: settings far outside are allowed, and said."""

from __future__ import annotations

from collections.abc import Iterator

from megallama.config.load import flatten
from megallama.config.schema import Config

USUAL = {  # far below or above which a setting is named, and what is usual
    "optimizer.lr": (1e-6, 1e-2, "1e-5 to 3e-3"),
    "optimizer.beta1": (0.5, 0.99, "0.9"),
    "optimizer.beta2": (0.8, 0.9999, "0.95 to 0.999"),
    "optimizer.eps": (1e-12, 1e-4, "1e-8 to 1e-5"),
    "optimizer.weight_decay": (0.0, 0.5, "0 to 0.1"),
    "optimizer.clip_grad": (0.05, 10.0, "1.0"),
    "model.init_std": (1e-3, 0.1, "0.006 to 0.02"),
}
MOST_BATCH_TOKENS = 1 << 26


def unusual(config: Config) -> Iterator[str]:
    """A line for each such setting, with the usual range."""
    settings = flatten(config)
    for key, (low, high, usual) in USUAL.items():
        if not low <= settings[key] <= high:
            yield f"{key}={settings[key]:g} is far from what LLaMA-like models were trained with, usually {usual}"
    warmup, end = config.lr_schedule.warmup_steps, config.lr_schedule.decay_steps or config.train.steps
    if warmup > end / 2:
        yield f"lr_schedule.warmup_steps={warmup} is most of {end} steps; usually it is 0.1 to 10 %"
    if (tokens := config.batch.global_batch_size * config.batch.seq_length) > MOST_BATCH_TOKENS:
        yield f"batch.global_batch_size x batch.seq_length is {tokens:,} tokens; usually a step takes 0.5 to 16 million"
