"""train.phases: one run equals its stages by hand and itself stopped anywhere, to the bit; what is past stays."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megallama.cli import command
from megallama.comm.launch import World
from megallama.config.load import to_toml
from megallama.config.schema import Config
from megallama.data.writer import IndexedWriter
from megallama.plan import plan
from megallama.train import continued
from megallama.train.step import ByPosition, by_position, evaluate_step
from tests.pool import Pool
from tests.small import MODEL, documents, micro_batches, small_config, solo_rank, tokens
from tests.train.runs import curve, records, run, state_files
from tests.train.test_continued import RUN, counters, sections, step
from tests.train.test_continued import files as two_sources

__all__ = ["two_sources"]
PHASES: list[dict[str, Any]] = [
    {"until_tokens": 300, "weights": {"code": 0.0}},  # 3 steps of 128 tokens: it ends inside the third
    {"until_tokens": 650, "seq_length": 40, "global_batch_size": 4, "rope_theta": 50000.0},  # 2 steps of 160
    {"until_tokens": 900, "seq_length": 32, "global_batch_size": 4, "rope_scaling": {"kind": "linear", "factor": 2.0}},
]  # and 2 steps of 128
STEPS, ENDS = 7, (3, 5, 7)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tp": 2}),
    "cp2": (2, {"cp": 2}),
    "pp2 chunks2": (2, {"pp": 2, "chunks": 2}),
}
DTYPES = {"tp2": "bf16", "cp2": "fp32", "pp2 chunks2": "bf16"}


@pytest.fixture
def files(two_sources: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """And one document of 641 tokens: 40, 16 and 20 whole samples of the three lengths."""
    with IndexedWriter(tmp_path / "held", np.dtype(np.uint16)) as writer:
        writer.add(np.random.default_rng(1).integers(0, 61, 641), np.array([641]))
    return {**two_sources, "held": str(tmp_path / "held")}


def in_phases(files: dict[str, str], **changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    base = {
        "train": {"phases": PHASES, **changes.pop("train", {})},
        "data": {"mixture_schedule": [], "valid": [{"path": files["held"]}]},
        "eval": {"interval": 4, "batches": 99},
        "checkpoint": {"interval": 0, "keep_last": 9},
    }
    return sections(files, **base | changes)


def files_of(run: Path, number: int) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(Path(step(run, number)).rglob("*.safetensors"))}


def losses(run: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in records(run, "valid")]


def check_positions(record: dict[str, Any], checkpoint: Path, text: str, close: float) -> None:
    """The loss by position as `megallama evaluate` has it, of the same windows of the phase's length."""
    out = checkpoint.parent / f"{checkpoint.name}.json"
    assert command("evaluate")([str(checkpoint), "--data", text, "--output", str(out)]) == 0
    (found,) = json.loads(out.read_text())["texts"].values()
    assert found["tokens"] == record["tokens"] == 640
    assert found["loss"] == pytest.approx(record["loss"], abs=close)
    assert [*found["loss_by_position"]] == [*record["loss_by_position"]]
    assert found["loss_by_position"] == pytest.approx(record["loss_by_position"], abs=close)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stopped_anywhere_it_is_the_run_that_never_stopped(
    pool: Pool, tmp_path: Path, files: dict[str, str], layout: str
) -> None:
    """In each phase and at a boundary: weights, moments, losses, counters, evaluations."""
    (ranks, parallel), runs = LAYOUTS[layout], [tmp_path / name for name in ("straight", "stopped")]
    same: dict[str, dict[str, Any]] = {"parallel": parallel, "precision": {"dtype": DTYPES[layout]}}
    ended = pool.run(ranks, RUN, str(runs[0]), in_phases(files, **same))
    assert [(a["status"], a["step"]) for a in ended] == [(0, STEPS)] * ranks
    for made in (3, 1):  # up to step 3, where a phase ends, and to step 4
        stop = in_phases(files, **same, train={"stop_after_steps": made})
        assert {a["status"] for a in pool.run(ranks, RUN, str(runs[1]), stop)} == {75}
    pool.run(ranks, RUN, str(runs[1]), in_phases(files, **same))
    assert curve(runs[1]) == curve(runs[0]) and len(curve(runs[0])) == STEPS
    assert losses(runs[1]) == losses(runs[0])
    assert [n for n, _ in losses(runs[0])] == [3, 4, 5, 7]
    assert state_files(runs[1]) == state_files(runs[0])
    for number in ENDS:
        assert files_of(runs[1], number) == files_of(runs[0], number)
        assert counters(runs[1], number) == counters(runs[0], number)
    assert counters(runs[0], STEPS)["ledger"] == [
        {"first_token": 0, "seq_length": 16, "phase": 1},
        {"first_token": 384, "seq_length": 40, "phase": 2},
        {"first_token": 704, "seq_length": 32, "phase": 3},
    ]
    exported = [json.loads((Path(step(runs[0], n)) / "model/config.json").read_text()) for n in ENDS]
    assert [(c["rope_theta"], c["max_position_embeddings"]) for c in exported] == [
        (10000.0, 16), (50000.0, 40), (10000.0, 32),
    ]  # fmt: skip
    at_ends = [r for r in records(runs[0], "valid") if r["step"] in ENDS]
    for record, phase_step in zip(at_ends, ENDS, strict=True):
        if layout == "cp2" or phase_step == STEPS:
            close = 1e-5 if layout == "cp2" else 2e-2
            check_positions(record, Path(step(runs[0], phase_step)), files["held"], close)
    log = (runs[0] / "run.log").read_text()
    assert "held loss by tokens before: 1 4." in log
    assert "phase 2 of 3 begins after step 3, 384 tokens read: 4 samples of 40 tokens\n" in log


