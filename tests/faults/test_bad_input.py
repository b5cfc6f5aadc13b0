"""Everything a user can get wrong on the command line: one clear message, status 2, nothing changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megallama.data.writer import IndexedWriter
from megallama.pretrain import main

GOOD = [
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.ffn_hidden_size=48",
    "model.vocab_size=61",
    "batch.seq_length=16",
    "batch.micro_batch_size=2",
    "batch.global_batch_size=4",
    "data.synthetic=true",
    "train.steps=2",
    "run.device=cpu",
    "run.peak_tflops=1",
    "log.plot=false",
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A small tokenized corpus."""
    with IndexedWriter(tmp_path / "corpus", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(500) % 61)
    return tmp_path / "corpus"


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    """The message of a run that must be refused."""
    assert main(arguments) == status
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    assert captured.err.startswith("error: ")
    return captured.err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("model.hiden_size=32", "unknown setting 'model.hiden_size'; did you mean model.hidden_size?"),
        ("train.steps=many", 'train.steps="many" must be a whole number above 0'),
        ("parallel.tp=3", "parallel.tp=3"),
        ("parallel.pp=2", "ranks"),
        ("batch.global_batch_size=5", "batch.global_batch_size=5"),
        ("data.synthetic=false", "data.train"),
        ("data.train=some/corpus", "data.synthetic=true leaves data.train unread; write data.synthetic=false"),
        ("data.tokenizer=/no/such/tokenizer.model", "/no/such/tokenizer.model"),
        ("run.device=cuda", "run.device=cuda, but on rank 0"),
        ("run.folder=/proc/nothing", "run.folder=/proc/nothing cannot be written"),
        ("checkpoint.resume=must", "checkpoint.resume=must"),
    ],
)
def test_a_wrong_setting(wrong: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refused([*GOOD, f"run.folder={tmp_path / 'run'}", wrong], capsys)
    assert message in text


def test_all_errors_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refused([*GOOD, "model.hiden_size=32", "parallel.tp=3", "optimizer.lr=-1"], capsys)
    for part in ("hiden_size", "tp=3", "optimizer.lr"):
        assert part in text


def test_a_missing_configuration_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no/such.toml" in refused(["no/such.toml"], capsys)


def test_missing_and_truncated_data(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [*GOOD, "data.synthetic=false", f"run.folder={tmp_path / 'run'}"]
    assert "nowhere" in refused([*good, f"data.train={tmp_path / 'nowhere'}"], capsys)
    size = (tmp_path / "corpus.bin").stat().st_size
    with (tmp_path / "corpus.bin").open("r+b") as file:
        file.truncate(size - 100)
    text = refused([*good, f"data.train={corpus}"], capsys)
    assert f"{corpus}.bin" in text and str(size) in text and str(size - 100) in text
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_data_of_a_larger_vocabulary(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*GOOD, "data.synthetic=false", f"data.train={corpus}", "model.vocab_size=50", f"run.folder={tmp_path}"]
    assert "vocab_size=61" in refused(arguments, capsys)


def test_a_damaged_checkpoint_falls_back_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [*GOOD, f"run.folder={tmp_path}", "checkpoint.interval=1"]
    assert main([*run, "train.steps=2"]) == 0
    newest = tmp_path / "checkpoints" / "step-00000002"
    damaged = newest / "optimizer" / "exp_avg-00001-of-00001.safetensors"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 0x10
    damaged.write_bytes(data)
    capsys.readouterr()
    assert main([*run, "train.steps=3", "lr_schedule.decay_steps=2"]) == 0
    out = capsys.readouterr().out
    assert "exp_avg-00001-of-00001.safetensors" in out and "block 0" in out
    assert "resumed after step 1" in out
    assert newest.with_name(newest.name + ".damaged").exists()


def test_when_all_checkpoints_are_damaged_nothing_starts_from_random(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [*GOOD, f"run.folder={tmp_path}"]
    assert main(run) == 0
    for manifest in (tmp_path / "checkpoints").glob("step-*/manifest.json"):
        manifest.write_bytes(b"{}")
    capsys.readouterr()
    assert "checkpoint.resume=fresh" in refused(run, capsys)
    assert main([*run, "--fresh"]) == 0


def test_another_model_in_the_same_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [*GOOD, f"run.folder={tmp_path}"]
    assert main(run) == 0
    capsys.readouterr()
    text = refused([*run, "model.num_layers=3", "model.norm_eps=1e-6"], capsys)
    assert "num_layers" in text and "norm_eps" in text


def test_random_tokens_do_not_go_on_with_a_run_on_text(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a test of speed would with the configuration of a real run: its checkpoints would make room for nonsense."""
    run = [*GOOD, f"run.folder={tmp_path / 'run'}", "checkpoint.interval=1"]
    assert main([*run, "data.synthetic=false", f"data.train={corpus}"]) == 0
    before = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    capsys.readouterr()
    text = refused([*run, "train.steps=4", "lr_schedule.decay_steps=2"], capsys)
    assert "data.synthetic=true, but this run was trained on text; give it a run.folder of its own" in text
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == before


def test_a_finished_run_ends_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [*GOOD, f"run.folder={tmp_path}"]
    assert main(run) == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()}
    assert main(run) == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()} == before


def test_help_names_the_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "75 saved and stopped early" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("model.vocab_size=50", "vocab_size=61"),
        ("data.tokenizer=/no/such/tokenizer.model", "/no/such/tokenizer.model"),
        ("data.train=/no/such/corpus", "/no/such/corpus.idx does not exist"),
        ('data.train={path="CORPUS",max_epochs=0.1}', "over max_epochs=0.1"),
        ("checkpoint.resume=must", "holds no checkpoint"),
        ("checkpoint.weights_from=/no/such/weights", "cannot load weights from /no/such/weights: "),
        ("checkpoint.weights_from=tests/frozen/v1/bf16", "the tensors in tests/frozen/v1/bf16 are not those of the"),
        ("train.setps=3", "unknown setting 'train.setps'"),
    ],
)
def test_what_is_wrong_is_known_before_kernels_are_chosen_and_a_folder_is_made(
    wrong: str, message: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def chosen(*args: object) -> None:
        raise AssertionError("kernels were chosen")

    monkeypatch.setattr("megallama.train.setup.kernels_of", chosen)
    arguments = [*GOOD, "data.synthetic=false", f"data.train={corpus}", f"run.folder={tmp_path / 'run'}"]
    assert message in refused([*arguments, wrong.replace("CORPUS", str(corpus))], capsys)
    assert not (tmp_path / "run").exists()
