"""What `auto` means for a run: decided at its first start, then as its checkpoints have it."""

import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress

from megallama.checkpoint.folder import before
from megallama.config.describe import literal
from megallama.config.schema import Config
from megallama.kernels.processors import Processor


def decide(config: Config, note: Callable[[str], None]) -> Config:
    """`config` without "auto"; ranks that decide otherwise do not start together.

    Raises: ConfigError for a table of processors that is none.
    """
    dtype, compiled = config.precision.dtype == "auto", config.run.compile == "auto"
    if not (dtype or compiled):
        return config
    saved, gpus = before(config), [] if config.run.device == "cpu" else _capabilities()
    here = Processor.here()
    entry = None if gpus else here.entry(config.model.hidden_size, config.run.processor_table)
    table = f"so the table of processors has it ({entry.name})" if entry else ""
    if dtype:
        bf16 = min(gpus) >= 8 if gpus else entry.bf16 if entry else here.has_bf16
        value, why = "bf16" if bf16 else "fp32", table or f"{'' if bf16 else 'no '}bf16 instructions here"
        if saved:
            value, why = saved.precision, "as the checkpoint has it"
        config = config.changed(precision={"dtype": value})
        note(f'precision.dtype="auto" is {value}: {why}')
    if compiled:
        pays = bool(entry and entry.compile and (shutil.which("g++") or shutil.which("clang++")))
        pays = saved.config.get("run", {}).get("compile") is True if saved else pays
        config = config.changed(run={"compile": pays})
        why = table if pays else "no table says that it pays, or no C++ compiler is there"
        why = "as the checkpoint has it" if saved else why
        note(f'run.compile="auto" is {literal(pays)}: {why}')
    return config


def _capabilities() -> list[float]:
    """Of this host's GPUs, untouched: CUDA's environment is not set yet."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return [*map(float, found.stdout.split())]
    return []
