"""Train a LLaMA: the one entry point, alone, under torchrun, srun or mpirun.

    python -m megallama.pretrain CONFIG.toml [section.key=value ...]

Exit status: 0 all steps are done; 2 an error in what was asked for, or found before anything was
changed; 3 too many steps in a row were not finite; 4 training had begun and failed; 75 saved and stopped
early (a signal, or train.stop_after_*): the same command continues; 1 anything else.
"""

from __future__ import annotations

import hashlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megallama.config.errors import MegallamaError, exit_status
from megallama.config.load import load, to_toml
from megallama.train.log import Logger, finish_output, show_error

if TYPE_CHECKING:
    from megallama.comm.launch import Launch

BAD_REQUEST, NOT_FINITE, FAILED, CRASHED = 2, 3, 4, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these arguments (default: the command line's); the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or {"-h", "--help"} & set(arguments):
        return exit_status(lambda: print((__doc__ or "").strip())) or (0 if arguments else BAD_REQUEST)
    from megallama.comm.launch import Launch, detect_launch  # imports torch: after --help

    launch = Launch()
    try:
        launch = detect_launch()
        return _run(arguments, launch)
    except MegallamaError as error:
        if launch.rank == 0 or not error.shared:
            show_error(str(error))
        return error.status


def _run(arguments: Sequence[str], launch: Launch) -> int:
    from megallama.comm.launch import start
    from megallama.plan.plan import make_plan
    from megallama.train.trainer import Trainer

    file = Path(arguments[0]) if "=" not in arguments[0] else None
    try:
        config = load(file, arguments[1:] if file else arguments, ranks=launch.world_size)
    except MegallamaError as error:
        error.shared = True  # every rank reads the same file
        raise
    plan = make_plan(config, launch.world_size)
    same = hashlib.sha256(f"{to_toml(config)}{plan.schedule}".encode()).hexdigest()[:12]
    with start(launch, config.run, same) as world:
        log = Logger(world.rank, world.world_size, Path(config.run.folder))
        try:
            return Trainer(config, plan, world, log).run()
        except MegallamaError:
            raise
        except Exception as error:
            culprit = world.first_failure()
            if culprit is not None:
                log.warn(f"{culprit}; this rank stopped because of it ({type(error).__name__})")
                return CRASHED
            log.note(traceback.format_exc())
            raise
        finally:
            log.close()


if __name__ == "__main__":
    status = main()
    finish_output()
    sys.exit(status)
