"""What a resumed run does otherwise than the one that saved: settings, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from megallama.config.describe import literal
from megallama.config.schema import BatchConfig, Config, LrScheduleConfig, OptimizerConfig, current
from megallama.optim.lr import learning_rate

ORDER = ("data.train", "data.mixture_schedule", "data.synthetic", "train.seed", "batch.seq_length")


def changes(saved: Mapping[str, Any], now: Config, step: int, samples: int) -> Iterator[str]:
    """A line for each setting that differs, then what they do to the learning rate and to the data.

    saved: the configuration in a checkpoint after `step` steps and `samples` samples; what an earlier version did not
    know yet had today's default.
    """
    saved = current(saved)
    default = Config().model_dump(mode="json")
    changed = {}
    for section, values in now.model_dump(mode="json").items():
        for name, value in values.items():
            was = saved.get(section, {}).get(name, default[section][name])
            if was != value:
                changed[f"{section}.{name}"] = was
                yield f"{section}.{name} was {literal(was)} and is {literal(value)}"
    try:
        yield from _curve(saved, now, step)
        was, size = (b.size_after(samples) for b in (BatchConfig(**saved["batch"]), now.batch))
        if was != size:
            yield f"the data come in the same order, but a step takes {size} samples instead of {was}"
    except (ValidationError, KeyError, TypeError):
        yield "an earlier version wrote the checkpoint: what this does to the learning rate is not known"
    if keys := [key for key in changed if key in ORDER]:
        yield f"the order of the data from step {step + 1} on is another one, by {', '.join(keys)}"


def _curve(saved: Mapping[str, Any], now: Config, step: int) -> Iterator[str]:
    optimizer = OptimizerConfig(**saved["optimizer"])
    schedule = LrScheduleConfig(**saved["lr_schedule"])
    end = max(now.train.steps, step + 1)
    for n in range(step, end, max(1, (end - step) // 1000)):
        was = learning_rate(n, optimizer, schedule)
        will = learning_rate(n, now.optimizer, now.lr_schedule)
        if was != will:
            keep = ""
            if schedule.decay_steps != now.lr_schedule.decay_steps:
                keep = f"; write lr_schedule.decay_steps={schedule.decay_steps} to keep its end where it was"
            yield f"the learning-rate curve is another one: step {n + 1} has {will:.3g} instead of {was:.3g}{keep}"
            return
