"""How starting and connecting ranks ends early."""

from megallama.config.errors import MegallamaError


class LaunchError(MegallamaError):
    """The processes of a run could not be brought together, or lack the device they were promised."""


class ContactLost(RuntimeError):
    """Another rank has gone or does not answer: usually the echo of a failure elsewhere."""


class Stopped(BaseException):
    """The run ends before training has begun, for a reason that any rank may have had, with an exit status.

    No Exception, so that nothing on the way takes it for a failure of its own.
    """

    def __init__(self, why: str, status: int) -> None:
        super().__init__(why)
        self.status = status
