"""Micro-batches prepared ahead of the training step by one background thread.

The thread asks two pure functions, which sample numbers a step needs and what tokens a sample has, so a loader started
at step n delivers what one started at 0 would deliver at n.  A fault in the thread is raised where the batch is asked
for; a thread that delivers nothing (hanging storage) becomes an error that says where it is.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import numpy as np
import torch

from megallama.config.errors import MegallamaError
from megallama.data.batch import MicroBatch
from megallama.data.errors import DataError

Item = tuple[int, list[MicroBatch], BaseException | None]


class Loader:
    """Delivers the micro-batches of step after step: `next()`, or iterate.

    sample(i): the tokens of sample i, int64 [s + 1].
    ids_of_step(step): sample numbers of each micro-batch of this rank.
    start_step .. stop_step - 1: the steps delivered (stop_step None: no end).
    num_samples: ids from here on are padding (a mask leaves them out of the loss); None: every id is real.
    prefetch: steps prepared ahead; 0 prepares in `next()` itself, without a thread.
    `wait_seconds` is the time spent waiting in `next()` so far.
    """

    def __init__(
        self,
        sample: Callable[[int], np.ndarray],
        ids_of_step: Callable[[int], Sequence[Sequence[int]]],
        *,
        start_step: int = 0,
        stop_step: int | None = None,
        num_samples: int | None = None,
        prefetch: int = 2,
        timeout_seconds: float = 60.0,
        device: torch.device | None = None,
        pin: bool = False,
        name: str = "train",
    ) -> None:
        self._sample, self._ids_of_step, self._num_samples = sample, ids_of_step, num_samples
        self._stop_step, self._timeout, self._device, self._pin = stop_step, timeout_seconds, device, pin
        self.name, self.step, self.wait_seconds = name, start_step, 0.0
        self._closed, self._at = threading.Event(), "not started"
        self._queue: queue.Queue[Item] = queue.Queue(max(prefetch, 1))
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        if prefetch > 0:
            self._thread = threading.Thread(target=self._work, args=(start_step,), name=f"loader-{name}", daemon=True)
            self._thread.start()

    def next(self) -> list[MicroBatch]:
        """The micro-batches of the next step, on the device.

        Raises: DataError if the thread is stuck; what it raised if it failed; StopIteration after the last step.
        """
        if self._failure:
            raise self._failure
        if self.step == self._stop_step:
            raise StopIteration
        start = time.monotonic()
        try:
            item = self._queue.get(timeout=self._timeout) if self._thread else self._attempt(self.step)
        except queue.Empty:
            raise DataError(
                f"the {self.name} loader has delivered nothing for {self._timeout:g} s: its thread loader-{self.name} "
                "is at "
                f"{self._at}; look at the storage, or raise data.timeout_seconds"
            ) from None
        finally:
            self.wait_seconds += time.monotonic() - start
        number, batches, self._failure = item
        if self._failure:
            raise self._failure
        assert number == self.step, (number, self.step)
        self.step += 1
        return batches if self._device is None else [batch.to(self._device) for batch in batches]

    def _attempt(self, step: int) -> Item:
        try:
            return step, self._prepare(step), None
        except MegallamaError as error:
            return step, [], error
        except Exception as error:
            failure = DataError(f"the {self.name} loader failed at {self._at}: {error!r}\n{traceback.format_exc()}")
            return step, [], failure

    def _prepare(self, step: int) -> list[MicroBatch]:
        batches = []
        for number, ids in enumerate(self._ids_of_step(step)):
            samples, real = [], [self._num_samples is None or i < self._num_samples for i in ids]
            for i, is_real in zip(ids, real, strict=True):
                self._at = f"step {step}, micro-batch {number}, sample {i}"
                samples.append(self._sample(i if is_real else 0))
            batch = MicroBatch.from_samples(samples, real)
            batches.append(batch.pin() if self._pin else batch)
        return batches

    def _work(self, step: int) -> None:
        while step != self._stop_step and not self._closed.is_set():
            item = self._attempt(step)
            while not self._closed.is_set():
                try:
                    self._queue.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if item[2]:
                return
            step += 1

    def close(self) -> None:
        """End the thread; one that hangs is left behind (it is a daemon)."""
        self._closed.set()
        if self._thread:
            self._thread.join(1.0)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        return self.next()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
