"""`megallama preflight` under srun, torchrun or mpirun: `megallama.recovery.preflight` says what it measures."""

from collections.abc import Sequence

from megallama.commands.parser import Parser


def run(argv: Sequence[str]) -> int:
    """Print what is slow; 0, or 1 where something is. Raises: MegallamaError."""
    from megallama.recovery import preflight

    parser = Parser("preflight", preflight.__doc__)
    for name, settings in preflight.OPTIONS.items():
        parser.add_argument(name, **settings)
    return preflight.preflight(print, **vars(parser.read(argv)))
