"""On the path of a rank: Python imports it first of all, and SLOWED times what a step does itself it then takes."""

import os
import time

if by := float(os.environ.get("SLOWED", "0")):
    from megallama.comm.flight_record import WAITED, FlightRecord

    done = FlightRecord.work_done

    def work_done(self: FlightRecord) -> None:
        own = self.clock() - self.words[WAITED] - self._began
        until = time.thread_time_ns() + (by - 1) * own
        while time.thread_time_ns() < until:
            pass
        done(self)

    FlightRecord.work_done = work_done  # type: ignore[method-assign]
