"""How starting and connecting ranks ends early."""

from megallama.config.errors import MegallamaError


class LaunchError(MegallamaError):
    """The processes of a run could not be brought together, or lack the device they were promised."""


class ContactLost(RuntimeError):
    """Another rank has gone or does not answer: usually the echo of a failure elsewhere."""
