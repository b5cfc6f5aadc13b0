"""Memory of a training step is linear in the sequence: no tensor of all queries by all keys, in no format."""

from __future__ import annotations

import pytest
import torch

from megallama.train.assemble import Worker
from tests.kernels.made import Made
from tests.small import documents, on_threads, small_config, solo_rank, tokens, train

MODEL = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "ffn_hidden_size": 24, "vocab_size": 32}


def step(dtype: str, length: int, masked: bool) -> Made:
    """What a step makes of one sample."""
    batch = {"seq_length": length, "global_batch_size": 1}
    memory = {"recompute": "none", "loss_chunk_tokens": 64}
    sections = {"model": MODEL, "batch": batch, "memory": memory, "precision": {"dtype": dtype}}
    rank = solo_rank(small_config(**sections, data={"document_mask": masked}))
    data, starts = tokens(rank.plan.config, 1), documents(rank.plan.config, 1) if masked else None
    with Made() as made:
        (result,) = train(rank, data, starts=starts)
    assert result.applied
    return made


@pytest.mark.parametrize("masked", [False, True], ids=["across documents", "within documents"])
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
def test_memory_of_a_step_is_linear_in_the_sequence(dtype: str, masked: bool) -> None:
    short, middle, long = (step(dtype, length, masked) for length in (1024, 2048, 4096))
    assert long.largest < 4096 * 4096 // 8
    assert 0.9 <= (long.peak - middle.peak) / (2 * (middle.peak - short.peak)) <= 1.05
    assert long.peak - middle.peak > 2048 * 2 * 16 * (2 if dtype == "bf16" else 4), "at least the input of each layer"


@pytest.mark.parametrize("masked", [False, True], ids=["across documents", "within documents"])
@pytest.mark.parametrize("way", ["gather", "heads"])
def test_so_it_is_where_sequences_are_cut(way: str, masked: bool) -> None:
    def peaks(length: int) -> list[tuple[int, int]]:
        batch = {"seq_length": length, "global_batch_size": 1}
        sections = {"model": MODEL, "batch": batch, "precision": {"dtype": "fp32"}, "data": {"document_mask": masked}}
        config = small_config(**sections, parallel={"cp": 2, "cp_exchange": way})
        data, starts = tokens(config, 1), documents(config, 1) if masked else None

        def body(rank: Worker) -> tuple[int, int]:
            with Made() as made:
                train(rank, data, starts=starts)
            return made.largest, made.peak

        return on_threads(config, 2, body)

    for (_, short), (_, middle), (largest, long) in zip(*map(peaks, (1024, 2048, 4096)), strict=True):
        assert largest < 4096 * 4096 // 8
        assert 0.9 <= (long - middle) / (2 * (middle - short)) <= 1.1


def test_scores_of_all_by_all_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, within: object = None) -> torch.Tensor:
        scores = torch.einsum("bqnd,bknd->bnqk", q, k.expand_as(q)).tril()
        return torch.einsum("bnqk,bknd->bqnd", scores, v.expand_as(q))

    monkeypatch.setattr("megallama.kernels.attention.sdpa", by_formula)
    short, long = (step("fp32", length, False) for length in (512, 1024))
    assert long.largest == 2 * 1024 * 1024 and long.peak > 3 * short.peak
