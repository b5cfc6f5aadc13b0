"""benchmarks/reshard.py tells what it waits for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch):
    """The module as the benchmarks import it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("launch", "reshard", "report"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import launch

    return launch


def pressure(folder: Path, **microseconds: int) -> Path:
    for name, total in microseconds.items():
        lines = f"some avg10=0.00 avg60=1.14 avg300=0.84 total={total}\nfull avg10=0.00 avg60=0.1 avg300=0.2 total=7\n"
        (folder / name).write_text(lines)
    return folder


def test_the_kernel_says_what_was_waited_for(launch, tmp_path: Path) -> None:
    before = launch.stalled(pressure(tmp_path, io=1_000_000, memory=5_000_000))
    after = launch.stalled(pressure(tmp_path, io=13_340_000, memory=7_900_000))
    assert before == {"io": 1.0, "memory": 5.0}
    assert launch.waits("HF -> meta mp2", before, after) == ["HF -> meta mp2: waited 12.3 s for the disk"]
    later = launch.stalled(pressure(tmp_path, io=13_340_000, memory=20_000_000))
    assert launch.waits("raw", after, later) == ["raw: waited 12.1 s for memory"]
    assert launch.stalled(tmp_path / "not there") == {} and launch.waits("raw", {}, after) == []


def test_a_row_tells_of_the_disk_and_of_other_programs(launch, monkeypatch, capsys) -> None:
    import reshard

    looks = iter([{"io": 1.0, "memory": 0.0}, {"io": 9.0, "memory": 0.1}])
    monkeypatch.setattr(reshard, "stalled", lambda: next(looks))
    clock = iter([0.0, 20.0])
    monkeypatch.setattr(reshard.time, "monotonic", lambda: next(clock, 21.0))
    monkeypatch.setattr(reshard, "wait_for_calm", lambda limit: None)
    monkeypatch.setattr(reshard, "_run", lambda row, command: command)
    assert reshard.run("HF -> meta mp2", ["x"]) == ["x"]
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "HF -> meta mp2: waited 20.0 s for other programs to be calm",
        "HF -> meta mp2: waited 8.0 s for the disk",
    ]
