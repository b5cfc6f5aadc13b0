"""The deterministic mode can be switched on and off."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megallama.train.setup import set_deterministic


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


def test_an_operation_without_a_deterministic_kernel_raises_only_when_on() -> None:
    x, index = torch.zeros(3, 3), torch.zeros(4, dtype=torch.long)

    def run() -> None:
        torch.ops.aten.put_(x, index, torch.ones(4), accumulate=False)

    set_deterministic(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        run()
    set_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()
    run()


def test_what_is_so_already_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call imports torch's compiler: 1.5 seconds of CPU per rank and start."""
    called: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", called.append)
    set_deterministic(False)
    set_deterministic(True)
    assert called == [True]


def test_new_memory_is_not_filled() -> None:
    set_deterministic(True)
    assert torch.utils.deterministic.fill_uninitialized_memory is False  # type: ignore[attr-defined]
