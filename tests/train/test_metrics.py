"""Metrics: the console line, the file that survives kills, TensorBoard, wandb, and sinks that fail."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from megallama.config.schema import Config, LogConfig, RunConfig, TrainConfig
from megallama.train.log import Logger
from megallama.train.metrics import JsonLines, MetricsWriter, Record, line, rewind
from megallama.train.metrics import scalars as tags
from megallama.train.speed import Meter, peak_memory_bytes

STEP: Record = {
    "kind": "train",
    "step": 120,
    "loss": 3.21449,
    "lr": 3e-4,
    "grad_norm": 0.8119,
    "tokens": 32768,
    "step_seconds": 2.5,
    "tokens_per_second": 12345.6,
    "tokens_per_second_per_rank": 3086.4,
    "mfu_causal": 0.412,
    "mfu_full": 0.44,
    "peak_memory_bytes": 1_234_000_000,
    "consumed_tokens": 4_100_000,
    "consumed_samples": 16016,
    "eta_seconds": 754.2,
    "phase_seconds": {"forward": 1.25},
    "skipped": False,
    "skipped_steps": 0,
    "loss_scale": 1.0,
    "data_wait_seconds": 0.0,
    "sources": {},
}
VALID: Record = {
    "kind": "valid", "step": 120, "loss": 2.0, "tokens": 50_000, "seconds": 3.0, "consumed_tokens": 4_100_000,
    "name": "valid", "bits_per_byte": 1.2345,
}  # fmt: skip
PLAIN = LogConfig(tensorboard=False)


def config_of(folder: Path, log: LogConfig) -> Config:
    return Config(run=RunConfig(folder=str(folder)), log=log, train=TrainConfig(steps=2000))


def writer(folder: Path, log: LogConfig = PLAIN, rank: int = 0, step: int = 0) -> MetricsWriter:
    return MetricsWriter(config_of(folder, log), Logger(rank, 2, folder), step)


def test_the_line() -> None:
    assert line(STEP, 2000) == (
        "step 120/2000 | loss 3.2145 | lr 3.00e-04 | grad norm 0.812 | 12.3k tok/s | MFU 41.2% | left 0:12:34"
    )
    unknown = {**STEP, "mfu_causal": None, "mfu_full": None}
    assert line(unknown, 2000).endswith("| 12.3k tok/s | left 0:12:34")
    assert not [tag for tag in tags(unknown) if "mfu" in tag] and "speed/mfu_full" in tags(STEP)


def test_the_line_of_a_skipped_step() -> None:
    bad = {**STEP, "skipped": True, "skipped_steps": 2, "loss": math.nan, "grad_norm": math.inf, "loss_scale": 65536.0}
    assert line(bad, 2000) == (
        "step 120/2000 | SKIPPED, not finite (2 so far) | loss nan | grad norm inf | left 0:12:34"
    )


def test_lines_fit_a_terminal_of_120_columns() -> None:
    long = {**STEP, "step": 333_787, "tokens_per_second": 955_456, "eta_seconds": 17.3 * 86400}
    time = len("23:59:59 ")
    assert len(line(long, 333_787)) + time <= 120
    assert len(line({**long, "skipped": True, "skipped_steps": 1234, "loss": math.nan}, 333_787)) + time <= 120
    slow = {**VALID, "step": 333_787, "name": "wikipedia-en", "tokens": 2_100_000, "seconds": 4000}
    assert len(line(slow, 333_787)) + time <= 120


def test_what_is_on_no_line_is_said_when_it_grows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = MetricsWriter(config_of(tmp_path, PLAIN), Logger(0, 1))
    for step, (memory, scale) in enumerate([(100, 1.0), (104, 4.0), (106, 2.0), (106, 4.0), (99, 4.0)], 1):
        out.write({**STEP, "step": step, "peak_memory_bytes": memory * 10**6, "loss_scale": scale})
    out.close()
    output = [line[9:] for line in capsys.readouterr().out.splitlines() if "|" not in line]
    assert output == [
        *("step 1: peak memory of this rank 100.0 MB", "step 2: loss scale 4"),
        *("step 3: peak memory of this rank 106.0 MB", "step 4: loss scale 4"),
    ]


def test_more_than_the_given_peak_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = MetricsWriter(config_of(tmp_path, PLAIN), Logger(0, 1))
    for step in (1, 2):
        out.write({**STEP, "step": step, "mfu_causal": 1.3})
    out.close()
    assert capsys.readouterr().out.count("warning: MFU above 100 %: this device does more than run.peak_tflops") == 1


def test_the_line_of_an_evaluation() -> None:
    assert line(VALID, 2000) == (
        "step 120/2000 | valid loss 2.0000 | 1.2345 bits/byte | perplexity 7.39 | 50.0k tokens in 0:00:03"
    )
    task = {"kind": "task", "name": "own", "step": 120, "seconds": 3.0, "items": 9, "consumed_tokens": 4_100_000}
    made = {**task, "metrics": {"acc": 0.5, "bits_per_byte": 1.25}}
    assert line(made, 2000) == "step 120/2000 | own | acc 0.5000 | bits_per_byte 1.2500 | 9 items in 0:00:03"
    assert tags(made) == {"task/own/acc": 0.5, "task/own/bits_per_byte": 1.25}
    left = {**task, "metrics": {}, "items": 0, "seconds": 600.0}
    assert tags(left) == {} and " | own | left out, eval.max_seconds are over; use more" in line(left, 2000)
    assert len(line(left, 2000)) <= 120
    huge = {**VALID, "name": "code", "loss": 800.0, "bits_per_byte": None}
    assert line(huge, 2000) == "step 120/2000 | code loss 800.0000 | perplexity large | 50.0k tokens in 0:00:03"


def test_meter() -> None:
    meter = Meter(ranks=4, flops=(600.0, 800.0), peak_flops=1e6, total_tokens=10_000)
    first = meter.lap(tokens=1000, seconds=10.0, consumed_tokens=1000)
    assert (first["tokens_per_second"], first["tokens_per_second_per_rank"]) == (100, 25)
    assert (first["mfu_causal"], first["mfu_full"]) == pytest.approx((0.015, 0.02))
    assert (first["eta_seconds"], first["tokens"], first["step_seconds"]) == (90, 1000, 10.0)
    blind = Meter(ranks=4, flops=(600.0, 800.0), peak_flops=None, total_tokens=10_000)
    same = blind.lap(tokens=1000, seconds=10.0, consumed_tokens=1000)
    assert same == {**first, "mfu_causal": None, "mfu_full": None}
    second = meter.lap(tokens=1000, seconds=1.0, consumed_tokens=2000)
    assert second["eta_seconds"] == 8  # the slow first step is not extrapolated
    third = meter.lap(tokens=1000, seconds=3.0, consumed_tokens=3000)
    assert third["eta_seconds"] == 14  # 7000 tokens at 2000 tokens in 4 s
    assert meter.lap(tokens=1, seconds=1.0, consumed_tokens=10_001)["eta_seconds"] == 0


def test_the_time_left_is_told_by_the_last_twenty_steps() -> None:
    meter = Meter(ranks=1, flops=(1.0, 1.0), peak_flops=None, total_tokens=1000)
    seconds = [50.0, 101.0, *[2.0] * 19, 3.0, 4.0]
    left = [meter.lap(tokens=10, seconds=lap, consumed_tokens=0)["eta_seconds"] for lap in seconds]
    assert left[-3:] == pytest.approx([100 * (101 + 38) / 20, 100 * (38 + 3) / 20, 100 * (36 + 3 + 4) / 20])


def test_peak_memory_is_that_of_this_process() -> None:
    block = torch.ones(80_000_000, dtype=torch.uint8)
    grown = peak_memory_bytes(torch.device("cpu"))
    del block
    assert 80_000_000 < grown < 50_000_000_000
    with open("/proc/self/status", encoding="ascii") as status:
        (now,) = (int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    assert abs(now - grown) < 0.0009 * grown + 100_000
    # a peak does not fall (the kernel's counters are exact to about a megabyte)
    assert peak_memory_bytes(torch.device("cpu")) > grown - 4_000_000


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(out: MetricsWriter) -> None:
    """Return when the thread has written everything."""
    over = threading.Event()
    out._thread.submit(over.set)
    assert over.wait(60)


def test_a_sink_that_hangs_costs_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, go = writer(tmp_path), threading.Event()
    write = out._sinks["metrics.jsonl"].write
    monkeypatch.setattr(out._sinks["metrics.jsonl"], "write", lambda *what: (go.wait(60), write(*what)))
    for step in range(1, 4):
        out.write({**STEP, "step": step})  # returns at once
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    go.set()
    out.close()
    assert [r["step"] for r in read(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_what_is_not_written_yet_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on from a copy in memory has the record of the copy's step; a file that is stuck holds nobody."""
    go, real = threading.Event(), JsonLines.write
    monkeypatch.setattr(JsonLines, "write", lambda sink, record: (go.wait(10), real(sink, record)))
    out = writer(tmp_path)
    out.write(STEP)
    out.catch_up(0.05)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    threading.Timer(0.2, go.set).start()
    out.catch_up(10)
    assert [r["step"] for r in read(tmp_path / "metrics.jsonl")] == [STEP["step"]]
    out.close()


