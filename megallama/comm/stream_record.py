"""The flight record of a rank on a GPU, whose host runs ahead: where its stream is counts."""

import ctypes
from typing import Any

import torch

from megallama.comm.flight_record import COMPLETED, LAUNCHED, FlightRecord


class StreamRecord(FlightRecord):
    """In the file of `record`. By a copy in its stream the device tells what it has completed.

    Own work and waits are taken by events, read a step later, when nobody waits for them.
    """

    def __init__(self, record: FlightRecord, device: torch.device) -> None:
        super().__init__(record.file, record.stacks)
        self._device, self._waits = device, list[tuple[torch.cuda.Event, torch.cuda.Event]]()
        self._event = torch.cuda.Event(enable_timing=True)
        self._before: tuple[Any, Any, Any] | None = None  # the last step's begin, end, waits
        self._count = torch.zeros(1, dtype=torch.int64, device=device)
        self._told = torch.frombuffer(self.memory, dtype=torch.int64, offset=COMPLETED * 8, count=1)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        # a copy into memory that is not registered would make the host wait
        self._tells = int(torch.cuda.cudart().cudaHostRegister(address, len(self.memory), 0)) == 0

    def action(self, kind: str, stage: int = 0, microbatch: int = 0) -> None:
        super().action(kind, stage, microbatch)
        if not kind and self._tells:
            self._count.fill_(self.words[LAUNCHED])
            self._told.copy_(self._count, non_blocking=True)

    def waits(self, place: int) -> None:
        """The stream will wait, the host does not."""
        self._event = event_now(self._device)

    def arrived(self, place: int) -> None:
        self._waits.append((self._event, event_now(self._device)))

    def work_begins(self) -> None:
        self._waits, self._start = [], event_now(self._device)

    def work_done(self) -> None:
        done, self._before = self._before, (self._start, event_now(self._device), self._waits)
        if done is not None and done[1].query():
            start, end, waits = done
            self._remember(int(1e6 * (start.elapsed_time(end) - sum(a.elapsed_time(b) for a, b in waits))))


def event_now(device: torch.device) -> torch.cuda.Event:
    """Comes when the device's current stream has done all that it was given so far."""
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
