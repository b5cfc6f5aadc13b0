"""A user's own schedule: one line per pipeline rank, one cell per action, in the order of execution.

    F0.0,F0.1,B0.0,B0.1
    F1.0,B1.0,F1.1,B1.1

``F2.0`` is the forward of stage 2 for micro-batch 0; ``B2.0`` its backward, or ``I2.0`` and later ``W2.0`` the two
halves of it.  Who computes a stage owns it.  Empty cells, empty lines and lines that begin with # say nothing.
"""

from pathlib import Path
from typing import NamedTuple

from megallama.config.errors import counted
from megallama.plan.schedule import Action, B, F, I, Schedule, ScheduleError, W, parse_action, stuck_at


class Cell(NamedTuple):
    """Where an action stands."""

    rank: int
    place: str  # file, line and cell


def read_csv(path: Path, num_ranks: int, num_stages: int, num_microbatches: int) -> Schedule:
    """The schedule in a file, for a job of this size. Raises: ScheduleError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ScheduleError(f"cannot read parallel.schedule_file={path}: {reason}; give a CSV file") from None
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip(", \t") and line[0] != "#"]
    if len(lines) != num_ranks:
        have = f"{counted(len(lines), 'line')} of actions, but parallel.pp={num_ranks}"
        raise ScheduleError(f"{path} has {have}; write one line per pipeline rank")
    cells: dict[Action, Cell] = {}
    for rank, (number, line) in enumerate(lines):
        for column, word in enumerate(line.split(","), 1):
            if word.strip():
                place = f"{path}, line {number}, cell {column}"
                a = parse_action(word.strip(), f"{place}: ")
                if not a.kind.is_compute:
                    instead = "leave it out, the program inserts what F, B and I need"
                    raise ScheduleError(f"{place}: {word.strip()!r} is a transfer; {instead}")
                if a in cells:
                    raise ScheduleError(f"{place}: {a} stands already at {cells[a].place}; write every action once")
                cells[a] = Cell(rank, place)
    owners = _owners(path, cells, num_stages, num_microbatches)
    for a in [a for a in cells if a.kind is F]:  # has a B, or an I and a W, and not both
        b, i, w = (a._replace(kind=kind) for kind in (B, I, W))
        if b in cells and (i in cells or w in cells):
            half = i if i in cells else w
            whole = f"{cells[b].place} has the whole backward; write {b}, or {i} and {w}"
            raise ScheduleError(f"{cells[half].place}: {half}, but {whole}")
        if b not in cells and (lack := [str(x) for x in (i, w) if x not in cells]):
            rest = f"write {b}, or {i} and {w}," if len(lack) == 2 else f"write {lack[0]}"
            raise ScheduleError(f"{path} lacks {' and '.join(lack)}; {rest} behind {a} of {cells[a].place}")
    steps = tuple(tuple(a for a, cell in cells.items() if cell.rank == rank) for rank in range(num_ranks))
    schedule = Schedule(path.name, num_ranks, num_stages, num_microbatches, steps, owners)
    _check_order(schedule, cells)
    return schedule


def _owners(path: Path, cells: dict[Action, Cell], num_stages: int, num_microbatches: int) -> tuple[int, ...]:
    """The rank of each stage, once every stage has every forward on one rank."""
    owners: dict[int, Cell] = {}
    product, batch = "parallel.pp x parallel.chunks", f"the batch gives each rank {num_microbatches}"
    other_stages = f"0 to {num_stages - 1}, or another parallel.chunks"
    other_batches = f"0 to {num_microbatches - 1}, or change batch.global_batch_size"
    all_stages, all_batches = counted(num_stages, "stage"), counted(num_microbatches, "micro-batch")
    for a, cell in cells.items():
        first = owners.setdefault(a.stage, cell)
        if first.rank != cell.rank:
            where = f"which another rank computes at {first.place}; write all actions of a stage on one line"
            raise ScheduleError(f"{cell.place}: {a} is of stage {a.stage}, {where}")
        if a.stage >= num_stages:
            why = f"{product} = {all_stages}, write {other_stages}"
            raise ScheduleError(f"{cell.place}: there is no stage {a.stage}; {why}")
        if a.microbatch >= num_microbatches:
            why = f"{batch} of them, write {other_batches}"
            raise ScheduleError(f"{cell.place}: there is no micro-batch {a.microbatch}; {why}")
    stages, microbatches = max(owners, default=-1) + 1, max((a.microbatch for a in cells), default=-1) + 1
    if stages < num_stages:
        have = f"{counted(stages, 'stage')}, but {product} = {num_stages}"
        raise ScheduleError(f"{path} has {have}; write stages {other_stages}")
    if microbatches < num_microbatches:
        have = counted(microbatches, "micro-batch")
        raise ScheduleError(f"{path} has {have}, but {batch}; write micro-batches {other_batches}")
    for a in (Action(F, s, m) for s in range(num_stages) for m in range(num_microbatches)):
        if a not in cells:
            line = "the line of its stage" if a.stage in owners else "one of the lines"
            need = f"each of {all_stages} needs a forward of each of {all_batches}"
            raise ScheduleError(f"{path} lacks {a}; {need}, write {a} on {line}")
    return tuple(owners[s].rank for s in range(num_stages))


def _check_order(schedule: Schedule, cells: dict[Action, Cell]) -> None:
    """Every action comes after what it needs, on its own line and across the lines."""
    stuck, made = stuck_at(schedule, schedule.needs, lambda a: filter(None, [schedule.produces(a)]))
    why = []
    for a in stuck.values():
        need = next(v for v in schedule.needs(a) if v not in made)
        maker = need if need in cells else need._replace(kind=I)
        why.append(f"{cells[a].place}: {a} needs {maker}, which")
        if cells[maker].rank == cells[a].rank:
            raise ScheduleError(f"{why[-1]} stands behind it in {cells[maker].place}; write {maker} before {a}")
        why[-1] += f" stands at {cells[maker].place}"
    if why:
        waits = "the lines wait for one another forever; move one of these behind what it needs:"
        raise ScheduleError("\n  ".join([f"in {schedule.name} {waits}", *why]))