def test_it_is_its_stages_by_hand(
    pool: Pool, tmp_path: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same settings, a stage each, gone on from with checkpoint.continue_from; two replicas."""
    pool.run(2, RUN, str(tmp_path / "phases"), in_phases(files))
    before, done, curves = None, 0, []
    for number, (phase, end) in enumerate(zip(PHASES, ENDS, strict=True)):
        weights = {"web": 0.75, "code": 0.25} | phase.get("weights", {})
        model = {name: phase[name] for name in ("rope_theta", "rope_scaling") if name in phase}
        batch = {name: phase[name] for name in ("seq_length", "global_batch_size") if name in phase}
        stage = sections(
            files,
            model=model,
            batch=batch,
            train={"steps": STEPS, "stop_after_steps": end - done},
            data={"train": [{"path": files[n], "weight": w} for n, w in weights.items()], "mixture_schedule": []},
            checkpoint={"continue_from": before} if before else {},
        )
        run = tmp_path / f"stage{number}"
        pool.run(2, RUN, str(run), stage)
        curves += curve(run)
        assert files_of(run, end) == files_of(tmp_path / "phases", end)
        before, done = step(run, end), end
    assert curves == curve(tmp_path / "phases")
    for key in ("sources", "samples", "tokens_read", "updates", "mixture"):
        assert counters(tmp_path / "phases", STEPS)[key] == counters(tmp_path / "stage2", STEPS)[key]
    check_sources(tmp_path, small_config(**in_phases(files)), capsys)


def check_sources(folder: Path, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """What `megallama plan --data` and `explain` say of a run in phases is what it took from its sources."""
    (folder / "phases.toml").write_text(to_toml(config))

    def told(name: str, *words: str) -> Any:
        assert command(name)([str(folder / "phases.toml"), *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    made = [r["sources"] for r in records(folder / "phases")]
    planned = told("plan", "--data")
    assert planned["phases"] == [1, 4, 6]
    assert [s["shares"] for s in planned["sources"]] == [[1.0, 0.75, 0.75], [0.0, 0.25, 0.25]]
    assert {s["source"]: (s["used_tokens"], s["epochs"]) for s in planned["sources"]} == {
        name: (used["tokens"], used["epochs"]) for name, used in made[-1].items()
    }
    for number, used in enumerate(made, 1):
        samples = told("explain", str(number))["samples"]
        assert len(samples) == (8 if number <= 3 else 4)
        for name in used:
            seen = [s["index"] for s in samples if s["source"] == name]
            assert seen == [*range(int(used[name]["samples"]) - len(seen), int(used[name]["samples"]))]
        length = {1: 16, 2: 40, 3: 32}[1 + (number > 3) + (number > 5)]
        assert {sum(p["length"] for p in s["pieces"]) for s in samples} == {length + 1}


def failing(world: World, folder: str, sections: dict[str, dict[str, Any]], kind: str) -> dict[str, Any]:
    """As `tests.train.runs.run`; rank 1 has a fault as it makes a later phase."""
    entering, names = list[int](), ("assemble", "kernels_of", "open_sources")
    real = {name: getattr(continued, name) for name in names}

    def make_plan(*arguments: Any) -> Any:
        entering.append(1)
        return plan.make_plan(*arguments)

    def faulty(name: str, *arguments: Any, **named: Any) -> Any:
        if not entering or world.rank != 1 or kind != name:
            return real[name](*arguments, **named)
        if kind == "assemble":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        if kind == "open_sources":
            raise FileNotFoundError(2, "No such file or directory", "web.idx")
        kernels = real[name](*arguments, **named)
        return replace(kernels, choices=(replace(kernels.choices[0], selected="apex"), *kernels.choices[1:]))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(continued, "make_plan", make_plan)
        for name in real:
            patched.setattr(continued, name, partial(faulty, name))
        return run(world, folder, sections)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("assemble", r"model: rank 1 on \S+: RuntimeError: DefaultCPUAllocator: can't allocate memory"),
        ("open_sources", r"data: rank 1 on \S+: FileNotFoundError: .* 'web.idx'"),
        ("kernels_of", r"attention: rank 0 took .*, rank 1 apex; its log says why\. .*"),
    ],
)
def test_a_rank_that_cannot_make_a_phase_is_named_and_all_leave(
    pool: Pool, tmp_path: Path, files: dict[str, str], kind: str, said: str
) -> None:
    """The phase before is saved: the same command goes on from there."""
    ended = pool.run(2, "tests.train.test_phases:failing", str(tmp_path), in_phases(files), kind)
    assert all(re.fullmatch(said, a["error"]) for a in ended), ended
    assert {a["status"] for a in ended} == {1 if kind == "assemble" else 4}  # `pretrain` leaves with 4
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3] and counters(tmp_path, 3)["samples"] == 24
    again = pool.run(2, RUN, str(tmp_path), in_phases(files, train={"stop_after_steps": 1}))
    assert [(a["status"], a["step"]) for a in again] == [(75, 4)] * 2


def changed(number: int, **settings: Any) -> dict[str, Any]:
    return {"phases": [{**phase, **(settings if n == number else {})} for n, phase in enumerate(PHASES)]}


def test_phases_ahead_may_change_and_past_ones_not(pool: Pool, tmp_path: Path, files: dict[str, str]) -> None:
    """After 4 steps the second phase is under way: its end is still to come."""
    pool.run(1, RUN, str(tmp_path / "run"), in_phases(files, train={"stop_after_steps": 4}))

    def outcome(train: dict[str, Any], name: str = "run") -> Any:
        (ended,) = pool.run(1, RUN, str(tmp_path / name), in_phases(files, train=train))
        return ended.get("error") or (ended["status"], ended["step"])

    use = "what is past cannot change: write it as it was, and what is to be new in the phases that follow"
    refused = {
        "[1].rope_theta was 50000.0 and is 7.0": changed(1, rope_theta=7.0),
        "[1].seq_length was 40 and is 20": changed(1, seq_length=20),
        "[1].weights was {code = 0.25, web = 0.75} and is {code = 0.5, web = 0.75}": changed(1, weights={"code": 0.5}),
        "[0].until_tokens was 300 and is 200": changed(0, until_tokens=200),
        '[1].until_tokens was 650 and is "none"': {"phases": PHASES[:1]},
    }
    for words, train in refused.items():
        assert outcome(train) == f"configuration: train.phases{words}; {use}"
    for name, train, end in (
        ("longer", changed(1, until_tokens=840), 7),  # 3 steps of 160 in place of 2, and then 1 of 128
        ("other", changed(2, seq_length=16, rope_theta=9.0), 9),
    ):
        shutil.copytree(tmp_path / "run", tmp_path / name)
        assert outcome(train, name) == (0, end)


def test_plan_and_dry_run_know_phases_and_where_a_run_goes_on(
    pool: Pool, tmp_path: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of 3 steps of 128 tokens is gone on from: by the plan of one with 7 steps, and by that of one in phases."""
    pool.run(1, RUN, str(tmp_path / "first"), in_phases(files, train={"stop_after_steps": 3}))
    model = [f"model.{name}={value}" for name, value in MODEL.items()]
    batch = ["batch.global_batch_size=8", "batch.micro_batch_size=1", "batch.seq_length=16", "precision.dtype=fp32"]
    words = ["ranks=2", *model, *batch, f"data.train={files['web']}"]
    other = f"checkpoint.continue_from={step(tmp_path / 'first', 3)}"
    phases = "train.phases=[{until_tokens=300},{until_tokens=650,seq_length=40,global_batch_size=4}]"

    def said(command_name: str, *more: str) -> str:
        assert command(command_name)([*words, *more]) == 0
        return " ".join(capsys.readouterr().out.split())

    assert "run 7 steps, 896 tokens work" in said("plan", "train.tokens=896")
    assert "run 7 steps, 3 of them made; ahead 512 tokens work" in said("plan", "train.tokens=896", other)
    assert "run 7 steps, 3 of them made; ahead 512 tokens work" in said("plan", "train.steps=7", other)
    assert json.loads(said("plan", "train.steps=7", other, "--json"))["tokens"] == 512
    out = said("plan", phases)
    assert " 300 8 16 10000 " in out and " 650 4 40 10000 " in out and "batch 4 sequences x 40 = 160 tokens" in out
    assert "per token (causal attention) in this phase schedule" in out  # in all it would be the other's tokens too
    both = json.loads(said("plan", phases, "--json"))["phases"]
    assert [p["tokens"] for p in both] == [384, 320]
    assert [p["tokens"] for p in [json.loads(said("plan", phases, other, "--json"))]] == [320]
    assert ", skipped step 3, in every phase proved" in said("dryrun", phases)


def test_positions_count_from_the_start_of_a_document() -> None:
    """The sums of each power of two, of the tokens that count; together they are the loss."""
    config = small_config()
    rank, data, starts = solo_rank(config), tokens(config, 1)[0], documents(config, 1)[0]
    by = ByPosition(rank)
    batches = [replace(batch, tell=by) for batch in micro_batches(rank, data, starts=starts)]
    found = evaluate_step(rank, rank.plan.schedule_for(len(batches), training=False), batches)
    begins = starts == torch.arange(16)
    goes_on = ~torch.cat([begins[:, 1:], torch.zeros(8, 1).bool()], 1)
    before = (torch.arange(16) - starts + 1)[goes_on]
    want = [int(((before >= 2**b) & (before < 2 ** (b + 1))).sum()) for b in range(5)]
    assert by.sums[1, :5].tolist() == want and want[0] > 0 and want[3] > 0
    assert by.sums[1, 5:].sum() == 0 and sum(want) == found.tokens
    assert float(by.sums[0].sum()) == pytest.approx(found.sums["loss"], rel=1e-12)
    assert [*by_position(*by.sums.tolist())][:3] == ["1", "2-3", "4-7"]
