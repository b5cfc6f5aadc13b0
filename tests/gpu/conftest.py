"""GPU tests need a CUDA device; elsewhere each is skipped and says why."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def cuda() -> torch.device:
    """The device of a GPU test."""
    if not torch.cuda.is_available():
        pytest.skip(f"no CUDA device: torch {torch.__version__} finds none")
    return torch.device("cuda", 0)
