"""Tensors of files as they are compared and read in parts: to the last element of the last row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megallama.checkpoint import reader
from megallama.checkpoint.disk import CheckpointError, DamagedError
from megallama.checkpoint.reader import equal_rows, open_files, refuse, spans
from megallama.plan.box import Box


@pytest.fixture(autouse=True)
def short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of five fp32 elements at a time."""
    monkeypatch.setattr(reader, "SPAN_BYTES", 40)


def test_rows_in_ranges() -> None:
    assert [*spans(5, 20)] == [(0, 2), (2, 4), (4, 5)] and [*spans(4, 20)] == [(0, 2), (2, 4)]
    assert [*spans(2, 41)] == [(0, 1), (1, 2)] and [*spans(0, 20)] == [] and [*spans(80, 0)] == [(0, 40), (40, 80)]


def test_rows_are_equal_to_the_last_bit(tmp_path: Path) -> None:
    x = torch.arange(35.0).view(7, 5)
    others = {"same": x.clone(), "half": x.bfloat16(), "flat": x.view(-1).clone(), "less": x[:6].clone()}
    for row, column in ((0, 4), (3, 2), (6, 4)):
        others[f"{row},{column}"] = x.clone()
        others[f"{row},{column}"].view(torch.int32)[row, column] ^= 1
    save_file({"x": x, **others}, tmp_path / "a")
    with open_files(tmp_path, ["a"]) as files:
        equal = {name for name in others if equal_rows(files, "x", files, name)}
        assert equal == {"same"}
        first = {name for name in others if equal_rows(files, "x", files, name, 6)}
        assert first == {"same", "6,4"}, "only the first rows count"
        assert not equal_rows(files, "x", files, "3,2", 4) and equal_rows(files, "x", files, "3,2", 3)
        assert equal_rows(files, "flat", files, "flat")


def test_boxes_are_read_in_any_type(tmp_path: Path) -> None:
    x = torch.arange(35.0).view(7, 5)
    save_file({"x": x}, tmp_path / "a")
    with open_files(tmp_path, ["a"]) as files:
        for box in (Box("x", (1, 0), (5, 5)), Box("x", (2, 1), (5, 3)), Box("x", (6, 4), (7, 5))):
            part = x[box.start[0] : box.start[0] + box.shape[0], box.start[1] : box.start[1] + box.shape[1]]
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                out = torch.full((part.numel(),), -1.0, dtype=dtype)
                files.read_into(box, out)
                assert torch.equal(out, part.reshape(-1).to(dtype)), (box, dtype)
        rows = torch.empty(2, 5)
        files.read_rows("x", 5, rows)
        assert torch.equal(rows, x[5:])


def test_a_file_ends_where_it_ends(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    file = reader.BlockFile(tmp_path, "f")
    assert file.read(0, 10) == b"0123456789" and file.read(10, 0) == b"" and file.read(9, 1) == b"9"
    for start, count in ((9, 2), (-1, 2), (11, 0)):
        with pytest.raises(DamagedError, match=f"ends at byte 10, before byte {start + count}"):
            file.read(start, count)
    (tmp_path / "f").write_bytes(b"0123")  # meanwhile
    with pytest.raises(DamagedError, match="ends at byte 4, before byte 7"):
        file.read(2, 5)
    file.close()


@pytest.mark.parametrize(("count", "more"), [(20, ""), (21, "\n  ... and 1 more"), (23, "\n  ... and 3 more")])
def test_of_many_problems_twenty_are_shown(count: int, more: str) -> None:
    refuse(Path("x"), [])
    with pytest.raises(CheckpointError) as caught:
        refuse(Path("x"), [f"p{i}" for i in range(count)])
    shown = "".join(f"\n  p{i}" for i in range(20))
    assert str(caught.value) == f"the tensors in x are not those of the model:{shown}{more}"
