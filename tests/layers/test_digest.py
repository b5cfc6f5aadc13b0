"""The digest of bits, by its definition in whole numbers: saved checkpoints and all ranks rely on its value."""

from __future__ import annotations

import pytest
import torch

from megallama.layers.param import digest


def defined(data: bytes, item: int) -> int:
    """Of the bytes of elements of `item` bytes: parts of 2^20 elements, in rows of 1024 words of 64 bits."""
    weights = [n * -7046029254386353131 | 1 for n in range(1024)]
    total = 0
    for first in range(0, len(data), item << 20):
        part = data[first : first + (item << 20)]
        part += bytes(-len(part) % 8192)
        words = [int.from_bytes(part[at : at + 8], "little", signed=True) for at in range(0, len(part), 8)]
        total = total * 6364136223846793005 + sum(word * weights[n % 1024] for n, word in enumerate(words))
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)


@pytest.mark.parametrize("count", [0, 1, 8192, 8193, 30_000, (1 << 20) + 3], ids=str)
def test_it_is_what_it_is_defined_as(count: int) -> None:
    x = torch.randint(-128, 128, (count,), generator=torch.Generator().manual_seed(count)).to(torch.int8)
    assert int(digest(x)) == defined(x.numpy().tobytes(), 1)
    few = x[: count // 8 * 8].view(torch.float64)
    assert int(digest(few)) == defined(few.numpy().tobytes(), 8)
    assert int(digest(x[1:])) == defined(x[1:].numpy().tobytes(), 1), "words that begin within one of the memory's"
    assert int(digest(x, torch.float32)) == defined(x.float().numpy().tobytes(), 4)
