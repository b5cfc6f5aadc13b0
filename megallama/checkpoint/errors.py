"""What goes wrong with checkpoints."""

from __future__ import annotations

from megallama.config.errors import MegallamaError


class CheckpointError(MegallamaError):
    """A checkpoint that cannot be written or used; the message names the folder and what to do."""


class DamagedError(CheckpointError):
    """Bytes of a checkpoint are not what was saved: the message names the file and the block."""

    decisive = True  # damage that one rank sees is what a load ends with


class NotFiniteError(CheckpointError):
    """What was to be saved holds inf or nan, and was not: the message names the tensor and the rank."""

    status = 3
