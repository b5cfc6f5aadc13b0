"""On a GPU: what was chosen, every candidate against float64, and a step against the CPU's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megallama.comm.group import Solo
from megallama.comm.groups import build_groups
from megallama.kernels import accelerated, choose
from megallama.kernels.attention import Attend, sdpa
from megallama.kernels.wgrad import add_wgrad_cuda
from megallama.plan.plan import make_plan
from megallama.train.assemble import DTYPES, Rank, assemble, initialize
from tests.small import curve, deviation, small_config, solo_rank, tokens, train


def on_gpu(config: Any, device: torch.device) -> Rank:
    plan = make_plan(config, 1)
    groups = build_groups(plan.topology, 0, config.model.num_kv_heads, lambda name, parts: Solo(name))
    rank = assemble(plan, groups, device, choose.choose_kernels(device, DTYPES[config.precision.dtype]))
    initialize(rank, config.train.seed)
    return rank


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_choice_is_reported(cuda: torch.device, dtype: torch.dtype) -> None:
    choices = choose.choose_kernels(cuda, dtype).choices
    print(*choices, sep="\n")
    assert [c.operation for c in choices] == ["attention", "matrix product", "weight gradient", "AdamW"]


def test_torch_attention_and_wgrad_pass_their_probes(cuda: torch.device) -> None:
    def make(n: int, k: int, d: int) -> Attend:
        return sdpa

    assert choose._checked_attention(make, cuda, torch.bfloat16, documents=True) is make
    assert choose._checked_wgrad(add_wgrad_cuda, cuda, torch.bfloat16) is add_wgrad_cuda


@pytest.mark.parametrize("name", ["te_attention", "te_wgrad", "apex_wgrad", "te_adam", "apex_adam"])
def test_installed_accelerators_pass_their_probes(cuda: torch.device, name: str) -> None:
    try:
        make: Any = getattr(accelerated, name)
        kernel = make(True) if name.endswith("adam") else make(True, torch.bfloat16)
    except accelerated.Refused as reason:
        pytest.skip(f"{name}: {reason}")
    if name.endswith("attention"):
        choose._checked_attention(kernel, cuda, torch.bfloat16, documents=True)
    elif name.endswith("wgrad"):
        choose._checked_wgrad(kernel, cuda, torch.bfloat16)
    else:
        choose._checked_adam(kernel, cuda)


@pytest.mark.parametrize("model", [{}, {"num_kv_heads": 2, "tie_embeddings": True, "vocab_size": 59}], ids=str)
@pytest.mark.parametrize(("dtype", "limit"), [("fp64", 1e-10), ("fp32", 1e-3), ("bf16", 3e-2)])
def test_a_gpu_trains_as_a_cpu(cuda: torch.device, model: dict[str, Any], dtype: str, limit: float) -> None:
    settings = {"model": {"hidden_size": 64, **model}, "precision": {"dtype": dtype}}
    config = small_config(**settings)
    data = tokens(config, 5)
    want = curve(train(solo_rank(config), data))
    mine = curve(train(on_gpu(config, cuda), data.to(cuda)))
    assert deviation(mine, want) <= limit


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_memory_is_flat_over_steps(cuda: torch.device, recompute: str) -> None:
    config = small_config(precision={"dtype": "bf16"}, memory={"recompute": recompute})
    rank = on_gpu(config, cuda)
    data = tokens(config, 3).to(cuda)
    train(rank, data)
    before = torch.cuda.memory_allocated(cuda)
    for _ in range(5):
        train(rank, data)
    assert torch.cuda.memory_allocated(cuda) == before
