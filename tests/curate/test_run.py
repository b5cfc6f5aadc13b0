"""Carrying out a recipe: the same bytes whoever does what, whatever happens; and nothing is lost without a count."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megallama.config.errors import DataError
from megallama.curate import run as run_module
from megallama.curate.hashing import normalise
from megallama.curate.run import Job, Plan, curate, make_plan
from tests.curate.recipes import ROOT, read_rows, recipe, write_rows

STAGES: list[dict[str, Any]] = [
    {"kind": "filter", "min_chars": 5},
    {"kind": "paragraphs", "min_chars": 20},
    {"kind": "filter", "drop": ("casino",)},
    {"kind": "files"},
]


def make(folder: Path, files: int = 3, texts: int = 12) -> None:
    """Files of texts whose paragraphs repeat within a text, within a file and across files."""
    draw = random.Random(1)
    for number in range(files):
        rows = []
        for _ in range(texts):
            lines = [f"Paragraph {chr(97 + draw.randrange(26)) * draw.randrange(1, 9)} said." for _ in range(9)]
            rows.append("\n".join(lines) + "\ncasino" * (draw.random() < 0.1))
        write_rows(folder / f"{number}.jsonl", ["x", *rows])


def expected(folder: Path) -> list[tuple[str, str]]:
    """What STAGES leave, said in another way: one loop over everything, with a set."""
    seen, texts, out = set[bytes](), set[str](), []
    for file in sorted(folder.glob("*.jsonl")):
        for row in map(json.loads, file.read_text().splitlines()):
            if len(row["text"]) < 5:
                continue
            kept = []
            for line in row["text"].split("\n"):
                if (key := normalise(line).strip()) not in seen:
                    seen.add(key)
                    kept.append(line)
            text = "\n".join(kept)
            if len(text) >= 20 and "casino" not in text and text not in texts:
                texts.add(text)
                out.append((row["id"], text))
    return out


def bytes_of(output: Path) -> dict[str, bytes]:
    """Every file of a finished run, by its name."""
    return {str(p.relative_to(output)): p.read_bytes() for p in sorted(output.rglob("*")) if p.is_file()}


def test_what_comes_first_stays(tmp_path: Path) -> None:
    make(tmp_path / "in")
    assert curate(recipe(tmp_path / "in", STAGES), tmp_path / "out")
    rows = read_rows(tmp_path / "out")
    assert [(row["id"], row["text"]) for row in rows] == expected(tmp_path / "in") and len(rows) > 9
    assert all(re.fullmatch(r"\d{5}\.jsonl", file.name) for file in (tmp_path / "out" / "web").iterdir())
    assert {row["source"] for row in rows} == {"web"} and len(list((tmp_path / "out" / "web").iterdir())) > 4


def test_empty_lines_stay_where_they_are(tmp_path: Path) -> None:
    texts = ["One paragraph here.\n\nAnother of it.\n\n\nThe last.", "Something new.\n\nAnd more of that."]
    write_rows(tmp_path / "in" / "a.jsonl", texts)
    curate(recipe(tmp_path / "in", [{"kind": "paragraphs", "min_chars": 9}]), tmp_path / "out")
    assert [row["text"] for row in read_rows(tmp_path / "out")] == texts


def test_the_bytes_do_not_depend_on_the_processes(tmp_path: Path) -> None:
    make(tmp_path / "in")
    made = recipe(tmp_path / "in", STAGES)
    assert curate(made, tmp_path / "one", 1) and curate(made, tmp_path / "two", 2)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    assert not (tmp_path / "one" / "work").exists()


def test_few_keys_at_a_time_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "in")
    made = recipe(tmp_path / "in", STAGES)
    curate(made, tmp_path / "one")
    monkeypatch.setattr("megallama.curate.run.MAX_KEYS", 40)
    curate(made, tmp_path / "many")
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "many")


@pytest.mark.parametrize("after", [0, 1, 5, 9, 11, 14])
def test_a_run_that_broke_off_goes_on(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `after` jobs, in the middle of the next one's writing."""
    make(tmp_path / "in", 2)
    made, left, did = recipe(tmp_path / "in", STAGES), [after], list[Job]()
    curate(made, tmp_path / "whole")
    line, take = Plan.take.__globals__["Document"].line, Plan.take

    def counted(self: Plan, job: Job, beat: Any) -> dict[str, Any]:
        did.append(job)
        left[0] -= 1
        return take(self, job, beat)

    def breaks(self: Any) -> bytes:
        if left[0] < 0:
            raise KeyboardInterrupt
        return line(self)

    with monkeypatch.context() as patch:
        patch.setattr(Plan, "take", counted)
        patch.setattr("megallama.curate.run.Document.line", breaks)
        patch.setattr("megallama.curate.run.os.getpid", lambda: 1)  # else the next start writes over what is left
        with pytest.raises(KeyboardInterrupt):
            curate(made, tmp_path / "out")
    begun, did[:] = did[:-1], []
    monkeypatch.setattr(Plan, "take", lambda self, job, beat: did.append(job) or take(self, job, beat))
    assert curate(made, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    assert not set(begun) & set(did) and len(begun) == after  # what was done is not done again


def test_processes_share_a_run_and_one_is_killed(tmp_path: Path) -> None:
    """Two commands as in an array; kill -9 takes one of them in the middle of its work."""
    make(tmp_path / "in", 12, 100)
    toml = tmp_path / "r.toml"
    stages = "\n".join(f"[[sources.stages]]\nkind = {json.dumps(stage['kind'])}" for stage in STAGES)
    toml.write_text(f'unit_mb = 0.02\n[[sources]]\nname = "web"\ninputs = ["{tmp_path / "in"}"]\n{stages}\n')

    def start(output: str) -> subprocess.Popen[str]:
        words = ["curate", str(toml), "--output", str(tmp_path / output), "--quiet"]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "megallama", *words]
        return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    first, second = start("out"), start("out")
    work = tmp_path / "out" / "work"
    until = time.monotonic() + 60
    while len([*work.glob("*.json")]) < 4 and time.monotonic() < until and first.poll() is None:
        time.sleep(0.002)
    first.send_signal(signal.SIGKILL)
    alone = start("alone")
    assert first.wait() in (0, -signal.SIGKILL)
    outs = [process.communicate(timeout=60) for process in (second, alone)]
    assert [process.returncode for process in (second, alone)] == [0, 0], outs
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")
    again = start("out").communicate(timeout=60)[0]
    assert again == f"{tmp_path / 'out'}/report.html: finished before\n"


