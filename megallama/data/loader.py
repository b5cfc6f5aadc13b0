"""Micro-batches prepared ahead by a thread, and copied to a GPU a step ahead."""

import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress

import torch

from megallama.config.errors import DataError, MegallamaError
from megallama.config.schema import Config
from megallama.data.samples import Reader
from megallama.layers.batch import MicroBatch
from megallama.plan.exchange import WHOLE, Share

CPU = torch.device("cpu")
Item = tuple[list[MicroBatch], MegallamaError | None]  # of one step; why there are none


class Loader(AbstractContextManager["Loader"], Iterator[list[MicroBatch]]):
    """Delivers the micro-batches of step after step: `next(loader)`, or iterate.

    ids_of_step(step): sample numbers of each micro-batch of this rank.
    start_step .. stop_step - 1: the steps delivered (stop_step None: no end).
    num_samples: ids from here on are padding (a mask leaves them out of the loss); None: every id is real.
    prefetch: steps prepared ahead; 0 prepares in `next` itself, without a thread.
    share: what this rank has of every sample.
    device: where to; for a GPU the thread pins what it prepares, and while a step runs the next one is copied.
    `wait_seconds` is the time spent waiting in `next` so far.
    """

    def __init__(
        self,
        read: Reader,
        ids_of_step: Callable[[int], Sequence[Sequence[int]]],
        *,
        start_step: int = 0,
        stop_step: int | None = None,
        num_samples: int | None = None,
        prefetch: int = 2,
        timeout_seconds: float = 60.0,
        device: torch.device = CPU,
        name: str = "train",
        share: Share = WHOLE,
    ) -> None:
        self._read, self._ids_of_step, self._num_samples = read, ids_of_step, num_samples
        self._stop_step, self._timeout, self._device, self._share = stop_step, timeout_seconds, device, share
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[list[MicroBatch], torch.cuda.Event] | None = None  # the next step, and its arrival
        self.name, self.step, self.wait_seconds = name, start_step, 0.0
        self._closed, self._at = threading.Event(), "not started"
        self._queue: queue.Queue[Item] = queue.Queue(max(prefetch, 1))
        self._failure: MegallamaError | None = None
        self._thread: threading.Thread | None = None
        if prefetch > 0:
            self._thread = threading.Thread(target=self._work, args=(start_step,), name=f"loader-{name}", daemon=True)
            self._thread.start()

    def __next__(self) -> list[MicroBatch]:
        """Of the next step, on the device. Raises: DataError for a stuck thread; its error."""
        if self._copies is None:
            batches = self._take()
            self.step += 1
            return [batch.to(self._device) for batch in batches]
        (there, arrived), self._ahead = self._ahead or self._send(self._copies), None
        self.step += 1
        if self.step != self._stop_step and not self._queue.empty():
            with suppress(MegallamaError):  # it is raised when that step is asked for
                self._ahead = self._send(self._copies)
        current = torch.cuda.current_stream(self._device)
        current.wait_event(arrived)  # the stream waits, the caller does not

        def used(tensor: torch.Tensor) -> torch.Tensor:
            tensor.record_stream(current)  # not reused before this stream is through
            return tensor

        return [batch.each(used) for batch in there]

    def _send(self, stream: torch.cuda.Stream) -> tuple[list[MicroBatch], torch.cuda.Event]:
        """The next step on its way to the GPU; pinned memory is kept until it was copied."""
        batches = self._take()
        with torch.cuda.stream(stream):
            return [batch.to(stream.device) for batch in batches], stream.record_event()

    def next_or_zeros(self, count: int, config: Config) -> tuple[list[MicroBatch], MegallamaError | None]:
        """As `next`; where it fails zeros, and why: the step ends when all ranks know."""
        try:
            return next(self), None
        except MegallamaError as error:
            return [MicroBatch.zeros(config).part(self._share).to(self._device)] * count, error

    def _take(self) -> list[MicroBatch]:
        """The micro-batches of the next step, on the host."""
        if not self._failure:
            if self.step == self._stop_step:
                raise StopIteration
            start = time.monotonic()
            try:
                item = self._queue.get(timeout=self._timeout) if self._thread else self._attempt(self.step)
            except queue.Empty:
                raise DataError(
                    f"the {self.name} loader has delivered nothing for {self._timeout:g} s: its thread "
                    f"loader-{self.name} is at {self._at}; look at the storage, or raise data.timeout_seconds"
                ) from None
            finally:
                self.wait_seconds += time.monotonic() - start
            batches, self._failure = item
        if self._failure:
            raise self._failure
        return batches

    def _attempt(self, step: int) -> Item:
        try:
            rows = self._ids_of_step(step)
            ids = [i for row in rows for i in row]
            self._at = f"step {step}, samples {ids[0]} to {ids[-1]}"
            end = self._num_samples
            tokens, starts = self._read(ids if end is None else [i if i < end else 0 for i in ids])  # all at once
            batches, first = [], 0
            for row in rows:
                here = slice(first, first := first + len(row))
                real = None if end is None else [i < end for i in row]
                batch = MicroBatch.of(tokens[here], None if starts is None else starts[here], real).part(self._share)
                # a GPU copies from page-locked memory in the background
                batches.append(batch.each(torch.Tensor.pin_memory) if self._copies else batch)
            return batches, None
        except MegallamaError as error:
            failure = error
        except OSError as error:
            failure = DataError(f"the {self.name} loader cannot read {self._at}: {error}; look at the storage")
        except KeyboardInterrupt:  # comes in the main thread alone
            raise
        except BaseException as error:  # whatever it is: it would end the thread in silence
            failure = DataError(f"the {self.name} loader failed at {self._at}: {error!r}\n{traceback.format_exc()}")
            failure.status = 1  # a fault of the program
        return [], failure

    def _work(self, step: int) -> None:
        failure = None
        while step != self._stop_step and not failure and not self._closed.is_set():
            batches, failure = self._attempt(step)
            self._queue.put((batches, failure))
            step += 1

    def close(self) -> None:
        """End the thread; one that hangs is left behind (it is a daemon)."""
        self._closed.set()
        with suppress(queue.Empty):  # room for what the thread may hold
            while self._thread:
                self._queue.get_nowait()
        if self._thread:
            self._thread.join(1.0)

    def __exit__(self, *_: object) -> None:
        self.close()
