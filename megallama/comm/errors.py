"""How starting and connecting ranks ends early."""

from megallama.config.errors import MegallamaError


class LaunchError(MegallamaError):
    """The processes of a run could not be brought together, or lack the device they were promised."""


class Stopped(BaseException):
    """A request to stop before training has begun. No Exception, so that nothing on the way takes it for a failure."""
