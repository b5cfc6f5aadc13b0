"""What each kind of processor does fastest: `processors.toml`, measured by `megallama doctor --measure`.

A new run takes the first entry that fits, of a user's table (`run.processor_table`), then of this package's.  Without
one, and in a run that has begun, nothing changes: checkpoints hold what was taken.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from megallama.config.errors import ConfigError
from megallama.config.load import read_toml
from megallama.config.schema import Section

SHIPPED = Path(__file__).with_name("processors.toml")
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")  # the last three of ARM


class Entry(Section):
    """One kind of processor, and what it does fastest."""

    name: str  # in words: processor, date, what was measured
    vendor: str = ""  # as Linux has it; empty: any
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    widths: tuple[int, int] = (1, 1 << 30)  # the hidden sizes for which it holds
    bf16: bool = True  # as fast as fp32, or faster
    compile: bool = False  # torch.compile of pointwise operations pays
    kernels: dict[str, dict[str, str]] = {}  # number format -> operation -> candidate


@dataclass(frozen=True)
class Processor:
    """Vendor and instruction sets of a CPU."""

    vendor: str
    features: frozenset[str]

    @classmethod
    def here(cls) -> Processor:
        """This machine's; empty where Linux does not say."""
        about = cpuinfo()
        flags = set(about.get("flags", about.get("Features", "")).split())
        return cls(about.get("vendor_id", about.get("CPU implementer", "")), frozenset(flags & {*FEATURES}))

    @property
    def has_bf16(self) -> bool:
        return bool(self.features & {"avx512_bf16", "amx_bf16", "bf16"})

    def entry(self, width: int, user: str | None = None) -> Entry | None:
        """The first entry that fits; `width`: the hidden size. Raises: ConfigError."""
        for path in [*([Path(user)] if user else []), SHIPPED]:
            for entry in entries(path):
                fits = entry.vendor in ("", self.vendor) and entry.widths[0] <= width <= entry.widths[1]
                if fits and self.features >= {*entry.has} and not self.features & {*entry.lacks}:
                    return entry
        return None


def entries(path: Path) -> list[Entry]:
    """The entries of a table, in order. Raises: ConfigError with what is wrong with it."""
    tree = read_toml(path, "the table of processors")
    try:
        found = [Entry.model_validate(entry) for entry in tree.pop("processor", [])]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"run.processor_table={path}: {where}: {first['msg']} ({first['input']!r})") from None
    strange = {*tree} | {f for e in found for f in (*e.has, *e.lacks)} - {*FEATURES}
    if strange:
        raise ConfigError(
            f"run.processor_table={path}: {', '.join(sorted(strange))} is not known; it holds [[processor]] with "
            f"{', '.join(Entry.model_fields)}, and features are {', '.join(FEATURES)}"
        )
    return found


def digest(user: str | None) -> str:
    """A digest of a user's table, for a comparison of ranks. Raises: as `entries`."""
    if user is None:
        return ""
    found = "\n".join(entry.model_dump_json() for entry in entries(Path(user)))
    return f", run.processor_table {hashlib.sha256(found.encode()).hexdigest()[:12]}"


def cpuinfo() -> dict[str, str]:
    """What Linux says of the first core, by its names; empty where it says nothing."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}
