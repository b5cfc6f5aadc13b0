"""What is kept for the backward: counted with saved-tensor hooks, equal to the formulas, the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from megallama.layers.batch import MicroBatch
from megallama.train.assemble import Worker
from tests.small import body_of, on_threads, small_config, tokens, train

H, F, HEADS, TOKENS = 64, 96, 4, 32
SIZES = {"hidden_size": H, "ffn_hidden_size": F, "num_heads": HEADS, "num_layers": 1, "vocab_size": 61}


def saved_bytes(rank: Worker) -> tuple[int, int]:
    """(16-bit bytes, fp32 bytes) that one layer keeps; a tensor kept twice counts once, weights never."""
    layer = rank.stages[0].layers[0]
    storages: dict[int, tuple[torch.dtype, int]] = {}
    keep_alive = []
    tables = rank.stages[0].rotary.tables(None)
    permanent = {t.untyped_storage().data_ptr() for t in tables}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() in permanent:
            return tensor
        storages[tensor.untyped_storage().data_ptr()] = (tensor.dtype, tensor.untyped_storage().nbytes())
        keep_alive.append(tensor)
        return tensor

    rows = TOKENS // (rank.groups.tp.size if rank.plan.config.parallel.sequence_parallel else 1)
    x = torch.randn(rows, H).bfloat16().requires_grad_()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        stage = rank.stages[0]
        stage.layers = [layer]
        ids = torch.zeros(1, TOKENS, dtype=torch.int64)  # of one sample
        body_of(stage, embed=False)(x + 0, MicroBatch(ids, ids))
    half = sum(n for dtype, n in storages.values() if dtype == torch.bfloat16)
    single = sum(n for dtype, n in storages.values() if dtype == torch.float32)
    assert half + single == sum(n for _, n in storages.values())
    return half, single


FORMULA = {"none": 16 * H + 6 * F, "selective": 12 * H + 4 * F, "full": 2 * H}
STATISTICS = 0  # row statistics are formed again; fused attention kernels keep a logsumexp a head


@pytest.mark.parametrize("recompute", FORMULA)
@pytest.mark.parametrize("tp", [1, 2])
def test_saved_bytes_per_token_are_the_formula(recompute: str, tp: int) -> None:
    config = small_config(
        model=SIZES,
        precision={"dtype": "bf16"},
        memory={"recompute": recompute},
        batch={"micro_batch_size": 2},
        parallel={"tp": tp},
    )
    for half, single in on_threads(config, tp, saved_bytes):
        assert half * tp == TOKENS * FORMULA[recompute]
        assert single == STATISTICS


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("tp", [1, 2])
def test_gradients_are_the_same_bits_in_all_modes(dtype: str, tp: int) -> None:
    def gradients(recompute: str) -> list[Any]:
        config = small_config(precision={"dtype": dtype}, memory={"recompute": recompute}, parallel={"tp": tp})

        def one(rank: Worker) -> torch.Tensor:
            train(rank, tokens(config, 2))
            return torch.cat([rank.buffers[0].grads.double(), rank.buffers[0].weights.double()])

        return on_threads(config, tp, one)

    base = gradients("none")
    for recompute in ("selective", "full"):
        for own, theirs in zip(gradients(recompute), base, strict=True):
            assert torch.equal(own.nan_to_num(7), theirs.nan_to_num(7))
