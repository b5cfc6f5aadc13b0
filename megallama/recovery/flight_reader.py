"""A flight record as a supervisor reads it: where the rank stands. A training run writes, and imports none of this."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from megallama.comm import flight_record as word
from megallama.comm.flight_record import FlightRecord

# in the order of the words
STATE = "step phase action stage microbatch layer seconds limit launched completed saving steps".split()
CALL = "number group operation rows bytes peer began done".split()


class FlightReader(FlightRecord):
    """The record of a rank, of this process or of another."""

    def state(self) -> dict[str, Any]:
        """Where the rank stands, in JSON values."""
        now, groups = time.monotonic_ns(), self.told("groups") or []
        words = dict(zip(STATE, self.words[word.STEP : word.WAITED], strict=True))
        found: dict[str, Any] = words | {
            "phase": word.PHASES[words["phase"]],
            "action": word.ACTIONS[words["action"]],
            "seconds": (now - words["seconds"]) / 1e9,
            "limit": words["limit"] / 1e9,
            "saving": bool(words["saving"]),
            "counts": {name: self.words[word.COUNTS + i] for i, (name, _) in enumerate(groups[: word.MAX_GROUPS])},
        }
        place, since = self.words[word.SINCE : word.SINCE + 2]
        if place:
            found["wait"] = self.call(place - 1, groups) | {"seconds": (now - since) / 1e9}
        return found

    def call(self, place: int, groups: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """A communication of the list."""
        at = word.FIRST_CALL + place * word.CALL_WORDS
        words = dict(zip(CALL, self.words[at : at + word.CALL_WORDS], strict=True))
        group, operation = words["group"], word.OPERATIONS[words["operation"]]
        name, ranks = groups[group] if group < len(groups) else ("?", [])
        del words["began"]
        return words | {"group": name, "ranks": ranks, "operation": operation, "done": bool(words["done"])}

    def calls(self) -> list[dict[str, Any]]:
        """The last communications, oldest first."""
        groups, words = self.told("groups") or [], self.words
        places = [p for p in range(word.CALLS) if words[word.FIRST_CALL + p * word.CALL_WORDS + word.NUMBER]]
        places.sort(key=lambda p: words[word.FIRST_CALL + p * word.CALL_WORDS + word.BEGAN])
        return [self.call(p, groups) for p in places]

    def busy(self) -> list[int]:
        """Own work of the last steps, oldest first [ns]."""
        done = self.words[word.STEPS]
        return [self.words[word.FIRST_BUSY + n % word.BUSY] for n in range(max(0, done - word.BUSY), done)]
