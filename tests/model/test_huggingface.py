"""Logits, loss and every gradient against Hugging Face's LlamaForCausalLM with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megallama.layers.batch import MicroBatch
from tests.model.reference import full_tensors, lifted, reference_model
from tests.small import logits as our_logits
from tests.small import small_config, solo_rank, tokens

SHAPES: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "grouped-query": {"num_kv_heads": 2},
    "tied": {"tie_embeddings": True},
    "scaled rope": {"rope_theta": 500000.0, "rope_scaling": {"factor": 4.0, "original_max_position": 8}},
    "yarn": {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_position": 8}},
    "wide heads": {"head_dim": 16, "num_kv_heads": 1},
}
TOLERANCE = {"fp64": 1e-10, "fp32": 2e-5}


def relative(own: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference over norm of the reference."""
    return float((own - theirs).detach().norm() / theirs.detach().norm())


@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_logits_loss_and_gradients(shape: str, dtype: str, recompute: str) -> None:
    model = {"init_std": 0.2, "num_layers": 2, **SHAPES[shape]}
    config = small_config(model=model, precision={"dtype": dtype}, memory={"recompute": recompute})
    rank = solo_rank(config)
    for name, param in rank.buffers[0].params.items():
        if "norm" in name:  # ones would hide a missing weight
            param.data.add_(torch.arange(param.data.numel()) * 0.01)
    reference = reference_model(config, full_tensors(rank, "data"))

    batch = tokens(config, 1)[0, :2]
    inputs, labels = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    with lifted(torch.float64 if dtype == "fp64" else torch.float32):
        logits = reference(inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
        loss.backward()

    stage = rank.stages[0]
    total = stage(None, MicroBatch(inputs, labels, grad_scale=1 / labels.numel()))
    total.backward()
    with torch.no_grad():
        own = our_logits(rank, inputs.reshape(-1)).view_as(logits)

    limit = TOLERANCE[dtype]
    assert relative(own, logits) <= limit
    assert abs(total.item() / labels.numel() - loss.item()) <= limit * loss.item()
    gradients = full_tensors(rank, "main_grad")
    theirs = {name: p.grad for name, p in reference.named_parameters()}
    assert gradients.keys() == theirs.keys()
    for name, grad in gradients.items():
        assert relative(grad, theirs[name]) <= limit, name
