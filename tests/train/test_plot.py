"""The loss curve: what is drawn, and why it sometimes is not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.axes
import pytest

from megallama.train.metrics import plot_loss, read_metrics, smooth


def test_smooth_is_a_centred_mean() -> None:
    assert smooth([1.0, 2.0, 9.0, 4.0, 5.0], 3) == [1.0, 4.0, 5.0, 6.0, 5.0]
    assert smooth([3.0] * 7, 5) == [3.0] * 7
    line = [float(i) for i in range(20)]
    assert smooth(line, 9) == line  # no lag and no bend at the ends
    assert smooth([], 3) == []


def metrics(path: Path, steps: int = 100, **last: Any) -> Path:
    records: list[dict[str, Any]] = []
    for i in range(1, steps + 1):
        tokens, loss = i * 4096, 8 * i**-0.2
        records.append({"kind": "train", "step": i, "loss": loss, "consumed_tokens": tokens, "skipped": False})
        if i % 25 == 0:
            records.append({"kind": "valid", "name": "valid", "step": i, "loss": loss + 0.1, "consumed_tokens": tokens})
            values = {} if i == 50 else {"acc": i / 1000, "bits_per_byte": None}
            records.append({"kind": "task", "name": "own", "step": i, "metrics": values, "consumed_tokens": tokens})
    skipped = {"kind": "train", "step": steps + 1, "loss": None, "consumed_tokens": 0, "skipped": True}
    path.write_text("\n".join(map(json.dumps, [*records, skipped])) + '\n{"kind": "tra')
    return path


def test_the_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, tuple[list[float], list[float]]] = {}
    plot = matplotlib.axes.Axes.plot

    def spy(axes: Any, x: list[float], y: list[float], **keys: Any) -> Any:
        drawn[keys.get("label", "raw")] = (list(x), list(y))
        return plot(axes, x, y, **keys)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", spy)
    png = tmp_path / "plots" / "loss.png"
    assert plot_loss(metrics(tmp_path / "m.jsonl"), png, title="debug", baseline=6.5) == (png, "")
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    x, y = drawn["raw"]
    assert len(x) == 100 and x[-1] == 409600 and y[0] == 8
    assert drawn["training"][0] == x
    assert drawn[f"validation (last {8 * 100**-0.2 + 0.1:.3f})"][0] == [25 * 4096, 50 * 4096, 75 * 4096, 100 * 4096]
    assert drawn["own (last 0.100)"] == ([25 * 4096, 75 * 4096, 100 * 4096], [0.025, 0.075, 0.1])
    assert "matplotlib.pyplot" not in sys.modules or sys.modules["matplotlib.pyplot"].get_fignums() == []


@pytest.mark.parametrize(("content", "count"), [("", 0), ('{"a": 1}\n\n[1]\n{"b": 2}\n{"c"', 2)])
def test_lines_that_are_no_records_are_left_out(content: str, count: int, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(content)
    assert len(list(read_metrics(tmp_path / "m.jsonl"))) == count


def test_reasons_for_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    png = tmp_path / "loss.png"
    path = tmp_path / "m.jsonl"
    assert plot_loss(path, png) == (None, f"{path} cannot be read: No such file or directory")
    path.write_text('{"kind": "train", "step": 1, "loss": 3.0, "consumed_tokens": 5}\n')
    assert plot_loss(path, png) == (None, f"{path} holds fewer than 2 training steps")
    metrics(path)
    (tmp_path / "file").write_text("")
    wrong = tmp_path / "file" / "loss.png"
    assert plot_loss(path, wrong) == (None, f"{wrong} cannot be written: File exists")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot_loss(path, png) == (None, "matplotlib is not installed; pip install matplotlib")
    assert not png.exists()
