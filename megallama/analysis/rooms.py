"""The rooms of the package as a picture, drawn from its import statements; the same on every machine.

A room is a folder of the package, or a module next to the folders.  It stands one level above the
highest room that it imports.  Of a -> b -> c the arrow a -> c is left out, since the others imply it.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from megallama.config.errors import MegallamaError

WIDTH, HEIGHT = 132, 46  # of a box [pixels]
GAP, ROW = 20, 104  # between the boxes of a level, and from level to level
MARGIN, CAPTION = 24, 60
COLOURS = {True: ("#dce9f5", "#4a7aa8"), False: ("#f7ecd8", "#b08840")}  # engine, others


@dataclass
class Room:
    """What stands in one room."""

    lines: int = 0
    imports: set[str] = field(default_factory=set)


def read_rooms(package: Path) -> dict[str, Room]:
    """The rooms of a package by name, with the other rooms that their import statements name."""
    rooms: dict[str, Room] = {}
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).parts[0].removesuffix(".py")
        if name != "__init__":
            text = path.read_text(encoding="utf-8")
            room = rooms.setdefault(name, Room())
            room.lines += len(text.splitlines())
            for node in ast.walk(ast.parse(text)):  # `a` of "import package.a.b" and of "from package import a"
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    within = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                    names = (within + alias.name for alias in node.names)
                    room.imports |= {name.split(".")[1] for name in names if name.startswith(f"{package.name}.")}
            room.imports.discard(name)
    for room in rooms.values():
        room.imports &= set(rooms)
    return rooms


def levels(rooms: Mapping[str, Room]) -> dict[str, int]:
    """The level of each room, 0 at the bottom. Raises: MegallamaError for a circle of imports."""
    found: dict[str, int] = {}
    below = {name: sorted(room.imports) for name, room in rooms.items()}
    try:
        for name in TopologicalSorter(below).static_order():
            found[name] = max((found[other] + 1 for other in rooms[name].imports), default=0)
    except CycleError as error:
        circle = " -> ".join(error.args[1])
        raise MegallamaError(f"rooms import one another: {circle}; cut one of these imports") from None
    return found


def reachable(rooms: Mapping[str, Room], start: str) -> set[str]:
    """The rooms that `start` leads to, itself included; they have `levels`."""
    return {start}.union(*(reachable(rooms, other) for other in rooms[start].imports))


def arrows(rooms: Mapping[str, Room]) -> list[tuple[str, str]]:
    """From which room to which an arrow is drawn."""
    out = []
    for name, room in rooms.items():
        beyond = set[str]().union(*(reachable(rooms, other) - {other} for other in room.imports))
        out += [(name, other) for other in room.imports - beyond]
    return sorted(out)


def draw(rooms: Mapping[str, Room], entry: str = "pretrain") -> str:
    """The picture as SVG; what `entry` leads to is the engine. Lines are rounded to hundreds."""
    level = levels(rooms)
    engine = reachable(rooms, entry)
    at = _places(rooms, engine, level)
    right, bottom = (max(p[axis] for p in at.values()) for axis in (0, 1))
    size = f'width="{right + WIDTH + MARGIN}" height="{bottom + HEIGHT + MARGIN + CAPTION}"'
    head = 'markerWidth="8" markerHeight="8" refX="8" refY="4" orient="auto"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13" text-anchor="middle">',
        f'<defs><marker id="head" {head}><path d="M0 0L8 4L0 8z" fill="#777777"/></marker></defs>',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for upper, lower in arrows(rooms):
        (x1, y1), (x2, y2) = at[upper], at[lower]
        ends = f'x1="{x1 + WIDTH // 2}" y1="{y1 + HEIGHT}" x2="{x2 + WIDTH // 2}" y2="{y2 - 2}"'
        out.append(f'<line {ends} stroke="#777777" marker-end="url(#head)"/>')
    for name, (x, y) in sorted(at.items()):
        fill, edge = COLOURS[name in engine]
        out.append(f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="5" fill="{fill}" stroke="{edge}"/>')
        out.append(f'<text x="{x + WIDTH // 2}" y="{y + 20}" font-weight="bold">{name}</text>')
        out.append(f'<text x="{x + WIDTH // 2}" y="{y + 37}" font-size="11">{rounded(rooms[name].lines)}</text>')
    inside, lines = (sum(rooms[name].lines for name in names) for names in (engine, rooms))
    caption = (
        f"blue: the engine, the rooms that {entry} leads to, {rounded(inside)}",
        f"yellow: what imports the engine, {rounded(lines - inside)}",
        "an arrow: imports; left out where other arrows lead there",
    )
    for number, words in enumerate(caption):
        y = bottom + HEIGHT + MARGIN + 18 * (number + 1)
        out.append(f'<text x="{MARGIN}" y="{y}" text-anchor="start">{words}</text>')
    return "\n".join([*out, "</svg>", ""])


def rounded(lines: int) -> str:
    """Lines in hundreds, so that a small edit leaves the picture as it is."""
    return f"{(lines + 50) // 100 * 100:,} lines" if lines >= 50 else "under 50 lines"


def _places(rooms: Mapping[str, Room], engine: set[str], level: dict[str, int]) -> dict[str, tuple[int, int]]:
    """The upper left corner of each box; in the order of what they import, the engine first."""
    at = dict[str, tuple[int, int]]()
    numbers = range(max(level.values()) + 1)
    rows = [sorted(name for name in rooms if level[name] == number) for number in numbers]
    widest = max(map(len, rows)) * (WIDTH + GAP) - GAP
    for number, row in enumerate(rows):
        below = {name: [at[other][0] for other in rooms[name].imports] or [0] for name in row}
        row.sort(key=lambda name: (name not in engine, sum(below[name]) / len(below[name]), name))
        left = MARGIN + (widest - len(row) * (WIDTH + GAP) + GAP) // 2
        for column, name in enumerate(row):
            at[name] = left + column * (WIDTH + GAP), MARGIN + (len(rows) - 1 - number) * ROW
    return at
