"""tools/draw_schedule.py: chart, pictures, traces, and what it says to mistakes."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from megallama.cli import command
from megallama.commands import draw as draw_command
from megallama.commands.draw import simulated
from megallama.plan.builders import zb_v
from megallama.plan.timeline import Span, StageCost, chrome_trace, simulate

ZB_V = ["--schedule", "zb-v", "--pp", "2", "--microbatches", "4"]


def draw(*arguments: str) -> int:
    return command("draw")(arguments)


def test_the_chart(capsys: pytest.CaptureFixture[str]) -> None:
    assert draw(*ZB_V) == 0
    title, rank0, rank1, legend, empty, head, *rows = capsys.readouterr().out.split("\n")
    assert title == "zb-v: 2 ranks, 4 stages, 4 micro-batches; 25 ms, idle 4.00%"
    assert rank0.startswith("rank  0 |0011..00") and rank1.startswith("rank  1 |..00") and len(rank0) == len(rank1)
    assert legend.startswith("digits: forward, capitals: backward") and empty == ""
    assert head.split() == ["rank", "stages", "busy", "ms", "idle", "in", "flight", "received"]
    assert [row.split() for row in rows[:2]] == [
        ["0", "0,3", "24", "4.0%", "4", "2"], ["1", "1,2", "24", "4.0%", "4", "2"],
    ]  # fmt: skip
    assert rows[2].startswith("longest rank from its first action to its last: 25 ms, 4.17% above its work")


def test_costs_and_hops(capsys: pytest.CaptureFixture[str]) -> None:
    assert draw("--schedule", "1f1b", "--pp", "2", "--microbatches", "1", "--costs", "2,3,4", "--hop", "0.5") == 0
    assert "; 19 ms, idle" in capsys.readouterr().out  # 2 x (2 + 3 + 4) and two transfers


def test_of_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["ranks=4", "parallel.pp=4", "parallel.chunks=2", "parallel.schedule=v-half"]
    assert draw(*settings, "batch.global_batch_size=64", "model.num_layers=8", "model.vocab_size=1000") == 0
    out = capsys.readouterr().out
    assert out.startswith("v-half: 4 ranks, 8 stages, 16 micro-batches; ")
    busy = [float(line.split()[2]) for line in out.split("\n")[8:12]]
    assert busy[0] > busy[1] == busy[2] == busy[3]  # the head is on rank 0


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    svg, png = tmp_path / "a.svg", tmp_path / "a.png"
    assert draw(*ZB_V, "--svg", str(svg), "--png", str(png)) == 0
    root = ElementTree.parse(svg).getroot()
    rects = [r.attrib for r in root.iter("{http://www.w3.org/2000/svg}rect")]
    work = [r for r in rects if "stroke" in r]
    assert len(work) == 2 * 6 * 4 and {r["fill"] for r in work} == {
        c for pair in draw_command.COLOURS.values() for c in pair
    }
    report = simulate(zb_v(2, 4))
    width = float(next(r for r in rects if r["fill"] == "#eeeeee")["width"])
    for r in work:
        assert float(r["width"]) == pytest.approx(width / report.makespan, abs=0.01)
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and png.stat().st_size > 10_000


def test_every_picture_has_a_legend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    told: list[str] = []
    monkeypatch.setattr(figure, "legend", lambda self, handles, **_: told.extend(h.get_label() for h in handles))
    svg = tmp_path / "a.svg"
    for words, kinds in (
        (ZB_V, ["forward", "gradient of the input", "gradient of the weights"]),
        (["--schedule", "1f1b", "--pp", "2", "--microbatches", "4"], ["forward", "backward"]),
    ):
        told.clear()
        assert draw(*words, "--svg", str(svg), "--png", str(tmp_path / "a.png")) == 0
        dark = " (dark: upper stages)" if words is ZB_V else ""
        assert told == [*(kind + dark for kind in kinds), "idle", "numbers: micro-batches"]
        texts = [t.text for t in ElementTree.parse(svg).getroot().iter("{http://www.w3.org/2000/svg}text")]
        assert texts[-len(told) :] == told


def test_png_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw(*ZB_V, "--png", str(tmp_path / "a.png")) == 2
    want = "error: --png needs matplotlib; pip install matplotlib, or use --svg, which needs nothing\n"
    assert capsys.readouterr().err == want


def test_a_trace_and_a_run_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A `run` that was in truth a simulation with known costs: they are found again, and so is its time."""
    costs = [StageCost(1 + s, 2, 0.5 * (1 + s)) for s in range(4)]
    schedule = zb_v(2, 4)
    report = simulate(schedule, costs, 0.25)
    spans = [s._replace(start=s.start - 0.0001, arrived=s.start) for s in simulated(report, 1e-3)]  # waits of 0.1 ms
    run, both = tmp_path / "run.json", tmp_path / "both.json"
    run.write_text(chrome_trace({"step 3, zb-v": [*spans, Span(0, "waits for sends", 1.0, 1.0, 1.0)]}))
    assert draw(*ZB_V, "--like", str(run), "--hop", "0.25", "--trace", str(both)) == 0
    assert f"; {report.makespan:.4g} ms, idle {report.bubble:.2%}" in capsys.readouterr().out
    events = json.loads(both.read_text())["traceEvents"]
    titles = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert titles == {0: "simulated zb-v", 1: "step 3, zb-v"}
    for rank in (0, 1):
        own, theirs = ([e["name"] for e in events if (e["ph"], e["pid"], e.get("tid")) == ("X", pid, rank)
                         and e["cat"] in "FBIW"] for pid in (0, 1))  # fmt: skip
        assert own == theirs == [str(a) for a in schedule.steps[rank]]
    assert draw("--schedule", "1f1b", "--pp", "2", "--microbatches", "4", "--like", str(run)) == 2
    assert capsys.readouterr().err == f"error: --like {run} is the trace of another number of stages than 2\n"


