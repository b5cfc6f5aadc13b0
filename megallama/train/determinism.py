"""Deterministic mode: the same inputs give the same bits, at the price of slower kernels on a GPU.

Nothing here seeds anything: initial weights and the sample order are functions of `train.seed`, and
a LLaMA has no dropout.  cuBLAS also needs CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment before
its first call; that is the launcher's to set, and torch says so if it is missing.
"""

from __future__ import annotations

import torch


def set_deterministic(on: bool) -> None:
    """Allow only deterministic kernels (an operation without one raises), or any."""
    if torch.are_deterministic_algorithms_enabled() != on:  # the call takes seconds: it imports a compiler
        torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # all buffers get written
    torch.backends.cudnn.deterministic = on
    torch.backends.cudnn.benchmark = False  # autotuning picks kernels by chance
