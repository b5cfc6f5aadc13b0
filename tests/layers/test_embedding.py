"""The vocabulary-parallel embedding picks the row of every id; micro-batches keep documents apart."""

from __future__ import annotations

import numpy as np
import torch

from megallama.layers.batch import MicroBatch
from megallama.train.assemble import Worker
from tests.small import on_threads, small_config


def test_every_id_is_picked_from_the_rank_that_holds_it() -> None:
    config = small_config(parallel={"tp": 2, "sequence_parallel": False})
    ids = torch.arange(config.model.vocab_size).flip(0)

    def look_up(rank: Worker) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        embed = rank.stages[0].embed
        assert embed is not None
        rank.optimizer.start_step()
        out = embed(ids)
        (out * torch.arange(1, len(ids) + 1)[:, None]).sum().backward()
        return out.detach(), embed.param.weight.clone(), embed.param.main_grad.clone()

    (out, first, first_grad), (same, second, second_grad) = on_threads(config, 2, look_up)
    assert torch.equal(out, same) and torch.equal(out, torch.cat([first, second])[ids])
    grads = torch.cat([first_grad, second_grad])[: len(ids), 0]
    assert grads.tolist() == list(range(len(ids), 0, -1))  # id n stands at place size - 1 - n


def test_a_document_predicts_nothing_of_the_next() -> None:
    batch = MicroBatch.of(np.array([[5, 6, 7, 8, 9]]), np.array([[0, 0, 2, 2, 4]]))
    assert batch.tokens.tolist() == [[5, 6, 7, 8]] and batch.labels.tolist() == [[6, 7, 8, 9]]
    assert batch.mask is not None and batch.mask.tolist() == [[True, False, True, False]] and batch.num_counted == 2
    assert batch.documents is not None and batch.documents.starts.tolist() == [[0, 0, 2, 2]]
    assert batch.documents.cu_seqlens.tolist() == [0, 2, 4]
    padded = MicroBatch.of(np.array([[5, 6, 7], [1, 2, 3]]), np.array([[0, 0, 0]] * 2), [True, False])
    assert padded.mask is not None and padded.mask.tolist() == [[True, True], [False, False]]