def test_a_folder_belongs_to_one_recipe_and_its_files(tmp_path: Path) -> None:
    make(tmp_path / "in", 1)
    made = recipe(tmp_path / "in", STAGES)
    assert curate(made, tmp_path / "out") and not curate(made, tmp_path / "out")
    with pytest.raises(DataError, match="another recipe or of other files"):
        curate(recipe(tmp_path / "in", STAGES[:1]), tmp_path / "out")
    write_rows(tmp_path / "in" / "new.jsonl", ["more text"])
    with pytest.raises(DataError, match="another recipe or of other files"):
        curate(made, tmp_path / "out")
    with pytest.raises(DataError, match="holds files of something else"):
        curate(made, tmp_path / "in")


def test_another_version_of_the_program_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "in", 1)
    made = recipe(tmp_path / "in", STAGES)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_end", lambda plan, tree: None)  # as if it had been killed just before
        curate(made, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "PACKAGES", ("another",))
        with pytest.raises(DataError, match="was begun with another version of megallama, of Python or of a package"):
            curate(made, tmp_path / "out")
    assert curate(made, tmp_path / "out")
    monkeypatch.setattr(run_module, "PACKAGES", ("another",))
    assert not curate(made, tmp_path / "out")  # what is finished stays so


def test_who_comes_while_another_one_ends_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process sees all done when half of what is in between has been removed."""
    make(tmp_path / "in", 1)
    made, output, plans = recipe(tmp_path / "in", STAGES), tmp_path / "out", list[Plan]()
    curate(made, tmp_path / "whole")
    remove, end = run_module.shutil.rmtree, run_module._end

    def half(folder: Path, ignore_errors: bool) -> None:
        for file in Path(folder).glob("*.json"):
            file.unlink()
        with pytest.raises(FileNotFoundError):
            end(plans[0], {"bad": {}, "stages": {}, "tokens": {}, "histograms": {}, "samples": {}})
        remove(folder)

    monkeypatch.setattr(run_module, "_end", lambda plan, tree: plans.append(plan) or end(plan, tree))
    monkeypatch.setattr(run_module.shutil, "rmtree", half)
    assert curate(made, output)
    assert bytes_of(output) == bytes_of(tmp_path / "whole")
    monkeypatch.undo()
    (output / "work.done").mkdir()
    assert not curate(made, output) and not (output / "work.done").exists()


def test_two_may_begin_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "in", 1)
    (tmp_path / "out").mkdir()
    exists = Path.exists

    def another_one_begins(path: Path) -> bool:
        found = exists(path)
        if path.name == "work" and not found:
            path.mkdir()
        return found

    monkeypatch.setattr(Path, "exists", another_one_begins)
    assert curate(recipe(tmp_path / "in", STAGES), tmp_path / "out")


def test_no_room_to_sort_posts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    rows = "".join(f'<row Id="{i}" PostTypeId="1" Body="{"words " * 500}"/>' for i in range(9))
    (tmp_path / "in" / "Posts.xml").write_text(f"<posts>{rows}</posts>")
    connect = sqlite3.connect

    def small(name: str) -> sqlite3.Connection:
        store = connect(name)
        store.execute("PRAGMA max_page_count = 3")
        return store

    monkeypatch.setattr(sqlite3, "connect", small)
    with pytest.raises(DataError, match="database or disk is full; make room in .*SQLITE_TMPDIR"):
        curate(recipe(tmp_path / "in", []), tmp_path / "out")


def test_a_full_disk_is_said_and_the_same_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "in", 1)
    made, line = recipe(tmp_path / "in", STAGES), run_module.Document.line

    def full(document: Any) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_module.Document, "line", full)
    with pytest.raises(DataError, match="No space left on device; make room in .*/out .*; then start again"):
        curate(made, tmp_path / "out")
    monkeypatch.setattr(run_module.Document, "line", line)
    assert curate(made, tmp_path / "out") and len(read_rows(tmp_path / "out")) > 3


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    odd = os.fsdecode(os.fsencode(tmp_path / "in") + b"/n\xff.txt")
    Path(odd).write_text("A text that is long enough to stay where it is. " * 9)
    said = "Rows that are long enough to stay where they are. " * 9
    rows = [{"text": f"{i} {said}", "id": "i\ud800"} for i in "ab"]
    (tmp_path / "in" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = recipe(tmp_path / "in", [{"kind": "paragraphs"}, {"kind": "near_duplicates"}])
    assert curate(made, tmp_path / "out")
    lines = b"".join(f.read_bytes() for f in sorted((tmp_path / "out").glob("*/*.jsonl"))).splitlines()
    assert {json.loads(line)["id"] for line in lines} <= {odd, "i\ud800"} and len(lines) == 2
    assert b"\\udcff" in (tmp_path / "out" / "report.json").read_bytes()
    assert (tmp_path / "out" / "removed.jsonl").read_text() and (tmp_path / "out" / "report.html").read_text()


def test_sources_share_only_the_common_stages(tmp_path: Path) -> None:
    same = "The same words stand here, in both of the sources."
    write_rows(tmp_path / "a" / "a.jsonl", [same, "Alone in a, and long enough."])
    write_rows(tmp_path / "b" / "b.jsonl", ["Alone in b, and long enough.", same, same])
    both = [{"name": name, "inputs": (str(tmp_path / name),), "keys": ("id",)} for name in "ab"]
    own = [both[0], both[1] | {"stages": ({"kind": "files"},)}]

    def left(name: str, **more: Any) -> list[list[str]]:
        made = recipe(tmp_path / "a", []).model_validate({"sources": tuple(own)} | more)
        curate(made, tmp_path / name)
        return [[row["id"] for row in read_rows(tmp_path / name, source)] for source in "ab"]

    assert left("own") == [["a-0", "a-1"], ["b-0", "b-1"]]
    own[0] = own[0] | {"stages": ({"kind": "files"},)}
    assert left("both") == [["a-0", "a-1"], ["b-0", "b-1"]]
    own[0] = both[0]
    assert left("common", stages=({"kind": "files"},)) == [["a-0", "a-1"], ["b-0"]]


def test_every_document_is_accounted_for(tmp_path: Path) -> None:
    make(tmp_path / "in")
    with (tmp_path / "in" / "9.jsonl").open("wb") as file:
        file.write(b'{"text": "good enough, and long too"}\nnot json\n{"text": ""}\n{"txt": "x"}\n{"text": "\xff"}\n')
    (tmp_path / "in" / "picture.png").write_bytes(b"x")
    curate(recipe(tmp_path / "in", STAGES, run_tokens=1e6), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    stages = sorted(report["stages"].items())
    assert [name for name, _ in stages] == ["web -- raw", *(f"web {i:02d} {s['kind']}" for i, s in enumerate(STAGES))]
    assert stages[0][1]["out"]["documents"] == 3 * 13 + 1
    for (_, before), (name, row) in zip(stages, stages[1:], strict=False):
        assert row["in"] == before["out"], name
        for what in ("documents", "bytes"):
            gone = sum(count[what] for count in row.get("reasons", {}).values())
            changed = row.get("changed", {}).get("bytes", 0) if what == "bytes" else 0
            assert row["in"][what] == row["out"][what] + gone + changed, (name, what)
    rows = read_rows(tmp_path / "out")
    assert stages[-1][1]["out"] == {"documents": len(rows), "bytes": sum(len(row["text"].encode()) for row in rows)}
    bad = report["bad"]
    assert bad[str(tmp_path / "in")] == {"not read: .png": 1}
    assert bad[str(tmp_path / "in" / "9.jsonl")] == {"not JSON": 1, "empty text": 1, 'no key "text"': 1, "not UTF-8": 1}
    assert report["sources"]["web"]["tokens"] == round(stages[-1][1]["out"]["bytes"] / 4)


def test_the_report_can_be_read(tmp_path: Path) -> None:
    write_rows(tmp_path / "in" / "a.jsonl", ["A text that stays <b>here</b>.", "A casino & more of it", "short"])
    write_rows(tmp_path / "in" / "b.jsonl", ["Another one.\nA text that stays <b>here</b>.\nand what is new"])
    stages = [{"kind": "filter", "min_chars": 9, "drop": ("casino",)}, {"kind": "paragraphs", "min_chars": 9}]
    source = {"name": "web", "inputs": (str(tmp_path / "in"),), "stages": tuple(stages), "share": 0.5, "keys": ("id",)}
    made = recipe(tmp_path / "in", []).model_validate({"sources": (source,), "run_tokens": 130.0})
    curate(made, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    for part in (
        "<td>web 00 filter<td>it has casino<td>1<td>21",
        "<td>web 00 filter<td>too short<td>1<td>5",
        "<pre>A casino &amp; more of it</pre><pre>A",
        "<pre>Another one.\nA text that stays &lt;b&gt;here&lt;/b&gt;.\nand what is new</pre>"
        "<pre>Another one.\nand what is new</pre>",
        "web 01 paragraphs: 50.4%",
        "<h3>web: characters</h3><svg",
    ):
        assert part in page, part
    kept = json.loads((tmp_path / "out" / "report.json").read_text())["sources"]["web"]
    assert (kept["tokens"], kept["epochs"], kept["raw"]["documents"]) == (14, 8.9655, 4)
    assert "<script" not in page and "http" not in page  # one file, whole by itself


def test_a_large_file_is_cut_and_small_ones_are_joined(tmp_path: Path) -> None:
    make(tmp_path / "in", 1, 400)
    for number in range(20):
        (tmp_path / "in" / f"n{number:02d}.txt").write_text(f"text {number} " * 20)
    units = make_plan(recipe(tmp_path / "in", [], unit_mb=0.004), tmp_path / "out", lambda file, why: None).units
    assert max(unit.size for unit in units) <= 4000 and max(len(unit.pieces) for unit in units) > 10
    assert sum(unit.size for unit in units) == sum(p.stat().st_size for p in (tmp_path / "in").iterdir())


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    make(tmp_path / "in", 12, 100)
    made = recipe(tmp_path / "in", STAGES, unit_mb=0.01)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\n"
    code += "from megallama.curate.recipe import Recipe\nfrom megallama.curate.run import curate\n"
    code += f"if __name__ == '__main__':\n    made = Recipe.model_validate_json({made.model_dump_json()!r})\n"
    code += f"    curate(made, Path({str(tmp_path / 'out')!r}), 2)\n"
    (tmp_path / "start.py").write_text(code)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "start.py")])
    until = time.monotonic() + 60
    children, file = list[int](), Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    while not [*(tmp_path / "out" / "work").glob("*.beat")] and parent.poll() is None and time.monotonic() < until:
        children = [*map(int, file.read_text().split())]
        time.sleep(0.01)
    parent.send_signal(signal.SIGKILL)
    assert parent.wait() == -signal.SIGKILL and len(children) >= 2
    while (alive := [pid for pid in children if _runs(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    assert alive == []


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_process_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures.process import BrokenProcessPool

    make(tmp_path / "in", 1)
    monkeypatch.setattr("megallama.curate.run.ProcessPoolExecutor.submit", _dies)
    with pytest.raises(DataError, match="a process died; if memory ran out, use fewer --workers"):
        curate(recipe(tmp_path / "in", STAGES), tmp_path / "out", 2)
    assert issubclass(BrokenProcessPool, Exception)


def _dies(pool: Any, *work: Any) -> Any:
    from concurrent.futures import Future
    from concurrent.futures.process import BrokenProcessPool

    future = Future[None]()
    future.set_exception(BrokenProcessPool())
    return future
