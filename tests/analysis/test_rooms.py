"""The picture of the rooms: docs/rooms.svg is current, and says of a small package what is true of it."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from megallama.analysis.rooms import Room, arrows, draw, levels, read_rooms, rounded
from megallama.config.errors import MegallamaError

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"
ROOMS = {  # a diamond on a stem, and one that only the engine's entry does not lead to
    "pretrain": Room(40, {"left", "right", "base"}),
    "left": Room(149, {"base"}),
    "right": Room(150, {"base"}),
    "base": Room(1234, set()),
    "beside": Room(60, {"left", "base"}),
}


def test_the_picture_is_current() -> None:
    picture = (ROOT / "docs" / "rooms.svg").read_text(encoding="utf-8")
    assert picture == draw(read_rooms(ROOT / "megallama")), "run python tools/draw_rooms.py"


def test_rooms_are_read_from_import_statements(tmp_path: Path) -> None:
    files = {
        "own/__init__.py": "",
        "own/pretrain.py": "from own import left\nimport own.right.deep\nimport base.of.others\n",
        "own/left/__init__.py": '"""from own import right"""\n',
        "own/left/a.py": "from __future__ import annotations\n\n\ndef f():\n    from own.base.x import y\n",
        "own/right/deep.py": "from own.right import other\nfrom own.nowhere import z\n",
        "own/base/x.py": "y = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_rooms(tmp_path / "own") == {
        "pretrain": Room(3, {"left", "right"}), "left": Room(6, {"base"}), "right": Room(2, set()),
        "base": Room(1, set()),
    }  # fmt: skip


def test_levels_and_arrows() -> None:
    assert levels(ROOMS) == {"base": 0, "left": 1, "right": 1, "pretrain": 2, "beside": 2}
    assert arrows(ROOMS) == [
        ("beside", "left"), ("left", "base"), ("pretrain", "left"), ("pretrain", "right"), ("right", "base"),
    ]  # fmt: skip


def test_what_is_drawn() -> None:
    root = ElementTree.fromstring(draw(ROOMS))
    boxes = [r.attrib for r in root.iter(f"{SVG}rect") if "rx" in r.attrib]
    words = [t.text for t in root.iter(f"{SVG}text")]
    names, sizes = words[0:10:2], words[1:10:2]
    assert names == sorted(ROOMS) and sizes == ["1,200 lines", "100 lines", "100 lines", "under 50 lines", "200 lines"]
    assert words[10:12] == ["blue: the engine, the rooms that pretrain leads to, 1,600 lines",
                            "yellow: what imports the engine, 100 lines"]  # fmt: skip
    at = {name: (int(b["x"]), int(b["y"])) for name, b in zip(names, boxes, strict=True)}
    assert at["base"][1] > at["left"][1] == at["right"][1] > at["pretrain"][1] == at["beside"][1] > 0
    assert len(set(at.values())) == len(ROOMS) and min(x for x, _ in at.values()) == 24
    assert [b["fill"] for b in boxes].count("#f7ecd8") == 1 and boxes[names.index("beside")]["fill"] == "#f7ecd8"
    width, height = (float(root.attrib[k]) for k in ("width", "height"))
    assert max(x for x, _ in at.values()) + 132 + 24 == width and at["base"][1] + 46 < height
    lines = [line.attrib for line in root.iter(f"{SVG}line")]
    tops = {(str(x + 66), str(y - 2)): name for name, (x, y) in at.items()}
    bottoms = {(str(x + 66), str(y + 46)): name for name, (x, y) in at.items()}
    assert [(bottoms[a["x1"], a["y1"]], tops[a["x2"], a["y2"]]) for a in lines] == arrows(ROOMS)


@pytest.mark.parametrize("lines,words", [(49, "under 50 lines"), (50, "100 lines"), (12949, "12,900 lines")])
def test_rounding(lines: int, words: str) -> None:
    assert rounded(lines) == words


def test_rooms_that_import_one_another() -> None:
    with pytest.raises(MegallamaError, match=r"^rooms import one another: \w+ -> \w+ -> \w+; cut one of these"):
        levels({"a": Room(1, {"b"}), "b": Room(1, {"a"})})
