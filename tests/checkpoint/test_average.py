"""megallama average: numpy's mean of every tensor, in a step folder that everybody takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megallama.checkpoint.manifest import STATE, read_manifest
from megallama.checkpoint.reader import TensorFiles, open_state, verify_blocks
from megallama.cli import command
from megallama.inference.generate import load_llama
from tests.checkpoint.states import MODEL, empty_solo, make_config, make_manager, make_state, solo_shards

main = command("average")


def saved(folder: Path, seed: int, model=MODEL, dtype: str = "bf16") -> Path:
    bits = torch.float64 if dtype == "fp64" else torch.float32
    state = make_state(model, bits, seed)
    make_manager(folder, make_config(model, dtype)).save(seed, solo_shards(state), {"samples": seed})
    return folder / f"step-{seed:08d}"


@pytest.mark.parametrize("dtype", ["bf16", "fp64"])
def test_the_mean_is_numpys(tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [saved(tmp_path / f"run{seed}", seed, dtype=dtype) for seed in (5, 3, 9)]
    assert main([str(steps[0]), str(tmp_path / "run3"), str(steps[2]), "--output", str(tmp_path / "out")]) == 0
    out, exact = tmp_path / "out/step-00000009", np.float64 if dtype == "fp64" else np.float32
    states = [make_state(MODEL, torch.float64 if dtype == "fp64" else torch.float32, seed) for seed in (5, 3, 9)]
    found, weights = read_manifest(out), {}
    for kind in STATE:
        with open_state(out, found, kind) as files:
            for name, shape in ((n, p.shape) for n, p in files.places.items()):
                want = np.mean([s[kind][name].numpy() for s in states], axis=0, dtype=np.float64).astype(exact)
                got = tensor(files, name)
                assert got.shape == shape and np.array_equal(got, want), (kind, name)
                if kind == "master":
                    weights[name] = torch.from_numpy(want)
    assert verify_blocks(out, found, [*found.blocks()]) == [] and found.counters == {"samples": 9}
    assert json.loads((out / "model/config.json").read_text()) == json.loads(
        (steps[2] / "model/config.json").read_text()
    )
    llama = load_llama(out)
    assert all(torch.equal(llama.weights[n], t.to(llama.weights[n].dtype)) for n, t in weights.items())
    shards = empty_solo(MODEL, torch.float64 if dtype == "fp64" else torch.float32)
    make_manager(tmp_path / "out", make_config(MODEL, dtype)).resume(shards)  # a run goes on from it
    assert torch.equal(shards[0].state["master"], weights[shards[0].box.key].reshape(-1))


def tensor(files: TensorFiles, name: str) -> np.ndarray:
    return files.tensor(name).numpy()


def test_what_is_no_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = saved(tmp_path / "a", 1)
    other = saved(tmp_path / "b", 2, MODEL.model_copy(update={"ffn_hidden_size": 48, "rope_theta": 5e5}))
    assert main([str(one), str(other), "--output", str(tmp_path / "out")]) == 2
    text = capsys.readouterr().err
    for key, was, now in (("ffn_hidden_size", 56, 48), ("rope_theta", 10000.0, 500000.0)):
        assert f"{one}: model.{key}: checkpoint {was}, now {now}" in text
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    assert main([str(one), "--output", str(tmp_path / "out")]) == 2
    assert "out exists; name a new folder, or delete it first" in capsys.readouterr().err
    assert main([str(one / "model"), str(tmp_path), "--output", str(tmp_path / "new")]) == 2
    assert "has no manifest.json" in capsys.readouterr().err
    path = next((one / "optimizer").glob("exp_avg-*"))
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    assert main([str(one), "--output", str(tmp_path / "new")]) == 2
    assert f"{path} is damaged in block" in capsys.readouterr().err and not [*(tmp_path / "new").glob("step-*")]
