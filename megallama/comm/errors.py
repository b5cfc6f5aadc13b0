"""How work of several ranks ends early."""

from megallama.config.errors import MegallamaError


class LaunchError(MegallamaError):
    """The processes of a run could not be brought together, or lack the device they were promised."""


class ContactLost(RuntimeError):
    """Another rank has gone or does not answer: usually the echo of a failure elsewhere."""


class MachineError(MegallamaError):
    """The operating system of some rank refused something: a full disk, say."""

    shared, status = True, 1


class InternalError(RuntimeError):
    """A fault of the program on some rank, whose log has the traceback: nothing the user can put right."""

    shared, status = True, 1
