"""The loader: what it delivers from any start, how faults in its thread come out, padding."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from megallama.config.errors import DataError
from megallama.data.indexed import IndexedDataset
from megallama.data.loader import Loader
from megallama.data.samples import Samples, Source
from megallama.data.writer import IndexedWriter
from megallama.layers.batch import MicroBatch


def read(ids: Sequence[int]) -> Samples:
    return Samples(np.array([np.arange(100 * i, 100 * i + 5) for i in ids]))


def ids_of_step(step: int) -> list[list[int]]:
    return [[4 * step, 4 * step + 1], [4 * step + 2, 4 * step + 3]]


def first_tokens(batches: list[MicroBatch]) -> list[list[int]]:
    return [(b.tokens[:, 0] // 100).tolist() for b in batches]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_batches_of_every_step_from_any_start(prefetch: int) -> None:
    for start in (0, 3):
        with Loader(read, ids_of_step, start_step=start, stop_step=6, prefetch=prefetch) as loader:
            assert [first_tokens(b) for b in loader] == [ids_of_step(s) for s in range(start, 6)]
            assert loader.step == 6


def test_labels_are_the_next_tokens() -> None:
    with Loader(read, ids_of_step, start_step=1, prefetch=1, device=torch.device("cpu")) as loader:
        batch = next(loader)[1]
    assert batch.tokens.tolist() == [[600, 601, 602, 603], [700, 701, 702, 703]]
    assert batch.labels.tolist() == [[601, 602, 603, 604], [701, 702, 703, 704]]
    assert batch.mask is None and batch.num_counted == 8
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.tokens.is_contiguous() and batch.labels.is_contiguous()


def test_ids_beyond_the_last_sample_are_padding() -> None:
    requested: list[int] = []

    def recorded(ids: Sequence[int]) -> Samples:
        requested.extend(ids)
        return read(ids)

    with Loader(recorded, ids_of_step, stop_step=2, num_samples=5, prefetch=0) as loader:
        first, second = list(loader)
    assert [b.mask for b in first] == [None, None]
    assert second[0].mask is not None and second[0].mask.tolist() == [[True] * 4, [False] * 4]
    assert [b.num_counted for b in second] == [4, 0]
    assert max(requested) == 4


def test_an_exception_in_the_thread_is_raised_with_its_traceback() -> None:
    def broken(ids: Sequence[int]) -> Samples:
        return read(ids) if max(ids) < 6 else Samples(np.zeros(1 // 0))

    for prefetch in (0, 2):
        loader = Loader(broken, ids_of_step, prefetch=prefetch, name="valid")
        assert first_tokens(next(loader)) == [[0, 1], [2, 3]]
        for _ in range(2):  # and again if asked again
            with pytest.raises(DataError) as error:
                next(loader)
            text = str(error.value)
            assert "the valid loader failed at step 1, samples 4 to 7: ZeroDivisionError" in text
            assert "np.zeros(1 // 0)" in text
        if loader._thread:  # prepares nothing more
            loader._thread.join(30)
            assert not loader._thread.is_alive()
        loader.close()


def test_an_error_for_the_user_comes_out_as_it_is() -> None:
    def truncated(ids: Sequence[int]) -> Samples:
        raise DataError("a.bin ends at byte 10")

    with Loader(truncated, ids_of_step) as loader, pytest.raises(DataError, match="^a.bin ends at byte 10$"):
        next(loader)


def test_a_stuck_thread_is_named_within_the_timeout() -> None:
    release = threading.Event()

    def stuck(ids: Sequence[int]) -> Samples:
        if 5 in ids:
            release.wait(60)
        return read(ids)

    with Loader(stuck, ids_of_step, timeout_seconds=0.2) as loader:
        next(loader)
        with pytest.raises(DataError) as error:
            next(loader)
        release.set()
    assert str(error.value) == (
        "the train loader has delivered nothing for 0.2 s: its thread loader-train is at step 1, samples 4 to 7; "
        "look at the storage, or raise data.timeout_seconds"
    )
    assert loader.wait_seconds >= 0.2


def test_the_thread_stays_ahead_and_ends_when_closed() -> None:
    requested: list[int] = []
    seen = threading.Semaphore(0)

    def recorded(ids: Sequence[int]) -> Samples:
        requested.extend(ids)
        seen.release()
        return read(ids)

    loader = Loader(recorded, ids_of_step, prefetch=2)
    for _ in range(3):  # two steps wait in the queue, a third in the thread's hands
        assert seen.acquire(timeout=30)
    assert not seen.acquire(timeout=0.3) and requested == list(range(12))
    loader.close()
    assert "loader-train" not in [t.name for t in threading.enumerate()]


class Panic(BaseException):
    """As a library written in Rust raises it: no Exception."""


@pytest.mark.parametrize("ending", [SystemExit("gone"), Panic("gone"), GeneratorExit("gone")])
def test_what_would_end_the_thread_is_an_error_that_says_where(ending: BaseException) -> None:
    """At once, and not after the time of a stuck thread; what it had delivered before still comes out."""
    hold = threading.Event()

    def leaving(ids: Sequence[int]) -> Samples:
        hold.wait(60)
        if max(ids) < 4:
            return read(ids)
        raise ending

    with Loader(leaving, ids_of_step, timeout_seconds=60) as loader:
        hold.set()
        assert first_tokens(next(loader)) == [[0, 1], [2, 3]]
        start = time.monotonic()
        what = f"loader failed at step 1, samples 4 to 7: {type(ending).__name__}.'gone'."
        with pytest.raises(DataError, match=what) as error:
            next(loader)
        assert time.monotonic() - start < 30 and error.value.status == 1


def test_ctrl_c_is_no_fault_of_the_data() -> None:
    def interrupted(ids: Sequence[int]) -> Samples:
        raise KeyboardInterrupt

    with Loader(interrupted, ids_of_step, prefetch=0) as loader, pytest.raises(KeyboardInterrupt):
        next(loader)


def numbers(prefix: Path) -> Path:
    """3000 tokens, token i is i % 61, in documents of 1 to 9 tokens."""
    lengths = np.resize(np.arange(1, 10), 600)
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add(np.arange(lengths.sum()) % 61, lengths)
    return prefix


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_file_truncated_while_it_is_read_is_named(tmp_path: Path, prefetch: int) -> None:
    """pread, not mmap: an error with a name in it, where a mapping would kill the process by SIGBUS."""
    source = Source(IndexedDataset(numbers(tmp_path / "a")), 16, 7)
    with Loader(source.read, ids_of_step, prefetch=prefetch) as loader:
        next(loader)
        os.truncate(tmp_path / "a.bin", 100)
        with pytest.raises(DataError, match=r"a.bin ends at byte 100, expected 34 bytes from byte \d+ .* truncated"):
            for _ in range(10):
                next(loader)


def test_document_starts_and_the_mask_from_them(tmp_path: Path) -> None:
    """Against the same made token by token from the list of document lengths."""
    dataset = IndexedDataset(numbers(tmp_path / "a"))
    begins = set(np.cumsum([0, *np.resize(np.arange(1, 10), 600)]).tolist())
    source = Source(dataset, 16, 7, mark_documents=True)
    with Loader(source.read, ids_of_step, prefetch=0, num_samples=7) as loader:
        for step in range(2):
            for ids, batch in zip(ids_of_step(step), next(loader), strict=True):
                assert batch.documents is not None and batch.mask is not None
                for row, i in enumerate(ids):
                    first = int(source.sequences(np.array([i if i < 7 else 0]))[0]) * 16
                    starts, at = [], 0
                    for t in range(16):
                        at = t if first + t in begins else at
                        starts.append(at)
                    assert batch.documents.starts[row].tolist() == starts
                    counted = [i < 7 and first + t + 1 not in begins for t in range(16)]
                    assert batch.mask[row].tolist() == counted
                    assert batch.labels[row].tolist() == [(first + t + 1) % 61 for t in range(16)]
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.documents.starts, batch.documents.starts) and moved.num_counted == batch.num_counted
