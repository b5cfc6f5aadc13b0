"""tools/inspect_checkpoint.py: contents, verification, comparison."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megallama.checkpoint import writer
from megallama.checkpoint.disk import CheckpointError
from megallama.checkpoint.folder import find_checkpoint
from megallama.cli import command
from megallama.inference.generate import find_model, load_llama
from tests.checkpoint.states import MODEL, elements, make_config, make_manager, make_state, solo_shards
from tests.convert.formats import to

main = command("inspect")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(writer, "isfinite", lambda value: True)  # earlier versions saved nan
    manager = make_manager(tmp_path, make_config())
    changed = make_state()
    changed["master"]["model.layers.1.mlp.up_proj.weight"][3, 5] += 2.0
    changed["exp_avg_sq"]["lm_head.weight"][-1] = float("nan")
    manager.save(1, solo_shards(make_state()), {"samples": 12345})
    manager.save(2, solo_shards(changed), {"samples": 67890})
    return tmp_path


def test_describes_the_newest_step_and_verifies_it(folder: Path, capsys) -> None:
    assert main([str(folder), "--verify"]) == 0
    text = capsys.readouterr().out
    size = f"{elements(MODEL):,} parameters, saved in bf16"
    for part in ("step-00000002: step 2, save 2", size, '{"samples": 67890}'):
        assert part in text
    assert "hidden_size = 32" in text and text.endswith(" blocks, 0 problems\n")


def test_every_tool_takes_every_path_to_a_checkpoint(folder: Path, capsys) -> None:
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    for step in sorted(folder.glob("step-*")):
        step.rename(run / "checkpoints" / step.name)
    newest = run / "checkpoints/step-00000002"
    (run / "checkpoints/step-00000009.damaged").mkdir()
    for path in (run, run / "checkpoints", newest, newest / "model"):
        assert main([str(path)]) == 0
        assert capsys.readouterr().out.startswith(f"{newest}: step 2, save 2, ")
        assert main([str(newest), str(path)]) == 0  # compared with
        assert capsys.readouterr().out.endswith("\n0 of 156 tensors differ\n")
        assert find_checkpoint(path) == newest and find_model(path) == newest / "model"
        load_llama(path)
        shards = solo_shards(make_state(seed=9))
        make_manager(folder / "other", make_config()).load_weights(path, shards)  # checkpoint.weights_from
    (newest / "manifest.json").write_text("{}")
    assert main([str(run)]) == 0
    told = capsys.readouterr()
    assert "step-00000001: step 1" in told.out and told.err.startswith(f"note: {newest} is left out: ")
    assert main([str(newest)]) == 2 and "manifest.json is damaged" in capsys.readouterr().err
    assert find_checkpoint(folder) == folder
    with pytest.raises(CheckpointError, match="has no complete checkpoint in it; give a step folder, a folder of"):
        find_model(folder)


def test_names_damaged_blocks_and_missing_files(folder: Path, capsys) -> None:
    path = next((folder / "step-00000002/optimizer").glob("exp_avg-00002*"))
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    data[20000] ^= 128
    path.write_bytes(data)
    (folder / "step-00000002/model/generation_config.json").unlink()
    assert main([str(folder / "step-00000002"), "--verify"]) == 1
    text = capsys.readouterr().out
    for part in ("block 1 (bytes 4096 to 8191)", "block 4 ("):
        assert f"{path} is damaged in {part}" in text
    assert " 3 problems" in text
    assert "generation_config.json cannot be opened" in text
    sound = [line.split()[1] for line in text.splitlines() if line.startswith("  verified ")]
    assert "model/config.json" in sound  # and of a damaged file it is never said
    assert not {str(path.relative_to(folder / "step-00000002")), "model/generation_config.json"} & {*sound}


def test_compares_tensor_by_tensor(folder: Path, capsys) -> None:
    a, b = str(folder / "step-00000001"), str(folder / "step-00000002")
    assert main([a, a]) == 0 and "\n0 of 156 tensors differ\n" in capsys.readouterr().out
    assert main([a, b]) == 1
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert lines[0].startswith("  model model.layers.1.mlp.up_proj.weight: 1 of 1792 elements differ, by at most ")
    assert lines[1] == "  master model.layers.1.mlp.up_proj.weight: 1 of 1792 elements differ, by at most 2"
    assert lines[2] == "  exp_avg_sq lm_head.weight: 32 of 4192 elements differ, by at most inf"
    assert lines[3] == "3 of 156 tensors differ, the first is model model.layers.1.mlp.up_proj.weight"


def test_compares_with_a_hugging_face_folder(folder: Path, tmp_path, capsys) -> None:
    shutil.copytree(folder / "step-00000001/model", tmp_path / "hf")
    assert main([str(folder / "step-00000001"), str(tmp_path / "hf")]) == 0
    assert "0 of 39 tensors differ" in capsys.readouterr().out
    assert main([str(folder / "step-00000002"), str(tmp_path / "hf")]) == 1


@pytest.mark.parametrize("kind,tp,pp", [("meta", 1, 1), ("megatron", 2, 4)])
def test_compares_with_formats_of_other_programs(folder: Path, tmp_path, capsys, kind: str, tp: int, pp: int) -> None:
    to(folder / "step-00000001", tmp_path / "other", kind, tp, pp)
    assert main([str(folder / "step-00000001"), str(tmp_path / "other")]) == 0
    assert "\n0 of 39 tensors differ\n" in capsys.readouterr().out
    assert main([str(folder / "step-00000002"), str(tmp_path / "other")]) == 1
    assert "1 of 39 tensors differ, the first is model model.layers.1.mlp.up_proj.weight" in capsys.readouterr().out


def test_runs_as_a_program_and_refuses_what_is_no_checkpoint(tmp_path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tools.inspect_checkpoint", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "has no manifest.json: it is not a complete checkpoint" in done.stderr


def test_options_in_any_order_and_those_of_the_other_kind(folder: Path, capsys) -> None:
    a, pair = str(folder / "step-00000001"), str(Path(__file__).parents[1] / "frozen/v1/data/text_valid")
    assert main([a, "--verify", a]) == 0
    out = capsys.readouterr().out
    assert ", 0 problems\n" in out and out.endswith("0 of 156 tensors differ\n")
    for more in (["--document", "0"], ["--write-sums"], ["--tokenizer", "x"]):
        assert main([a, *more]) == 2
        assert f"error: {a} is no pair, which --tokenizer, --document and --write-sums" in capsys.readouterr().err
    assert main([pair, a]) == 2
    assert capsys.readouterr().err.startswith(f"error: a pair is not compared with {a}; leave it out\nusage: ")