@pytest.mark.parametrize(
    "text,why",
    [
        ('{"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 1, "tid": 1, "ts": 1, "dur": 1}]}',
         "1"),
        ('{"traceEvents": [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}}]}',
         "it has no actions of a pipeline"),
        ('{"traceEvents": ["x"]}', "string indices must be integers, not 'str'"),
        ('{"traceEvents": [{"ph": "X"}]}', "'name'"),
        ("[]", "list indices must be integers or slices, not str"),
    ],
)  # fmt: skip
def test_the_traces_of_other_programs(text: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file := tmp_path / "trace.json").write_text(text)
    assert draw(*ZB_V, "--like", str(file)) == 2
    said = f"--like {file} is no trace of a run: {why}; log.trace_steps=[2,3] writes them"
    assert capsys.readouterr().err == f"error: {said}\n"


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--schedule", "zb-x", "--pp", "2", "--microbatches", "4"],
         "--schedule zb-x is unknown; write gpipe, 1f1b, zb-h1, zb-h2, zb-v, v-half, dualpipe-v or a file that ends "
         "in .csv"),
        (["--schedule", "zb-v"],
         "--schedule needs sizes; write for example --schedule zb-v --pp 4 --microbatches 8"),
        ([], "a drawing without --schedule needs one number of ranks; write for example ranks=8\nusage: megallama "
         "draw [CONFIG.toml] ranks=N [section.key=value ...] [OPTIONS]"),
        ([*ZB_V, "--costs", "1,2"], "--costs 1,2 are not three times above 0; write for example --costs 1,1,0.7"),
        ([*ZB_V, "--like", "none.json"],
         "--like none.json is no trace of a run: [Errno 2] No such file or directory: 'none.json'; "
         "log.trace_steps=[2,3] writes them"),
        (["--schedule", "none.csv", "--pp", "2", "--microbatches", "4"],
         "cannot read parallel.schedule_file=none.csv: No such file or directory; give a CSV file"),
        (["--schedule", "dualpipe-v", "--pp", "4", "--microbatches", "4"],
         "dualpipe-v needs at least 2 x pp=8 micro-batches, not 4; use 8 micro-batches, or zb-v"),
        (["--schedule", "zb-v", "--pp", "4", "--microbatches", "4", "--chunks", "3"],
         "zb-v has two chunks per rank, not chunks=3; use chunks=2 or 1f1b"),
    ],
)  # fmt: skip
def test_messages(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw(*arguments) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
