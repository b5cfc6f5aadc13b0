"""What the conversion tool refuses, with which words, and that nothing is left then."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megallama.cli import command
from megallama.convert import convert as convert_module
from megallama.convert import pth
from tests.checkpoint.states import make_config, make_manager, make_state, solo_shards
from tests.convert.formats import GQA, LLAMA3, MHA, hf_folder, megatron_ranks, meta_shards, to, write_ranks

main = command("convert")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def refused(tmp_path: Path, capsys) -> Callable[..., str]:
    """Convert and fail: the error's text. Only the source remains."""

    def run(source: Path, *arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main([str(source), str(tmp_path / "out"), *arguments]) == 2
        assert sorted(tmp_path.rglob("*")) == before
        output = capsys.readouterr()
        assert output.out == "" and output.err.startswith("error: ")
        return output.err

    return run


def megatron(tmp_path: Path, model=GQA, tp: int = 2, pp: int = 2, **change) -> Path:
    """Shards of which `change` is done to the tensors of one rank."""
    ranks = megatron_ranks(hf_folder(tmp_path / "hf", model), model, tp, pp, 256)
    for rank, edit in change.items():
        edit(ranks[rank])
    write_ranks(tmp_path / "mg", ranks, tmp_path / "hf")
    return tmp_path / "mg"


def meta(tmp_path: Path, ranks: int = 2, model=MHA) -> Path:
    hf_folder(tmp_path / "hf", model)
    return to(tmp_path / "hf", tmp_path / "meta", "meta", ranks)


# ---- options ----


@pytest.mark.parametrize(
    "arguments,text",
    [
        (["--to", "megatron", "--tp", "3"], "--tp=3 does not divide num_kv_heads=4, num_heads=8; use 2 or 4"),
        (["--to", "megatron", "--tp", "8"], "--tp=8 does not divide num_kv_heads=4; use 4"),
        (["--to", "megatron", "--pp", "3"], "--pp=3 does not divide num_layers=4; use 2 or 4"),
        (["--to", "meta", "--tp", "2"], "--tp=2 does not divide vocab_size=131; use 1"),
        (["--to", "hf", "--tp", "2"], "--tp=2 --pp=1: --to=hf has no ranks; --tp is for meta and megatron"),
        (["--to", "meta", "--pp", "2"], "--to=meta has no ranks; --tp is for meta and megatron, --pp for megatron"),
        (["--to", "megatron", "--tp", "0"], "--tp=0: use a number above 0"),
        (["--to", "hf", "--shard-gb", "-1"], "argument --shard-gb: -1 is no size; write a number above 0"),
        (["--to", "hf", "--context", "-1"], "--context=-1: use a number above 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(
    refused, tmp_path: Path, arguments: list[str], text: str
) -> None:
    hf_folder(tmp_path / "hf", GQA)
    assert text in refused(tmp_path / "hf", *arguments)


def test_a_target_that_exists_is_refused_and_not_touched(tmp_path: Path, capsys) -> None:
    hf_folder(tmp_path / "hf", GQA)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    assert main([str(tmp_path / "hf"), str(tmp_path / "out"), "--to", "hf"]) == 2
    assert f"{tmp_path}/out exists; give a new folder, or delete it first" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_source_that_is_none_is_refused(refused, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    assert f"{tmp_path}/nothing" in refused(tmp_path / "nothing", "--to", "hf")
    assert f"{tmp_path}/absent" in refused(tmp_path / "absent", "--to", "hf")
    (tmp_path / "nothing/config.json").write_text('{"model_type": "gpt2"}')
    assert "is not a LLaMA: model_type='gpt2'" in refused(tmp_path / "nothing", "--to", "hf")


def test_several_number_formats_need_a_choice(refused, tmp_path: Path) -> None:
    tensors = hf_folder(tmp_path / "hf", GQA)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, tmp_path / "hf/model.safetensors", {"format": "pt"})
    text = refused(tmp_path / "hf", "--to", "megatron")
    assert "mixes the number formats ['BF16', 'F32']; choose one with --dtype" in text
    more = "--to megatron --dtype fp32 --compare-logits".split()
    assert main([str(tmp_path / "hf"), str(tmp_path / "out"), *more]) == 0


def test_values_beyond_fp16_are_refused(refused, tmp_path: Path) -> None:
    tensors = hf_folder(tmp_path / "hf", GQA)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, tmp_path / "hf/model.safetensors", {"format": "pt"})
    text = refused(tmp_path / "hf", "--to", "hf", "--dtype", "fp16")
    assert "model.layers.1.mlp.up_proj.weight holds values that fp16 cannot; choose --dtype bf16 or fp32" in text


# ---- tensors ----


def test_every_missing_unknown_and_misshapen_tensor_of_a_rank_is_named(refused, tmp_path: Path) -> None:
    def edit(held: dict) -> None:
        del held["decoder.layers.1.mlp.linear_fc2.weight"]
        held["decoder.layers.1.mlp.linear_fc1.bias"] = torch.zeros(3)
        held["output_layer.weight"] = held["output_layer.weight"][1:].clone()

    text = refused(megatron(tmp_path, mp_rank_01_001=edit), "--to", "hf")
    for line in (
        "the tensors in {mg} are not those of the model:",
        "mp_rank_01_001/model.safetensors: missing: decoder.layers.1.mlp.linear_fc2.weight [64, 48]",
        "mp_rank_01_001/model.safetensors: unknown: decoder.layers.1.mlp.linear_fc1.bias [3]",
        "mp_rank_01_001/model.safetensors: output_layer.weight has shape [127, 64], the model needs [128, 64]",
    ):
        assert line.format(mg=tmp_path / "mg") in text


def test_every_missing_unknown_and_misshapen_tensor_of_metas_files_is_named(refused, tmp_path: Path) -> None:
    folder = meta(tmp_path)
    held = meta_shards(folder)[1]
    del held["layers.3.attention.wq.weight"]
    held["layers.0.feed_forward.w4.weight"] = torch.zeros(2, 2)
    held["layers.1.attention.wo.weight"] = torch.zeros(64, 31)
    held["norm.weight"] = torch.zeros(64, dtype=torch.int8)
    torch.save(held, folder / "consolidated.01.pth")
    text = refused(folder, "--to", "hf")
    for line in (
        "consolidated.01.pth: missing: layers.3.attention.wq.weight [32, 64]",
        "consolidated.01.pth: unknown: layers.0.feed_forward.w4.weight [2, 2]",
        "consolidated.01.pth: layers.1.attention.wo.weight has shape [64, 31], the model needs [64, 32]",
        "consolidated.01.pth: norm.weight has dtype torch.int8, not of",
    ):
        assert line in text


def test_unknown_tensors_of_a_hugging_face_folder_are_named(refused, tmp_path: Path) -> None:
    tensors = hf_folder(tmp_path / "hf", GQA)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(4)
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "hf/model.safetensors")
    text = refused(tmp_path / "hf", "--to", "megatron")
    assert "missing: model.norm.weight [64]" in text and "unknown: model.layers.0.self_attn.q_proj.bias [4]" in text


@pytest.mark.parametrize("key", ["decoder.final_layernorm.weight", "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"])
def test_norms_must_be_the_same_on_all_ranks(refused, tmp_path: Path, key: str) -> None:
    def edit(held: dict) -> None:
        held[key] = held[key].clone()
        held[key][7] += 0.5

    text = refused(megatron(tmp_path, mp_rank_01_001=edit), "--to", "hf")
    assert f"{key} of mp_rank_01_001/model.safetensors differs from {key} of mp_rank_00_001/model.safetensors" in text
    assert "these files are of different checkpoints" in text


def test_parts_of_several_number_formats_are_refused(refused, tmp_path: Path) -> None:
    key = "decoder.layers.0.mlp.linear_fc2.weight"
    folder = megatron(tmp_path, mp_rank_01_000=lambda held: held.update({key: held[key].float()}))
    text = refused(folder, "--to", "hf")
    assert "parts of model.layers.0.mlp.down_proj.weight have different number formats: ['BF16', 'F32']" in text


def test_missing_ranks_are_named(refused, tmp_path: Path) -> None:
    folder = megatron(tmp_path)
    (folder / "mp_rank_01_000").rename(folder / "kept")
    text = refused(folder, "--to", "hf")
    assert "holds mp_rank_00_000, mp_rank_00_001, mp_rank_01_001; it must hold mp_rank_00_000/" in text
    (folder / "kept").rename(folder / "mp_rank_01_000")
    (folder / "mp_rank_01_000/model.safetensors").unlink()
    assert "mp_rank_01_000/model.safetensors cannot be opened: No such file" in refused(folder, "--to", "hf")


def test_missing_consolidated_files_are_named(refused, tmp_path: Path) -> None:
    folder = meta(tmp_path, 4)
    (folder / "consolidated.01.pth").unlink()
    assert "it must hold ['consolidated.00.pth', 'consolidated.01.pth', 'consolidated.02.pth']" in refused(
        folder, "--to", "hf"
    )
    for path in folder.glob("*.pth"):
        path.unlink()
    assert "holds no consolidated.NN.pth; it must hold ['consolidated.00.pth']" in refused(folder, "--to", "hf")


# ---- params.json ----


@pytest.mark.parametrize(
    "content,text",
    [
        ("{", "params.json cannot be used: Expecting property name"),
        ("[]", "params.json cannot be used: "),
        ('{"dim": 64, "n_layers": 4, "n_heads": 8}', "this tool needs 'norm_eps'"),
        (
            '{"dim": 64, "n_layers": 4, "n_heads": 8, "norm_eps": 1e-5, "moe_args": {}}',
            "params.json is not that of a LLaMA 1, 2 or 3: this tool does not know 'moe_args'",
        ),
        ('{"dim": "wide", "n_layers": 4, "n_heads": 8, "norm_eps": 1e-5}', "params.json cannot be used: "),
    ],
)
def test_params_json_that_says_something_else_is_refused(refused, tmp_path: Path, content: str, text: str) -> None:
    folder = meta(tmp_path, 1)
    (folder / "params.json").write_text(content)
    assert text in refused(folder, "--to", "hf")


def test_what_metas_format_cannot_say_is_refused(refused, tmp_path: Path) -> None:
    hf_folder(tmp_path / "hf", MHA.model_copy(update={"head_dim": 16}))
    text = refused(tmp_path / "hf", "--to", "meta")
    assert "head_dim=16 times num_heads=8 is not hidden_size=64: Meta's format has no such model" in text
    scaling = LLAMA3.rope_scaling.model_copy(update={"high_freq_factor": 2.0})
    hf_folder(tmp_path / "b", LLAMA3.model_copy(update={"rope_scaling": scaling}))
    assert "model.rope_scaling high_freq_factor=2: Meta's code has only" in refused(tmp_path / "b", "--to", "meta")


# ---- files that harm, files that are damaged ----


class Evil:
    """Unpickled without restriction, this runs a program."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


@pytest.mark.parametrize("where", ["beside the tensors", "instead of them"])
def test_a_hostile_pickle_is_refused_and_does_not_run(refused, tmp_path: Path, where: str) -> None:
    folder = meta(tmp_path)
    evil = Evil(f"touch {tmp_path}/executed")
    torch.save({**meta_shards(folder)[1], "x": evil} if "beside" in where else evil, folder / "consolidated.01.pth")
    text = refused(folder, "--to", "hf")
    assert f"{folder}/consolidated.01.pth is refused: its pickle asks for more than tensors" in text
    assert not (tmp_path / "executed").exists()
    torch.load(folder / "consolidated.01.pth", weights_only=False)
    assert (tmp_path / "executed").exists()  # it does run where pickles are trusted


def test_a_pth_file_that_is_cut_short_or_something_else_is_refused(refused, tmp_path: Path) -> None:
    folder = meta(tmp_path)
    path = folder / "consolidated.00.pth"
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], whole[:10], b"", b"no zip" * 100):
        path.write_bytes(data)
        assert f"{path} " in refused(folder, "--to", "hf")
    torch.save([torch.zeros(3)], path)
    assert f"{path} is not a file of tensors by name" in refused(folder, "--to", "hf")


def test_a_safetensors_file_that_is_cut_short_is_refused(refused, tmp_path: Path) -> None:
    folder = megatron(tmp_path)
    path = folder / "mp_rank_00_001/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path}: tensor " in refused(folder, "--to", "hf")


def test_damage_of_a_step_folder_is_found_while_it_is_read(refused, tmp_path: Path) -> None:
    make_manager(tmp_path / "run", make_config(GQA)).save(1, solo_shards(make_state(GQA)), {})
    path = sorted((tmp_path / "run/step-00000001/model").glob("*.safetensors"))[1]
    data = bytearray(path.read_bytes())
    data[9000] ^= 4
    path.write_bytes(data)
    step = tmp_path / "run/step-00000001"
    assert f"{path} is damaged in block 2 (bytes 8192 to " in refused(step, "--to", "megatron")
    config = step / "model/config.json"
    config.write_bytes(config.read_bytes().replace(b"silu", b"gelu"))
    assert "config.json is damaged in block 0" in refused(step, "--to", "megatron")


# ---- full disks and interruptions ----


def test_a_disk_without_room_is_told_before_anything_is_written(refused, tmp_path: Path, monkeypatch) -> None:
    hf_folder(tmp_path / "hf", GQA)
    real = os.statvfs

    def little(path: object) -> os.statvfs_result:
        values = list(real(path))
        values[4] = 1  # f_bavail
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", little)
    for kind in ("megatron", "meta", "hf", "step"):
        assert "no space left in" in refused(tmp_path / "hf", "--to", kind)


@pytest.mark.parametrize("kind", ["megatron", "meta", "step"])
def test_a_disk_that_fills_up_meanwhile_leaves_nothing(refused, tmp_path: Path, monkeypatch, kind: str) -> None:
    hf_folder(tmp_path / "hf", GQA)
    real, calls = os.pwrite, []

    def full(fd: int, data: bytes, offset: int) -> int:
        calls.append(fd)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    assert "no space left in" in refused(tmp_path / "hf", "--to", kind)


def test_a_disk_that_is_full_when_a_pth_file_is_packed_leaves_nothing(refused, tmp_path: Path, monkeypatch) -> None:
    hf_folder(tmp_path / "hf", GQA)

    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file data/3")

    monkeypatch.setattr(pth.torch, "save", full)
    text = refused(tmp_path / "hf", "--to", "meta")
    assert "consolidated.00.pth cannot be written, is the disk full? [enforce fail" in text


def test_a_folder_that_cannot_be_written_is_named(refused, tmp_path: Path, monkeypatch, capsys) -> None:
    hf_folder(tmp_path / "hf", GQA)
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "hf"), str(tmp_path / "file/out"), "--to", "megatron"]) == 2
    assert f"error: {tmp_path}/file" in capsys.readouterr().err


def test_an_interrupted_conversion_leaves_nothing_and_a_killed_one_is_cleared_away(tmp_path: Path, monkeypatch) -> None:
    hf_folder(tmp_path / "hf", GQA)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "_write_rows", interrupted)
        assert main([str(tmp_path / "hf"), str(tmp_path / "out"), "--to", "hf"]) == 130
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    for kind, names in (
        ("megatron", {"config.json", "generation_config.json", "mp_rank_00"}),
        ("step", {"step-00000000", "latest"}),
    ):
        (tmp_path / f"{kind}.megallama-unfinished/mp_rank_01").mkdir(parents=True)  # of a process that was killed
        assert main([str(tmp_path / "hf"), str(tmp_path / kind), "--to", kind]) == 0
        assert {p.name for p in (tmp_path / kind).iterdir()} == names
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "megatron", "step"]


def test_it_runs_as_a_program(tmp_path: Path) -> None:
    tensors = hf_folder(tmp_path / "hf", GQA)
    command = [sys.executable, str(ROOT / "tools/reshard_checkpoint.py"), str(tmp_path / "hf"), str(tmp_path / "out")]
    more = ["--to", "megatron", "--tp", "2", "--compare-logits"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    first, second, third = done.stdout.splitlines()
    count = sum(t.numel() for t in tensors.values())
    assert first == f"{tmp_path}/hf (hf, {count:,} parameters) -> {tmp_path}/out (megatron, bf16)"
    assert second.startswith("verified: logits of random tokens differ by at most ") and " bytes, " in third
    held = load_file(tmp_path / "out/mp_rank_01/model.safetensors")
    assert held["decoder.layers.3.mlp.linear_fc1.weight"].shape == (96, 64)
    assert json.loads((tmp_path / "out/config.json").read_text())["hidden_size"] == 64
