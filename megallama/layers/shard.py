"""The unit of optimizer state: a rectangle of one global tensor with its master weights and moments.

The optimizer holds its state as such shards, and the checkpoint reads and writes them; neither has to know the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megallama.plan.box import Box


@dataclass(frozen=True)
class Shard:
    """The state of the elements of `box`, a rectangle of the Hugging Face tensor ``box.key``.

    `state` is by the name of the files: "master" (the weights), "exp_avg", "exp_avg_sq". The tensors are contiguous
    1-D views of the box's elements in row-major order, fp32 (fp64 in fp64 mode), on the optimizer's device.  A
    checkpoint is loaded by writing into them.
    """

    box: Box
    state: dict[str, Tensor]
