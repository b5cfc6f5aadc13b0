"""The loader: what it delivers from any start, how faults in its thread come out, padding."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from megallama.data.batch import MicroBatch
from megallama.data.errors import DataError
from megallama.data.loader import Loader


def sample(i: int) -> np.ndarray:
    return np.arange(100 * i, 100 * i + 5)


def ids_of_step(step: int) -> list[list[int]]:
    return [[4 * step, 4 * step + 1], [4 * step + 2, 4 * step + 3]]


def first_tokens(batches: list[MicroBatch]) -> list[list[int]]:
    return [(b.tokens[:, 0] // 100).tolist() for b in batches]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_batches_of_every_step_from_any_start(prefetch: int) -> None:
    for start in (0, 3):
        with Loader(sample, ids_of_step, start_step=start, stop_step=6, prefetch=prefetch) as loader:
            assert [first_tokens(b) for b in loader] == [ids_of_step(s) for s in range(start, 6)]
            assert loader.step == 6


def test_labels_are_the_next_tokens() -> None:
    with Loader(sample, ids_of_step, start_step=1, prefetch=1, device=torch.device("cpu")) as loader:
        batch = loader.next()[1]
    assert batch.tokens.tolist() == [[600, 601, 602, 603], [700, 701, 702, 703]]
    assert batch.labels.tolist() == [[601, 602, 603, 604], [701, 702, 703, 704]]
    assert batch.mask is None and batch.num_counted == 8
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.tokens.is_contiguous() and batch.labels.is_contiguous()


def test_ids_beyond_the_last_sample_are_padding() -> None:
    asked: list[int] = []

    def recorded(i: int) -> np.ndarray:
        asked.append(i)
        return sample(i)

    with Loader(recorded, ids_of_step, stop_step=2, num_samples=5, prefetch=0) as loader:
        first, second = list(loader)
    assert [b.mask for b in first] == [None, None]
    assert second[0].mask is not None and second[0].mask.tolist() == [[True] * 4, [False] * 4]
    assert [b.num_counted for b in second] == [4, 0]
    assert max(asked) == 4


def test_an_exception_in_the_thread_is_raised_with_its_traceback() -> None:
    def broken(i: int) -> np.ndarray:
        return sample(i) if i < 6 else np.zeros(1 // 0)

    for prefetch in (0, 2):
        loader = Loader(broken, ids_of_step, prefetch=prefetch, name="valid")
        assert first_tokens(loader.next()) == [[0, 1], [2, 3]]
        for _ in range(2):  # and again if asked again
            with pytest.raises(DataError) as error:
                loader.next()
            text = str(error.value)
            assert "the valid loader failed at step 1, micro-batch 1, sample 6: ZeroDivisionError" in text
            assert "np.zeros(1 // 0)" in text
        loader.close()


def test_an_error_for_the_user_comes_out_as_it_is() -> None:
    def truncated(i: int) -> np.ndarray:
        raise DataError("a.bin ends at byte 10")

    with Loader(truncated, ids_of_step) as loader, pytest.raises(DataError, match="^a.bin ends at byte 10$"):
        loader.next()


def test_a_stuck_thread_is_named_within_the_timeout() -> None:
    release = threading.Event()

    def stuck(i: int) -> np.ndarray:
        if i == 5:
            release.wait(60)
        return sample(i)

    with Loader(stuck, ids_of_step, timeout_seconds=0.2) as loader:
        loader.next()
        with pytest.raises(DataError) as error:
            loader.next()
        release.set()
    assert str(error.value) == (
        "the train loader has delivered nothing for 0.2 s: its thread loader-train is at step 1, micro-batch 0, "
        "sample 5; look at the storage, or raise data.timeout_seconds"
    )
    assert loader.wait_seconds >= 0.2


def test_the_thread_stays_ahead_and_ends_when_closed() -> None:
    asked: list[int] = []
    seen = threading.Semaphore(0)

    def recorded(i: int) -> np.ndarray:
        asked.append(i)
        seen.release()
        return sample(i)

    loader = Loader(recorded, ids_of_step, prefetch=2)
    for _ in range(12):  # two steps wait in the queue, a third in the thread's hands
        assert seen.acquire(timeout=30)
    assert not seen.acquire(timeout=0.3) and asked == list(range(12))
    loader.close()
    assert "loader-train" not in [t.name for t in threading.enumerate()]