def test_json_lines(tmp_path: Path) -> None:
    out = writer(tmp_path)
    out.write(STEP)
    out.write({**STEP, "step": 121, "loss": math.nan, "skipped": True})
    out.write(VALID)
    out.close()
    first, second, third = read(tmp_path / "metrics.jsonl")
    assert (first["kind"], first["step"], first["loss"]) == ("train", 120, 3.21449)
    assert first["phase_seconds"] == {"forward": 1.25}
    assert (second["loss"], second["skipped"]) == (None, True)
    assert (third["kind"], third["name"], third["bits_per_byte"]) == ("valid", "valid", 1.2345)


@pytest.mark.parametrize("requested", [False, True])
def test_other_ranks_write_no_files_and_step_lines_only_where_asked(tmp_path: Path, requested: bool) -> None:
    out = writer(tmp_path, LogConfig(every_rank=requested), rank=1)
    out.write(STEP)
    out.write(VALID)
    out.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs"]
    text = (tmp_path / "logs" / "rank-0001.log").read_text()
    assert text.count("| loss 3.2145 |") == requested and text.count("valid loss") == requested


def test_a_resumed_run_forgets_what_is_done_again(tmp_path: Path) -> None:
    out = writer(tmp_path)
    for step in range(1, 8):
        out.write({**STEP, "step": step})
        if step % 3 == 0:
            out.write({**VALID, "step": step})
    out.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind": "train", "step": 5, "lo')  # cut by a kill
    out = writer(tmp_path, step=4)
    out.write({**STEP, "step": 5, "loss": 9.0})
    out.close()
    records = read(path)
    kept = ", ".join(f"{r['kind']} {r['step']}" for r in records)
    assert kept == "train 1, train 2, train 3, valid 3, train 4, train 5"
    assert records[-1]["loss"] == 9.0
    assert sorted(p.name for p in tmp_path.glob("metrics*")) == ["metrics.jsonl"]


