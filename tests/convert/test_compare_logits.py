"""--compare-logits: right conversions pass, and every kind of mistake in a map is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megallama.cli import command
from megallama.convert import foreign
from megallama.convert.compare_logits import TOLERANCE, compare_logits
from megallama.convert.source import open_source
from tests.checkpoint.states import make_config, make_manager, make_state, solo_shards
from tests.convert.formats import GQA, MHA, MODELS, hf_folder, read_hf, to

main = command("convert")


transformers = pytest.importorskip("transformers")


def run(source: Path, target: Path, kind: str, *more: str) -> int:
    return main([str(source), str(target), "--to", kind, "--compare-logits", *more])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["hf", "megatron", "meta", "step"])
def test_right_conversions_pass(tmp_path: Path, kind: str, model: str, capsys) -> None:
    hf_folder(tmp_path / "hf", MODELS[model])
    ranks = ["--tp", "2"] if kind == "megatron" or (kind == "meta" and model != "gqa") else []
    ranks += ["--pp", "4"] if kind == "megatron" else []
    assert run(tmp_path / "hf", tmp_path / "a", kind, *ranks) == 0
    assert "verified: logits of random tokens differ by at most " in capsys.readouterr().out
    assert run(tmp_path / "a", tmp_path / "b", "hf", "--dtype", "fp32") == 0
    assert {t.dtype for t in read_hf(tmp_path / "b").values()} == {torch.float32}
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("*.unverified"))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_step_folder_passes_in_every_number_format(tmp_path: Path, dtype: str) -> None:
    state = make_state(GQA)
    make_manager(tmp_path / "run/checkpoints", make_config(GQA)).save(3, solo_shards(state), {})
    assert run(tmp_path / "run", tmp_path / "out", "megatron", "--tp", "4", "--dtype", dtype) == 0


@pytest.mark.parametrize("model", MODELS)
def test_the_compared_logits_are_those_of_transformers(tmp_path: Path, model: str) -> None:
    from megallama.convert.compare_logits import run as run_layers

    hf_folder(tmp_path / "hf", MODELS[model], torch.float32)
    tokens = torch.arange(20) * 6
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with open_source(tmp_path / "hf") as source, torch.no_grad():
        *_, own = run_layers(source, tokens, torch.float32)
        want = theirs(tokens[None]).logits[0]
        assert (own - want).abs().max() < 1e-5 * want.abs().max()
        assert compare_logits(source, source, "fp32") == 0.0


def swap(a: str, b: str) -> Callable[[foreign.Format], None]:
    """Write tensor `a` of every layer where `b` belongs, and the other way round."""

    def mutate(format: foreign.Format) -> None:
        for name in list(format.pieces):
            if a in name:
                other = name.replace(a, b)
                format.pieces[name], format.pieces[other] = format.pieces[other], format.pieces[name]

    return mutate


def ranks_mixed_up(part: str) -> Callable[[foreign.Format], None]:
    """The parts of the ranks in another order."""

    def mutate(format: foreign.Format) -> None:
        for name in list(format.pieces):
            if part in name:
                pieces = format.pieces[name]
                boxes = {key: [p.box for p in pieces if p.key == key] for key in {p.key for p in pieces}}
                format.pieces[name] = [foreign.Piece(p.file, p.key, p.row, boxes[p.key].pop()) for p in pieces]

    return mutate


MISTAKES = {
    "q and k": swap("q_proj", "k_proj"),
    "k and v": swap("k_proj", "v_proj"),
    "gate and up": swap("gate_proj", "up_proj"),
    "norms": swap("input_layernorm", "post_attention_layernorm"),
    "columns of o_proj": ranks_mixed_up("layers.2.self_attn.o_proj"),
    "columns of down_proj": ranks_mixed_up("layers.3.mlp.down_proj"),
    "rows of the head": ranks_mixed_up("lm_head"),
    "rows of the embedding": ranks_mixed_up("embed_tokens"),
}
WHERE = {
    "columns of o_proj": "the states after layer 2",
    "columns of down_proj": "the states after layer 3",
    "rows of the head": "the logits",
}


@pytest.mark.parametrize("direction", ["writing", "reading"])
@pytest.mark.parametrize("kind", ["meta", "megatron"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_map_is_found(
    tmp_path: Path, monkeypatch, capsys, kind: str, mistake: str, direction: str
) -> None:
    hf_folder(tmp_path / "hf", MHA)
    if direction == "reading":
        to(tmp_path / "hf", tmp_path / "given", kind, 2)
    right = getattr(foreign, f"{kind}_format")

    def wrong(*args, **more) -> foreign.Format:
        format = right(*args, **more)
        MISTAKES[mistake](format)
        return format

    monkeypatch.setattr(foreign, f"{kind}_format", wrong)
    arguments, out = (tmp_path / "hf", kind) if direction == "writing" else (tmp_path / "given", "hf")
    ranks = ["--tp", "2"] if direction == "writing" else []
    assert run(arguments, tmp_path / "out", out, *ranks) == 1
    output = capsys.readouterr()
    assert output.out == "" and f"kept as {tmp_path}/out.unverified" in output.err
    assert f"source and target differ: {WHERE.get(mistake, 'the states after layer 0')} of random" in output.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()
    assert (tmp_path / "out.unverified").is_dir()


@pytest.mark.parametrize("function,arguments,kind", [("paired", "hf", "meta"), ("halved", "meta", "hf")])
def test_a_forgotten_permutation_is_found(
    tmp_path: Path, monkeypatch, function: str, arguments: str, kind: str
) -> None:
    hf_folder(tmp_path / "hf", GQA)
    to(tmp_path / "hf", tmp_path / "meta", "meta")
    monkeypatch.setattr(foreign, function, lambda weight, count, d: weight)
    assert run(tmp_path / arguments, tmp_path / "out", kind) == 1
    assert (tmp_path / "out.unverified").is_dir()


def test_heads_counted_wrongly_for_grouped_queries_are_found(tmp_path: Path, monkeypatch) -> None:
    hf_folder(tmp_path / "hf", GQA)
    right = foreign.paired
    monkeypatch.setattr(foreign, "paired", lambda weight, count, d: right(weight, count // 2, 2 * d))
    assert run(tmp_path / "hf", tmp_path / "out", "meta") == 1


@pytest.mark.parametrize("key", ["rope_theta", "use_scaled_rope", "norm_eps"])
def test_a_wrong_setting_is_found(tmp_path: Path, monkeypatch, key: str) -> None:
    hf_folder(tmp_path / "hf", MODELS["llama3-tied"], torch.float32)
    right = foreign.meta_params

    def wrong(model) -> dict:
        params = right(model)
        params.pop(key)
        return params | ({"norm_eps": 0.01} if key == "norm_eps" else {})

    monkeypatch.setattr(foreign, "meta_params", wrong)
    assert run(tmp_path / "hf", tmp_path / "out", "meta") == 1


def test_a_copy_that_differs_between_ranks_is_found(tmp_path: Path) -> None:
    """Written right, then one rank's norm is changed: `verify` compares the copies by itself."""
    hf_folder(tmp_path / "hf", MHA)
    to(tmp_path / "hf", tmp_path / "meta", "meta", 2)
    path = tmp_path / "meta/consolidated.01.pth"
    held = torch.load(path, weights_only=True)
    held["layers.1.ffn_norm.weight"][5] += 1
    torch.save(held, path)
    from megallama.convert.convert import UnverifiedError

    with open_source(tmp_path / "hf") as a, open_source(tmp_path / "meta") as b:
        with pytest.raises(UnverifiedError, match="a norm is not the same on all tensor-parallel ranks"):
            compare_logits(a, b, "bf16")


def test_nothing_is_said_to_be_verified_when_logits_are_no_numbers(tmp_path: Path, capsys) -> None:
    from safetensors.torch import save_file

    tensors = hf_folder(tmp_path / "hf", GQA)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, tmp_path / "hf/model.safetensors", {"format": "pt"})
    assert run(tmp_path / "hf", tmp_path / "out", "megatron") == 1
    assert "the states after layer 1 of random tokens by nan" in capsys.readouterr().err
    assert TOLERANCE == 1e-4 and json.loads((tmp_path / "out.unverified/config.json").read_text())
