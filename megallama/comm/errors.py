"""Errors of starting and connecting ranks."""

from megallama.config.errors import MegallamaError


class LaunchError(MegallamaError):
    """The processes of a run could not be brought together, or lack the device they were promised."""
