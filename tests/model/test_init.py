"""Initial weights: one hash for every layout, normal, and different for every seed and tensor."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
import torch

from megallama.model import llama
from megallama.model.llama import fill, normal_at
from megallama.plan.box import Box
from megallama.train.assemble import Worker
from tests.small import on_threads, small_config

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {"tp": 2}),
    (4, {"tp": 4, "sequence_parallel": False}),
    (2, {"pp": 2}),
    (4, {"pp": 2, "chunks": 2}),
    (2, {}),
    (3, {}),
    (8, {"tp": 2, "pp": 2}),
]


def pieces(rank: Worker) -> list[tuple[Box, torch.Tensor]]:
    return [(s.box, s.state["master"].clone()) for s in rank.optimizer.shards(owned_only=True)]


def fingerprint(shards: list[tuple[Box, torch.Tensor]], model: dict[str, tuple[int, ...]]) -> str:
    """SHA-256 of the whole model put together from shards that must cover it exactly once."""
    whole = {name: torch.full(shape, torch.nan) for name, shape in model.items()}
    for box, values in shards:
        target = whole[box.key][tuple(map(slice, box.start, box.stop))]
        assert target.isnan().all(), f"{box} is held twice"
        target.copy_(values.view(box.shape))
    digest = hashlib.sha256()
    for name in sorted(whole):
        assert not whole[name].isnan().any(), f"{name} is not covered"
        digest.update(whole[name].numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("model", [{}, {"num_kv_heads": 2, "tie_embeddings": True}], ids=["plain", "grouped and tied"])
def test_one_hash_for_every_layout(model: dict[str, Any]) -> None:
    from megallama.plan.params import global_shapes

    hashes = set()
    for ranks, parallel in LAYOUTS:
        config = small_config(
            model=model, parallel=parallel, precision={"dtype": "bf16"}, batch={"global_batch_size": 24}
        )
        parts = on_threads(config, ranks, pieces)
        hashes.add(fingerprint([piece for part in parts for piece in part], global_shapes(config.model)))
    assert len(hashes) == 1


def test_values_are_standard_normal_and_independent() -> None:
    n = 1 << 20
    x = normal_at(torch.arange(n), 1, "w")
    for power, want in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        spread = math.sqrt(math.prod(range(1, 4 * power, 2)) / n) * 5
        assert abs(x.pow(power).mean().item() - want) < spread, power
    for lag in (1, 2, 64, 4096):
        assert abs((x[lag:] * x[:-lag]).mean().item()) < 5 / math.sqrt(n), lag
    assert abs((x * normal_at(torch.arange(n), 2, "w")).mean().item()) < 5 / math.sqrt(n)
    assert abs((x * normal_at(torch.arange(n), 1, "v")).mean().item()) < 5 / math.sqrt(n)
    inside = (x.abs() < 1).double().mean().item()
    assert abs(inside - math.erf(1 / math.sqrt(2))) < 5 * math.sqrt(0.25 / n)
    far = normal_at(torch.arange(n) + 2**40, 1, "w")  # beyond 32 bits of index
    assert abs(far.mean().item()) < 5 / math.sqrt(n) and not torch.equal(far, x)


@pytest.mark.parametrize(("block", "calls"), [(llama.BLOCK, 1), (100, 35), (10, 70)])
def test_any_rectangle_is_a_cut_of_the_whole(monkeypatch: pytest.MonkeyPatch, block: int, calls: int) -> None:
    made: list[int] = []

    def counted(index: torch.Tensor, seed: int, name: str) -> torch.Tensor:
        made.append(index.numel())
        return normal_at(index, seed, name)

    monkeypatch.setattr(llama, "BLOCK", block)
    monkeypatch.setattr(llama, "normal_at", counted)
    whole = torch.empty(70, 50)
    fill(whole, Box.whole("w", (70, 50)), (70, 50), 3, 0.02)
    assert torch.equal(whole, (normal_at(torch.arange(3500), 3, "w") * 0.02).view(70, 50).float())  # row by row
    assert len(made) == calls  # one row at a time would take far longer
    part = torch.empty(13, 29)
    fill(part, Box("w", (41, 7), (54, 36)), (70, 50), 3, 0.02)
    assert torch.equal(part, whole[41:54, 7:36])
    assert abs(whole.std().item() - 0.02) < 0.001


def by_hand(index: int, seed: int, name: str) -> float:
    """One value in plain integers: the mixing function of Wellons (lowbias32), then Box and Muller's transform."""

    def mix(x: int) -> int:
        x = ((x ^ x >> 16) * 0x7FEB352D) % 2**32
        x = ((x ^ x >> 15) * 0x846CA68B) % 2**32
        return x ^ x >> 16

    key = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    k0, k1 = int.from_bytes(key[:4], "little"), int.from_bytes(key[4:], "little")
    low, high = index % 2**32, index // 2**32
    a = mix(mix(low ^ k0) ^ mix(high ^ k1) ^ k1)
    b = mix(mix(a ^ low) ^ k0)
    return math.sqrt(-2 * math.log((a + 0.5) / 2**32)) * math.cos(b * (2 * math.pi / 2**32))


def test_values_are_those_of_the_first_version() -> None:
    """A run that starts today from a seed starts where it would have started then."""
    index = torch.tensor([0, 1, 2**33 + 5])
    values = normal_at(index, 7, "lm_head.weight").tolist()
    assert values == pytest.approx([0.13976706865700197, -0.5262532647548631, 0.3328443661834406], rel=1e-12)
    assert values == pytest.approx([by_hand(i, 7, "lm_head.weight") for i in index.tolist()], rel=1e-12)
