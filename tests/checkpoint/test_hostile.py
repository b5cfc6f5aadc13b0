"""A checkpoint folder from elsewhere: nothing outside it is read or copied, nothing hangs or fills the memory."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megallama.checkpoint import manifest
from megallama.checkpoint.disk import CheckpointError
from megallama.cli import command
from megallama.convert.source import open_source
from megallama.inference.generate import load_llama
from tests.checkpoint.states import MODEL, empty_solo, make_config, make_manager, make_state, solo_shards
from tests.convert.formats import to

reshard = command("convert")
generate = command("generate")
inspect = command("inspect")
SECRET = "password of root"


@pytest.fixture
def step(tmp_path: Path) -> Path:
    make_manager(tmp_path / "run", make_config()).save(1, solo_shards(make_state()), {})
    return tmp_path / "run/step-00000001"


@pytest.fixture
def hf(step: Path, tmp_path: Path) -> Path:
    shutil.copytree(step / "model", tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture(autouse=True)
def limits() -> Iterator[None]:
    """30 seconds and 4 GB more of address space than now."""

    def hung(*_: object) -> None:
        raise AssertionError("it hangs")

    old = signal.signal(signal.SIGALRM, hung)
    signal.alarm(30)
    most = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), most[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, most)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


def refused(folder: Path, capsys: pytest.CaptureFixture[str], what: str = "", *, weights: bool = True) -> str:
    """What every reader says to a folder: one message that names it, no traceback, nothing written."""
    out = folder.parent / "out"
    tools: list[Callable[[], int]] = [lambda: generate([str(folder), "--max-tokens", "1"])]
    tools += [lambda kind=kind: reshard([str(folder), str(out), "--to", kind]) for kind in ("hf", "meta", "step")]
    texts = []
    for tool in tools:
        assert tool() == 2
        texts.append(capsys.readouterr().err)
        assert texts[-1].startswith("error: ") and "Traceback" not in texts[-1] and SECRET not in texts[-1]
    assert not out.exists()
    if weights:  # a training run reads them by its own configuration
        with pytest.raises(CheckpointError):
            make_manager(folder.parent / "new", make_config()).load_weights(folder, empty_solo())
    with pytest.raises(CheckpointError) as error:
        load_llama(folder)
    assert what in texts[1], texts
    return str(error.value)


def rename_in_index(hf: Path, name: object) -> None:
    index = hf / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(found))


# ---- names ----


@pytest.mark.parametrize("name", ["../secret", "/dev/zero", "a/b", "", ".", "..", "x\x00y", 7, None, ["a"], {"a": 1}])
def test_an_index_names_files_of_its_own_folder_only(hf: Path, capsys, name: object) -> None:
    (hf.parent / "secret").write_text(SECRET)
    rename_in_index(hf, name)
    assert "it must name files of its own folder" in refused(hf, capsys, "model.safetensors.index.json names ")


@pytest.mark.parametrize("content", ["[1]", "{}", '{"weight_map": [1]}', '{"weight_map": "x"}', "[" * 100_000, "\xff"])
def test_an_index_of_another_form_is_refused(hf: Path, capsys, content: str) -> None:
    (hf / "model.safetensors.index.json").write_text(content)
    refused(hf, capsys, "model.safetensors.index.json")


def test_a_tensor_in_two_files_is_refused(hf: Path, capsys) -> None:
    name = next(hf.glob("model-00001-*")).name
    shutil.copy(hf / name, hf / "again.safetensors")
    rename_in_index(hf, "again.safetensors")
    refused(hf, capsys, "both hold ")


@pytest.mark.parametrize("name", ["model/../../../secret", "/etc/passwd", "secret", "optimizer/..", "model/a/b"])
def test_a_manifest_names_files_of_its_own_folder_only(step: Path, capsys, name: str) -> None:
    files = {**manifest.read_manifest(step).body["files"], name: {"size": 16, "digest": "0", "blocks": ["0"]}}
    rewrite(step, files=files)
    refused(step, capsys, "is not one that this program writes: files.")


# ---- what is not a file ----


def occupy(path: Path, what: str) -> None:
    path.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as held:
            held.bind(str(path))
    else:
        path.symlink_to(path.name)


@pytest.mark.parametrize("what", ["pipe", "folder", "device", "socket", "a link to itself"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "weights", "tokenizer.json"])
def test_what_is_no_file_never_hangs_a_reader(hf: Path, capsys, monkeypatch, what: str, name: str) -> None:
    monkeypatch.chdir(hf)
    path = Path(next(hf.glob("model-00002-*")).name if name == "weights" else name)
    occupy(path, what)
    if name == "tokenizer.json":  # only a conversion looks at it
        assert reshard([str(hf), str(hf.parent / "out"), "--to", "hf"]) == 2
        assert "tokenizer.json" in capsys.readouterr().err and not (hf.parent / "out").exists()
    else:
        refused(hf, capsys, path.name)


@pytest.mark.parametrize("what", ["pipe", "folder", "device"])
@pytest.mark.parametrize("name", ["manifest.json", "model/config.json"])
def test_nor_in_a_step_folder(step: Path, capsys, monkeypatch, what: str, name: str) -> None:
    occupy(step / name, what)
    assert inspect([str(step), "--verify"]) in (1, 2)
    output = capsys.readouterr()
    assert f"{step / name} is not a regular file" in output.out + output.err
    assert reshard([str(step), str(step.parent / "out"), "--to", "hf"]) == 2
    assert f"{step / name} is not a regular file" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["pipe", "folder", "device"])
@pytest.mark.parametrize("name", ["params.json", "consolidated.00.pth", "tokenizer.model"])
def test_nor_in_metas_release(hf: Path, tmp_path: Path, capsys, what: str, name: str) -> None:
    folder = to(hf, tmp_path / "meta", "meta")
    occupy(folder / name, what)
    assert reshard([str(folder), str(tmp_path / "out"), "--to", "hf"]) == 2
    assert name in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---- links ----


def test_weights_may_be_links_as_in_a_hugging_face_cache(hf: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--some--llama"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots/abc").mkdir(parents=True)
    (hf / "tokenizer_config.json").write_text('{"a": 1}')
    for i, path in enumerate(sorted(hf.iterdir())):
        shutil.copy(path, repository / f"blobs/{i}")
        (repository / "snapshots/abc" / path.name).symlink_to(f"../../blobs/{i}")
    assert reshard([str(repository / "snapshots/abc"), str(tmp_path / "out"), "--to", "hf"]) == 0
    assert (tmp_path / "out/tokenizer_config.json").read_text() == '{"a": 1}'
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("kind", ["hf", "meta", "step"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_link_out_of_the_folder_is_not_copied_into_a_result(
    hf: Path, tmp_path: Path, capsys, kind: str, name: str
) -> None:
    (tmp_path / "shadow").write_text(SECRET)
    (hf / name).symlink_to("../shadow")
    assert reshard([str(hf), str(tmp_path / "out"), "--to", kind]) == 2
    assert f"{hf / name} is a link to {tmp_path / 'shadow'}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nor_from_the_blobs_of_another_repository(hf: Path, tmp_path: Path) -> None:
    for name in ("models--a--b", "models--c--d"):
        (tmp_path / name / "blobs").mkdir(parents=True)
        (tmp_path / name / "blobs/1").write_text(SECRET)
    shutil.copytree(hf, tmp_path / "models--a--b/snapshots/abc")
    (tmp_path / "models--a--b/snapshots/abc/tokenizer.json").symlink_to("../../../models--c--d/blobs/1")
    with pytest.raises(CheckpointError, match="is a link to"):
        open_source(tmp_path / "models--a--b/snapshots/abc")


def test_only_known_names_are_copied_into_a_result(hf: Path, tmp_path: Path) -> None:
    (hf / "tokenizer_extra.json").symlink_to("/etc/shadow")
    (hf / "tokenizer.pem").write_text(SECRET)
    assert reshard([str(hf), str(tmp_path / "out"), "--to", "hf"]) == 0
    assert not {p.name for p in (tmp_path / "out").iterdir()} & {"tokenizer_extra.json", "tokenizer.pem"}


# ---- sizes ----


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**15},
        {"hidden_size": 10**12, "head_dim": 8},
        {"num_hidden_layers": "many"},
        {"rope_parameters": 7},
        {"rope_scaling": [1]},
        {"num_attention_heads": 0},
    ],
)
def test_an_absurd_configuration_is_refused_at_once(hf: Path, capsys, change: dict[str, Any]) -> None:
    path = hf / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(hf, capsys, weights=False)


@pytest.mark.parametrize("content", ["[]", "7", '"x"', "[" * 100_000, '{"a":' * 100_000, "1" * 10_000, ""])
def test_a_configuration_that_is_no_object_is_refused(hf: Path, capsys, content: str) -> None:
    (hf / "config.json").write_text(content)
    refused(hf, capsys, f"{hf / 'config.json'} cannot be used")


def test_a_giant_configuration_is_not_read(hf: Path, capsys) -> None:
    with (hf / "config.json").open("r+b") as file:
        file.truncate(1 << 40)
    refused(hf, capsys, "has 1,099,511,627,776 bytes; a file of this kind has at most 25,000,000")


@pytest.mark.parametrize("longest", [10**12, -1, "long", None, [1]])
def test_an_absurd_context_fills_no_memory(hf: Path, capsys, longest: object) -> None:
    path = hf / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": longest}))
    shutil.copy(Path(__file__).parents[1] / "frozen/v1/data/tokenizer.json", hf)
    assert generate([str(hf), "--max-tokens", "1"]) == 2
    assert "write the longest sequence" in capsys.readouterr().err


def entry(shape: object, offsets: object, dtype: object = "BF16") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry([10**9, 10**9], [0, 2 * 10**18])},
        {"a": entry([4], [-8, 0])},
        {"a": entry([4], [8, 0])},
        {"a": entry([-4], [0, -8])},
        {"a": entry([4], [0, 9])},
        {"a": entry([4], [0, 8]), "b": entry([4], [4, 12])},
        {"a": entry([2] * 100_000, [0, 8])},
        {"a": entry("four", [0, 8])},
        {"a": entry([4], [0])},
        {"a": entry([4], [0, 8], ["BF16"])},
        {"a": entry([4.0], [0, 8])},
        {"a": 7},
        [1, 2],
    ],
)
def test_a_header_that_lies_is_refused(hf: Path, capsys, header: Any) -> None:
    text = json.dumps(header).encode()
    path = next(hf.glob("model-00002-*"))
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    refused(hf, capsys, path.name)


@pytest.mark.parametrize("length", [0, 1 << 39, (1 << 64) - 1])
def test_a_header_of_absurd_length_is_not_read(hf: Path, capsys, length: int) -> None:
    path = next(hf.glob("model-00002-*"))
    path.write_bytes(length.to_bytes(8, "little"))
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # as long as it says, and empty
    refused(hf, capsys, path.name)


def rewrite(step: Path, **changes: Any) -> None:
    body = json.loads((step / "manifest.json").read_bytes())
    body.pop("digest")
    body |= changes
    (step / "manifest.json").write_bytes(manifest.render({k: v for k, v in body.items() if v is not ...}))


@pytest.mark.parametrize(
    "changes",
    [
        {"shard_bytes": 1},
        {"shard_bytes": -5},
        {"precision": "int3"},
        {"block_bytes": 1 << 44},
        {"block_bytes": 0},
        {"sequence": ...},
        {"sequence": "last"},
        {"counters": ...},
        {"line": 7},
        {"files": []},
        {"files": {}},
        {"files": {"model/a": {"size": 1 << 60, "digest": "0", "blocks": []}}},
        {"architecture": {}},
        {"architecture": {**MODEL.model_dump(mode="json"), "num_layers": 10**9}},
        {"architecture": {**MODEL.model_dump(mode="json"), "vocab_size": 10**15}},
        {"versions": [1]},
        {"format": "x", "versions": [1]},
    ],
)
def test_a_manifest_of_absurd_values_is_refused(step: Path, capsys, changes: dict[str, Any]) -> None:
    """With a digest that fits: it was made, not damaged, so nothing is renamed."""
    rewrite(step, **changes)
    text = refused(step, capsys)
    assert str(step) in text
    assert inspect([str(step), "--verify"]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(CheckpointError):
        make_manager(step.parent, make_config()).resume(empty_solo())
    assert step.is_dir()


def test_a_manifest_nested_too_deeply_is_damaged(step: Path) -> None:
    (step / "manifest.json").write_bytes(b"[" * 200_000)
    with pytest.raises(CheckpointError, match="none is usable"):
        make_manager(step.parent, make_config()).resume(empty_solo())
    assert step.with_name(step.name + ".damaged").is_dir()


@pytest.mark.parametrize(
    "names", [["mp_rank_999999999"], ["mp_rank_00", "mp_rank_99999_99999"], ["mp_rank_x"], ["mp_rank_" + "9" * 200]]
)
def test_rank_folders_of_absurd_numbers_are_refused(hf: Path, capsys, names: list[str]) -> None:
    for name in names:
        (hf / name).mkdir()
    assert reshard([str(hf), str(hf.parent / "out"), "--to", "hf"]) == 2
    output = capsys.readouterr().err
    assert "it must hold mp_rank_00" in output and len(output) < 5000


@pytest.mark.parametrize("change", [{"n_layers": 10**9}, {"n_heads": 0}, {"dim": 10**15}, {"vocab_size": 10**15}])
def test_absurd_params_of_metas_release_are_refused(hf: Path, tmp_path: Path, capsys, change: dict[str, int]) -> None:
    folder = to(hf, tmp_path / "meta", "meta")
    path = folder / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert reshard([str(folder), str(tmp_path / "out"), "--to", "hf"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("what", ["expanded", "sparse", "without data"])
def test_tensors_larger_than_their_pth_file_are_refused(hf: Path, tmp_path: Path, capsys, what: str) -> None:
    folder = to(hf, tmp_path / "meta", "meta")
    path = folder / "consolidated.00.pth"
    held = torch.load(path, weights_only=True)
    wrong = {
        "expanded": torch.zeros(1).expand(1 << 20, 1 << 20),
        "sparse": torch.zeros(4, 4).to_sparse(),
        "without data": torch.empty(1 << 20, 1 << 20, device="meta"),
    }
    torch.save(held | {"tok_embeddings.weight": wrong[what]}, path)
    assert reshard([str(folder), str(tmp_path / "out"), "--to", "hf"]) == 2
    assert str(path) in capsys.readouterr().err


def test_a_sound_folder_passes_all_this(hf: Path, step: Path, tmp_path: Path) -> None:
    assert load_llama(hf).model == load_llama(step).model
    assert reshard([str(hf), str(tmp_path / "out"), "--to", "meta"]) == 0
