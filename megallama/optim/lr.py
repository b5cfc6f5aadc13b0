"""The learning rate as a function of the step: warm-up, then a shape, then the minimum."""

from math import cos, pi

from megallama.config.schema import LrScheduleConfig, OptimizerConfig


def learning_rate(step: int, optimizer: OptimizerConfig, schedule: LrScheduleConfig, begun: int = 0) -> float:
    """Learning rate of update `step` (counted from 0), where warm-up and shape begin after `begun` steps.

    With n = step + 1 - begun, so that the first update already learns, peak p and minimum m = min_ratio * p:

    - warm-up, n <= warmup_steps: p n / warmup_steps
    - constant: p
    - cosine (Loshchilov & Hutter 2017): m + (p - m) (1 + cos(pi x)) / 2, x = (n - warmup) / (decay_steps - warmup)
    - wsd, warm-up, stable, decay (Hu et al. 2024): p until decay_steps - wsd_decay_steps (0: until the warm-up's end),
      then linear down to m

    All are continuous in n.  Without a warm-up the first update runs at the peak.  From decay_from_step on each of them
    is left for a line, from what it has at that n down to m at decay_until_step.
    """
    first, until = schedule.decay_from_step, schedule.decay_until_step
    if first is not None and step >= first:
        assert until is not None, "it is filled in, too"
        x = min(1.0, (step + 1 - first) / (until - first))
        begin = learning_rate(first - 1, optimizer, schedule, begun) if first else optimizer.lr
        return (1 - x) * begin + x * schedule.min_ratio * optimizer.lr
    n, warmup = step + 1 - begun, max(schedule.warmup_steps, 1)
    if n <= warmup:
        return optimizer.lr * n / warmup
    if schedule.kind == "constant":
        return optimizer.lr
    start, end, length = warmup, schedule.decay_steps, schedule.wsd_decay_steps
    assert end is not None and length is not None, "they are filled in when a configuration is loaded"
    end -= begun
    if schedule.kind == "wsd":
        start = max(warmup, end - (length or end))
    x = 1.0 if n >= end else max(0.0, (n - start) / (end - start))
    above = (1 + cos(pi * x)) / 2 if schedule.kind == "cosine" else 1 - x
    return optimizer.lr * (schedule.min_ratio + (1 - schedule.min_ratio) * above)
