"""AdamW (Loshchilov & Hutter 2019), the rule by which `Update` changes the weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megallama.config.schema import OptimizerConfig
from megallama.kernels.optimizer import AdamWStep


class AdamW:
    """One step of AdamW on buckets' shards; `kernel` is the implementation."""

    moments: tuple[str, ...] = ("exp_avg", "exp_avg_sq")

    def __init__(self, config: OptimizerConfig, kernel: AdamWStep) -> None:
        self._config, self._kernel = config, kernel

    def __call__(self, shards: Sequence[dict[str, Tensor]], lr: float, scale: float, decay: bool) -> None:
        first, names = shards[0]["grads"], ("master", "grads", *self.moments, "step")
        divisor = None if scale == 1.0 else first.new_full((), 1 / scale)
        lists = [[shard[name] for shard in shards] for name in names]
        self._kernel(lists, self._config, lr, self._config.weight_decay if decay else 0.0, divisor)