def test_a_line_in_the_middle_that_is_no_record_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\x00\n{"no": 1}\n7\n{"step": 2}\n{"step": 3}')
    rewind(path, 3)
    assert read(path) == [{"step": 1}, {"step": 2}]  # the last one had no end of line: it may be half a number
    file = path.stat().st_ino
    rewind(path, 3)
    assert path.stat().st_ino == file  # nothing to remove: who follows the file goes on reading it
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_from_scratch_keeps_the_old_file_aside(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    out = writer(tmp_path)
    out.write(STEP)
    out.close()
    assert read(tmp_path / "metrics.old.jsonl") == [{"step": 1}]
    assert [r["step"] for r in read(tmp_path / "metrics.jsonl")] == [120]
    for number in (2, 3):  # and each of several
        out = writer(tmp_path)
        out.write(STEP | {"step": number})
        out.close()
    assert read(tmp_path / "metrics.old.jsonl") == [{"step": 1}]
    found = [[r["step"] for r in read(tmp_path / f"metrics{name}.jsonl")] for name in (".old-2", ".old-3", "")]
    assert found == [[120], [2], [3]]


def test_a_full_disk_leaves_whole_lines_and_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = writer(tmp_path)
    out.write({**STEP, "step": 1})
    write, room = os.write, [40]

    def limited(handle: int, data: bytes) -> int:
        if not data.startswith(b"{"):
            return write(handle, data)
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        selected, room[0] = write(handle, data[: room[0]]), 0
        return selected

    written(out)
    monkeypatch.setattr(os, "write", limited)
    out.write({**STEP, "step": 2})  # 40 bytes of it fit
    out.write({**STEP, "step": 3})  # nothing fits
    written(out)
    monkeypatch.undo()
    out.write({**STEP, "step": 4})
    out.close()
    assert [r["step"] for r in read(tmp_path / "metrics.jsonl")] == [1, 4]
    warning = "warning: metrics.jsonl could not be written: [Errno 28] No space left on device; training goes on"
    assert capsys.readouterr().out.count(warning) == 1


def test_files_that_cannot_be_opened_do_not_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "tensorboard").write_text("a file")
    out = writer(tmp_path, LogConfig(), step=3)
    out.write(STEP)
    out.close()
    shown = capsys.readouterr().out
    assert shown.count("warning: no metrics.jsonl output: ") == 1
    assert shown.count("warning: no TensorBoard output: ") == 1
    assert "loss 3.2145" in shown


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_it_and_forgets_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for start, clock in ((0, 1000.0), (2, 2000.0)):
        monkeypatch.setattr("time.time", lambda clock=clock: clock)
        out = writer(tmp_path, LogConfig(), step=start)
        for step in range(start + 1, start + 5):
            out.write({**STEP, "step": step, "loss": 100.0 * start + step})
        out.write(VALID)
        out.close()
    monkeypatch.undo()
    found = scalars(tmp_path / "tensorboard")
    assert found["train/loss"] == [(1, 1.0), (2, 2.0), (3, 203.0), (4, 204.0), (5, 205.0), (6, 206.0)]
    assert found["valid/bits_per_byte"] == [(120, pytest.approx(1.2345))]
    assert found["seconds/forward"][0] == (1, 1.25)
    assert found["speed/mfu_causal"][0] == (1, pytest.approx(0.412))
    assert not [name for name in sys.modules if name == "tensorflow"]


