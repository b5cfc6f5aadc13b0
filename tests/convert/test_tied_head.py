"""A config.json that calls the head tied, beside a head that is not the embedding: nothing is dropped unsaid."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megallama.checkpoint.disk import CheckpointError
from megallama.cli import command
from megallama.convert.compare_logits import _second_reading
from megallama.inference.generate import load_llama
from tests.checkpoint.states import assert_holds, empty_solo, make_config, make_manager
from tests.convert.formats import (
    LLAMA3,
    MHA,
    MODELS,
    Tensors,
    hf_folder,
    megatron_ranks,
    meta_shards,
    read_hf,
    write_ranks,
)

main = command("convert")
TIED = MHA.model_copy(update={"tie_embeddings": True})
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
NOTE = "is not the embedding, though config.json says tie_word_embeddings=true; it is"


def folder_with_head(folder: Path, change: str = "other") -> Tensors:
    """A folder that says it is tied, with a head in its file; its tensors."""
    tensors = hf_folder(folder, TIED)
    head = tensors[EMBEDDING].clone()
    if change == "one bit":
        head.view(torch.int16)[-1, -1] ^= 1
    elif change == "other":
        head = torch.randn(head.shape, generator=torch.Generator().manual_seed(9)).to(head.dtype)
    tensors[HEAD] = head
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def tied(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text()).get("tie_word_embeddings", False)


@pytest.mark.parametrize("change", ["other", "one bit"])
@pytest.mark.parametrize("kind", ["hf", "megatron", "meta", "step"])
def test_another_head_is_kept_and_said(tmp_path: Path, capsys, kind: str, change: str) -> None:
    tensors = folder_with_head(tmp_path / "hf", change)
    ranks = {"megatron": ["--tp", "2", "--pp", "2"], "meta": ["--tp", "2"]}.get(kind, [])
    assert main([str(tmp_path / "hf"), str(tmp_path / "out"), "--to", kind, "--compare-logits", *ranks]) == 0
    output = capsys.readouterr()
    assert output.err.count(f"{tmp_path / 'hf'}: lm_head.weight {NOTE} kept, as a head of its own\n") == 1
    assert ", from transformers's for the source" in output.out
    assert main([str(tmp_path / "out"), str(tmp_path / "back"), "--to", "hf", "--compare-logits"]) == 0
    assert NOTE not in capsys.readouterr().err
    found = read_hf(tmp_path / "back")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert not tied(tmp_path / "back")


def test_the_same_bits_are_tied_and_nothing_is_said(tmp_path: Path, capsys) -> None:
    tensors = folder_with_head(tmp_path / "hf", "none")
    assert main([str(tmp_path / "hf"), str(tmp_path / "out"), "--to", "hf", "--compare-logits"]) == 0
    assert capsys.readouterr().err == "" and tied(tmp_path / "out")
    assert read_hf(tmp_path / "out").keys() == tensors.keys() - {HEAD}


@pytest.mark.parametrize("kind", ["hf", "meta"])
def test_asked_for_it_is_left_out_and_said(tmp_path: Path, capsys, kind: str) -> None:
    tensors = folder_with_head(tmp_path / "hf")
    arguments = [str(tmp_path / "hf"), str(tmp_path / "out"), "--to", kind, "--head", "tied", "--compare-logits"]
    assert main(arguments) == 0
    assert f"lm_head.weight {NOTE} left out\n" in capsys.readouterr().err
    if kind == "meta":
        (held,) = meta_shards(tmp_path / "out")
        assert torch.equal(held["output.weight"], tensors[EMBEDDING])
    else:
        assert read_hf(tmp_path / "out").keys() == tensors.keys() - {HEAD} and tied(tmp_path / "out")


@pytest.mark.parametrize("source", ["hf", "meta", "step"])
def test_a_head_that_is_not_called_tied_is_never_left_out(tmp_path: Path, capsys, source: str) -> None:
    hf_folder(tmp_path / "hf", MHA)
    if source != "hf":
        assert main([str(tmp_path / "hf"), str(tmp_path / source), "--to", source]) == 0
    assert main([str(tmp_path / source), str(tmp_path / "out"), "--to", "hf", "--head", "tied"]) == 2
    assert "does not say that its head is tied; leave the option out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def megatron(tmp_path: Path, pp: int, change: float | None) -> tuple[Path, Tensors]:
    """Shards that are called tied, each with an output_layer, of which one element is changed; the tensors."""
    tensors = hf_folder(tmp_path / "hf", LLAMA3)
    head = tensors[EMBEDDING].clone()
    if change is not None:
        head[155, 3] = change
    untied = LLAMA3.model_copy(update={"tie_embeddings": False})
    ranks = megatron_ranks(tensors | {HEAD: head}, untied, 2, pp, 256)
    write_ranks(tmp_path / "mg", ranks, tmp_path / "hf")
    return tmp_path / "mg", tensors | {HEAD: head}


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("change", [None, 9.0])
@pytest.mark.parametrize("head", ["auto", "tied"])
def test_megatron_shards(tmp_path: Path, capsys, pp: int, change: float | None, head: str) -> None:
    folder, tensors = megatron(tmp_path, pp, change)
    assert main([str(folder), str(tmp_path / "out"), "--to", "hf", "--head", head, "--compare-logits"]) == 0
    output, kept = capsys.readouterr().err, change is not None and head == "auto"
    assert (f"output_layer.weight {NOTE} kept, as a head of its own" in output) == kept
    assert (f"output_layer.weight {NOTE} left out" in output) == (change is not None and head == "tied")
    found = read_hf(tmp_path / "out")
    assert tied(tmp_path / "out") != kept and (HEAD in found) == kept
    assert not kept or torch.equal(found[HEAD], tensors[HEAD])


def test_a_head_of_another_size_is_named(tmp_path: Path, capsys) -> None:
    tensors = folder_with_head(tmp_path / "hf")
    save_file(tensors | {HEAD: tensors[HEAD][:-1].clone()}, tmp_path / "hf/model.safetensors")
    assert main([str(tmp_path / "hf"), str(tmp_path / "out"), "--to", "hf"]) == 2
    assert "lm_head.weight has shape [159, 64], the model needs [160, 64]" in capsys.readouterr().err


def test_a_run_that_starts_from_such_weights(tmp_path: Path) -> None:
    tensors = folder_with_head(tmp_path / "hf")
    log: list[str] = []
    shards = empty_solo(MHA)
    make_manager(tmp_path / "a", make_config(MHA), log=log.append).load_weights(tmp_path / "hf", shards)
    zeros = {name: torch.zeros(tensor.shape) for name, tensor in tensors.items()}
    assert_holds(shards, {"master": {n: t.float() for n, t in tensors.items()}, "exp_avg": zeros, "exp_avg_sq": zeros})
    assert len(log) == 1 and f"lm_head.weight {NOTE} kept, as a head of its own" in log[0]
    refused = r"model.tie_embeddings=true, but .* has a lm_head.weight that is not its embedding; write model.tie_em"
    with pytest.raises(CheckpointError, match=refused):
        make_manager(tmp_path / "b", make_config(TIED)).load_weights(tmp_path / "hf", empty_solo(TIED))
    hf_folder(tmp_path / "untied", MHA)
    with pytest.raises(CheckpointError, match=refused):  # called untied: dropped with a warning it would be another one
        make_manager(tmp_path / "c", make_config(TIED)).load_weights(tmp_path / "untied", empty_solo(TIED))
    folder_with_head(tmp_path / "same", "none")
    make_manager(tmp_path / "d", make_config(TIED)).load_weights(tmp_path / "same", empty_solo(TIED))


def test_text_is_made_with_the_head_of_the_file(tmp_path: Path) -> None:
    tensors = folder_with_head(tmp_path / "hf")
    llama = load_llama(tmp_path / "hf")
    assert torch.equal(llama.head, tensors[HEAD]) and len(llama.notes) == 1 and NOTE in llama.notes[0]
    assert llama.model.tie_embeddings is False


def test_verification_sees_a_head_that_was_dropped(tmp_path: Path, monkeypatch, capsys) -> None:
    folder_with_head(tmp_path / "hf")
    monkeypatch.setattr("megallama.checkpoint.reader.equal_rows", lambda *_: True)
    assert main([str(tmp_path / "hf"), str(tmp_path / "out"), "--to", "hf", "--compare-logits"]) == 1
    assert "differently: logits of random tokens by" in capsys.readouterr().err


def test_verification_has_a_second_reader_where_transformers_is_not(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    hf_folder(tmp_path / "hf", MHA)
    assert main([str(tmp_path / "hf"), str(tmp_path / "out"), "--to", "hf", "--compare-logits"]) == 0
    assert "of the largest, from a second reader's for the source, from a second" in capsys.readouterr().out
    folder_with_head(tmp_path / "tied")
    monkeypatch.setattr("megallama.checkpoint.reader.equal_rows", lambda *_: True)
    assert main([str(tmp_path / "tied"), str(tmp_path / "lost"), "--to", "hf", "--verify"]) == 1
    output = f"a second reader and megallama read {tmp_path / 'tied'} differently: logits of random tokens by"
    assert output in capsys.readouterr().err


@pytest.mark.parametrize("model", MODELS)
def test_the_second_reader_is_right(tmp_path: Path, model: str) -> None:
    transformers = pytest.importorskip("transformers")
    hf_folder(tmp_path / "hf", MODELS[model], torch.float32, files=2)
    tokens = torch.arange(20) * 6
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        want = theirs(tokens[None]).logits[0]
        found, head = _second_reading(tmp_path / "hf", tokens, torch.float32)
    assert (found - want).abs().max() < 1e-5 * want.abs().max()
    assert head == ("model.embed_tokens" if MODELS[model].tie_embeddings else "lm_head")


def test_verification_finds_a_setting_that_both_sides_miss(tmp_path: Path, monkeypatch, capsys) -> None:
    hf_folder(tmp_path / "hf", MHA)
    from megallama.convert import source

    right = source.read_model_config
    wrong = {"rope_theta": 200.0}
    monkeypatch.setattr(source, "read_model_config", lambda folder: right(folder).model_copy(update=wrong))
    assert main([str(tmp_path / "hf"), str(tmp_path / "out"), "--to", "hf", "--compare-logits"]) == 1
    assert f"megallama read {tmp_path / 'hf'} differently: logits of random tokens" in capsys.readouterr().err


def test_a_folder_of_several_files_is_looked_at_too(tmp_path: Path, capsys) -> None:
    tensors = hf_folder(tmp_path / "hf", TIED, files=3)
    save_file({HEAD: tensors[EMBEDDING] + 1}, tmp_path / "hf/head.safetensors")
    index = tmp_path / "hf/model.safetensors.index.json"
    held = json.loads(index.read_text())
    held["weight_map"][HEAD] = "head.safetensors"
    index.write_text(json.dumps(held))
    assert main([str(tmp_path / "hf"), str(tmp_path / "out"), "--to", "hf", "--compare-logits"]) == 0
    assert "kept, as a head of its own" in capsys.readouterr().err
    assert torch.equal(read_hf(tmp_path / "out")[HEAD], load_file(tmp_path / "hf/head.safetensors")[HEAD])
