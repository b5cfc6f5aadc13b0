"""Initial weights that do not depend on the layout.

Every element is a function of (seed, name of the Hugging Face tensor, index in the global tensor):
two 32-bit words from a counter-based mixing function, turned into a normal deviate by the
Box-Muller transform in float64.  A rank computes just the rectangle it holds.
"""

from __future__ import annotations

import hashlib
import math
import struct

import torch
from torch import Tensor

from megallama.plan.box import Box

BLOCK = 1 << 17  # elements generated at a time: the temporaries stay in the cache
_MASK32 = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words (held in int64) in which every input bit moves every output bit.

    Multiply and xor-shift rounds with the constants of the `lowbias32` hash found by Wellons (2018).
    """
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def normal_at(index: Tensor, seed: int, name: str) -> Tensor:
    """Standard normal deviates, float64, of elements `index` (int64, any shape) of the tensor `name`."""
    k0, k1 = struct.unpack("<2I", hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest())
    low, high = index & _MASK32, index >> 32
    a = _mix(_mix(low ^ k0) ^ _mix(high ^ k1) ^ k1)
    b = _mix(_mix(a ^ low) ^ k0)
    radius = torch.sqrt(-2 * torch.log((a.double() + 0.5) / 2**32))
    return radius * torch.cos(b.double() * (2 * math.pi / 2**32))


def fill(out: Tensor, box: Box, global_shape: tuple[int, ...], seed: int, std: float | None) -> None:
    """Write the initial values of `box` into `out` [box.shape]; std None means ones."""
    if std is None:
        out.fill_(1)
        return
    rows, columns = box.shape
    step = max(1, BLOCK // columns)
    column = torch.arange(box.start[1], box.stop[1], device=out.device)
    for a in range(0, rows, step):
        b = min(rows, a + step)
        row = torch.arange(box.start[0] + a, box.start[0] + b, device=out.device)
        index = row.unsqueeze(1) * global_shape[1] + column
        out[a:b] = normal_at(index, seed, box.key) * std