@pytest.mark.parametrize(
    ("name", "config"),
    [("tensorboard.compat.proto.event_pb2", LogConfig()), ("wandb", LogConfig(tensorboard=False, wandb=True))],
)
def test_a_missing_package_costs_one_warning(
    name: str, config: LogConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    out = writer(tmp_path, config)
    out.write(STEP)
    out.close()
    shown = capsys.readouterr().out
    package = name.split(".")[0]
    warning = f"warning: no .* output: the package {package} is not installed; pip install {package}"
    assert len(re.findall(warning, shown)) == 1
    assert len(read(tmp_path / "metrics.jsonl")) == 1


class FakeWandb(types.ModuleType):
    """Notes its calls; `broken` makes every log call fail."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__("wandb")
        self.calls: list[Any] = []
        self.broken = broken

    def init(self, **keys: Any) -> FakeWandb:
        self.calls.append(keys)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        if self.broken:
            raise RuntimeError("no network")
        self.calls.append((step, values["train/loss"]))

    def finish(self) -> None:
        self.calls.append("finish")


def test_wandb_continues_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = LogConfig(tensorboard=False, wandb=True, wandb_project="mine")
    for step in (0, 120):
        out = writer(tmp_path, config, step=step)
        out.write(STEP)
        out.close()
    first, second = fake.calls[0], fake.calls[3]
    assert first["project"] == "mine" and first["config"]["optimizer"]["lr"] == Config().optimizer.lr
    assert first["id"] == second["id"] and first["resume"] == "allow" and len(first["id"]) == 12
    assert fake.calls[1:3] == [(120, 3.21449), "finish"]


def test_a_broken_wandb_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(broken=True))
    out = writer(tmp_path, LogConfig(tensorboard=False, wandb=True))
    for _ in range(3):
        out.write(STEP)
    out.close()
    assert capsys.readouterr().out.count("warning: wandb could not be written: no network; training goes on") == 1
    assert len(read(tmp_path / "metrics.jsonl")) == 3
