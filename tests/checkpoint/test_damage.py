"""No damaged byte is ever used: it is named, the folder quarantined, the checkpoint before it loaded."""

from __future__ import annotations

import json
import random
import re
import shutil
from contextlib import closing
from pathlib import Path

import pytest

from megallama.checkpoint import folder as folders
from megallama.checkpoint import manifest
from megallama.checkpoint.disk import CheckpointError, DamagedError, UnreadableError
from megallama.checkpoint.reader import BlockFile, verify_blocks
from megallama.cli import command
from megallama.plan.topology import Topology
from tests.checkpoint.states import (
    MODEL,
    assert_holds,
    boxes,
    empty,
    empty_solo,
    make_config,
    make_manager,
    make_state,
    on_grid,
    save_on,
    solo_shards,
)

inspect = command("inspect")


OLD, NEW = make_state(seed=1), make_state(seed=2)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two checkpoints, steps 1 and 2."""
    manager = make_manager(tmp_path, make_config())
    manager.save(1, solo_shards(OLD), {"step": 1})
    manager.save(2, solo_shards(NEW), {"step": 2})
    return tmp_path


def resume(folder: Path, **more) -> tuple[int, list[str]]:
    """(step resumed from, log); the state is that of the step, bitwise."""
    log: list[str] = []
    shards = empty_solo()
    counters = make_manager(folder, make_config(**more), log=log.append).resume(shards)
    assert counters is not None
    assert_holds(shards, {1: OLD, 2: NEW}[counters["step"]])
    return counters["step"], log


def files(step: Path) -> list[Path]:
    return sorted(p for p in step.rglob("*") if p.is_file())


def test_intact_folder_resumes_the_newest(folder: Path) -> None:
    assert resume(folder) == (2, [])


def test_every_flipped_bit_is_found_and_its_block_named(folder: Path) -> None:
    step, dice = folder / "step-00000002", random.Random(0)
    sizes = {path: path.stat().st_size for path in files(step)}
    positions = [(path, at) for path, size in sizes.items() for at in (0, size - 1)]
    chosen = dice.choices(list(sizes), list(sizes.values()), k=150)
    positions += [(path, dice.randrange(sizes[path])) for path in chosen]
    for path, at in positions:
        data = bytearray(path.read_bytes())
        data[at] ^= 1 << dice.randrange(8)
        original = path.read_bytes()
        path.write_bytes(data)
        found, log = resume(folder)
        path_text = re.escape(str(path))
        where = path_text if path.name == manifest.NAME else rf"{path_text} is damaged in block {at // 4096} "
        only_weights = path.parent.name == "model"  # which a resume does not need
        assert found == (2 if only_weights else 1) and len(log) == 1 and re.search(where, log[0]), (path, at, log)
        if not only_weights:
            assert log[0].endswith("quarantined as step-00000002.damaged")
            (folder / "step-00000002.damaged").rename(step)
        path.write_bytes(original)
    assert resume(folder) == (2, [])


def cut(keep: float | int):
    def damage(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep)] if isinstance(keep, float) else data[:keep])

    return damage


def zero_tail(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100] + bytes(100))


@pytest.mark.parametrize("damage", [cut(0), cut(-1), cut(0.5), zero_tail, Path.unlink])
@pytest.mark.parametrize("name", ["optimizer/exp_avg-00001", "manifest"])
def test_truncated_missing_and_zeroed_files(folder: Path, name: str, damage) -> None:
    (path,) = (folder / "step-00000002").glob(name + "*")
    damage(path)
    found, log = resume(folder)
    assert found == 1 and len(log) == 1 and path.name in log[0]
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-00000001", "step-00000002.damaged"]


@pytest.mark.parametrize("damage", [cut(0), cut(-1), cut(0.5), zero_tail, Path.unlink])
@pytest.mark.parametrize("name", ["model/model-00002", "model/config"])
def test_damage_in_the_weights_is_named_and_does_not_cost_the_step(folder: Path, name: str, damage) -> None:
    (path,) = (folder / "step-00000002").glob(name + "*")
    damage(path)
    log: list[str] = []
    manager, shards = make_manager(folder, make_config(), log=log.append), empty_solo()
    assert manager.resume(shards) == {"step": 2}
    assert_holds(shards, NEW)
    assert len(log) == 1 and str(path) in log[0]
    assert f"the weights in {path.parent} are not to be used. The training state is whole" in log[0]
    manager.save(3, shards, {"step": 3})
    assert there(folder) == [2, 3]
    assert make_manager(folder, make_config()).load(folder / "step-00000003", empty_solo()) == {"step": 3}
    assert inspect([str(folder), "--verify"]) == 0 and inspect([str(folder / "step-00000002"), "--verify"]) == 1


def test_weights_moved_away_by_hand_do_not_cost_the_step(folder: Path, tmp_path_factory, capsys) -> None:
    shutil.move(folder / "step-00000002/model", tmp_path_factory.mktemp("elsewhere"))
    found, log = resume(folder)
    assert found == 2 and len(log) == 1 and "step-00000002/model/config.json cannot be opened: No such file" in log[0]
    assert inspect([str(folder), "--verify"]) == 1
    assert "the training state is whole: a run resumes from it, and its next save writes model/ again" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("source", ["step-00000002/optimizer/exp_avg_sq", "step-00000001/optimizer/exp_avg"])
def test_a_file_in_another_ones_place(folder: Path, source: str) -> None:
    """Of the same size, header and names, valid on its own."""
    (path,) = (folder / "step-00000002/optimizer").glob("exp_avg-00001*")
    (other,) = folder.glob(source + "-00001*")
    assert other.stat().st_size == path.stat().st_size
    shutil.copy(other, path)
    found, log = resume(folder)
    assert found == 1 and f"{path} is damaged in block" in log[0]


def there(folder: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in folder.glob("step-*"))


def test_a_whole_foreign_manifest_is_no_cover(folder: Path) -> None:
    shutil.copy(folder / "step-00000001/manifest.json", folder / "step-00000002/manifest.json")
    found, log = resume(folder)
    assert found == 1 and "is damaged in block" in log[0]


def test_hint_file_is_only_a_hint(folder: Path) -> None:
    assert (folder / "latest").read_text() == "step-00000002\n"
    for content in (b"", b"\xff\x00", b"step-00000099\n", b"step-00000001\n"):
        (folder / "latest").write_bytes(content)
        assert resume(folder) == (2, [])
    (folder / "latest").unlink()
    assert resume(folder) == (2, [])


def test_no_usable_checkpoint_never_means_random_weights(folder: Path) -> None:
    for step in (1, 2):
        next((folder / f"step-0000000{step}/optimizer").glob("master-00002*")).unlink()
    for _ in range(2):  # the second time both are already quarantined
        with pytest.raises(CheckpointError, match=r"(?s)none is usable:.*step-00000001.*checkpoint.resume=fresh"):
            resume(folder)
    assert make_manager(folder, make_config(resume="fresh")).resume(empty_solo()) is None


def test_damage_found_while_reading_in_all_checkpoints(folder: Path) -> None:
    for step in (1, 2):
        zero_tail(next((folder / f"step-0000000{step}/optimizer").glob("master-00002*")))
    with pytest.raises(CheckpointError, match=r"(?s)none is usable:.*step-00000001.damaged.*step-00000002.damaged"):
        resume(folder)


def test_damage_is_quarantined_again_under_another_name(folder: Path) -> None:
    shutil.copytree(folder / "step-00000002", folder / "step-00000002.damaged")
    (folder / "step-00000002/manifest.json").unlink()
    assert resume(folder)[0] == 1
    assert (folder / "step-00000002.damaged-2").is_dir()


def test_empty_folder(tmp_path) -> None:
    assert make_manager(tmp_path, make_config(resume="auto")).resume([]) is None
    assert make_manager(tmp_path / "absent", make_config(resume="auto")).newest() is None
    with pytest.raises(CheckpointError, match="checkpoint.resume=must, but .* holds no checkpoint"):
        make_manager(tmp_path, make_config(resume="must")).resume([])


def test_an_older_step_that_is_misread_once_is_not_taken_for_the_newest(folder: Path, monkeypatch) -> None:
    real, hurt = manifest.read_manifest, []

    def misread(path: Path) -> manifest.Manifest:
        if path.name == "step-00000001" and not hurt:
            hurt.append(path)
            raise DamagedError(f"{path} is damaged")
        return real(path)

    monkeypatch.setattr(manifest, "read_manifest", misread)
    folders._brief.cache_clear()  # as in another process
    assert resume(folder) == (2, []) and len(hurt) == 1


def test_explicit_load_of_a_damaged_folder_names_file_and_block(folder: Path) -> None:
    path = next((folder / "step-00000002/optimizer").glob("master-00002*"))
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    block, last = divmod(len(data) - 1, 4096)
    where = rf"{path} is damaged in block {block} \(bytes {len(data) - 1 - last} to {len(data) - 1}\)"
    with pytest.raises(DamagedError, match=where):
        make_manager(folder, make_config()).load(folder / "step-00000002", empty_solo())
    assert (folder / "step-00000002").is_dir()


def test_no_byte_of_a_damaged_block_is_given_out_afterwards(folder: Path) -> None:
    step = folder / "step-00000002"
    saved = manifest.read_manifest(step)
    path = next((step / "optimizer").glob("master-00001*"))
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with closing(BlockFile(path.parent.parent, f"optimizer/{path.name}", saved)) as file:
        for _ in range(2):
            assert file.read(10, 4000) == data[10:4010]
            with pytest.raises(DamagedError, match="is damaged in block 1 "):
                file.read(4000, 200)
        assert file.read(8192, 100) == data[8192:8292]


def test_damage_in_both_halves_of_the_blocks_is_listed_once_and_in_order(folder: Path) -> None:
    step = folder / "step-00000002"
    saved = manifest.read_manifest(step)
    name = next(name for name in saved.files if "exp_avg-00001" in name)
    blocks = [block for block in saved.blocks() if block[0] == name]
    data = bytearray((step / name).read_bytes())
    for index in (1, len(blocks) - 1):
        data[4096 * index] ^= 1
    (step / name).write_bytes(data)
    found = verify_blocks(step, saved, blocks)
    assert [int(re.search(r"damaged in block (\d+)", problem)[1]) for problem in found] == [1, len(blocks) - 1]
    (step / name).write_bytes(data[:-1])
    assert verify_blocks(step, saved, blocks) == [f"{step / name} has {len(data) - 1} bytes instead of {len(data)}"]


def test_damage_seen_by_one_rank_is_agreed_by_all(tmp_path) -> None:
    grid, config = Topology(tp=2, pp=2), make_config()
    save_on(tmp_path, config, OLD, grid, step=1)
    save_on(tmp_path, config, NEW, grid, step=2)
    path = sorted((tmp_path / "step-00000002/optimizer").glob("exp_avg_sq-*"))[-1]  # the last stage's
    zero_tail(path)
    log: list[str] = []

    def rank(group):
        shards = empty(boxes(MODEL, grid, 1, group.rank, owned=True))
        counters = make_manager(tmp_path, config, group, log=log.append).resume(shards)
        assert_holds(shards, OLD)
        return counters

    assert on_grid(grid, rank) == [{"step": 1}] * 4
    assert len(log) == 1 and re.search(rf"rank [23] on .*: {path} is damaged in block", log[0])


@pytest.mark.parametrize("mode", ["auto", "must", "previous"])
def test_what_some_ranks_do_not_see_is_no_damage(tmp_path, mode: str) -> None:
    for name, steps in (("a", (1, 2)), ("b", (1,))):
        for step in steps:
            make_manager(tmp_path / name, make_config()).save(step, solo_shards({1: OLD, 2: NEW}[step]), {"step": step})
    log: list[str] = []

    def rank(group):
        manager = make_manager(tmp_path / "ab"[group.rank], make_config(resume=mode), group, log=log.append)
        if mode == "previous":
            return manager.newest()[0].name
        wanted = "rank 1 on .*b/step-00000002 has no manifest.json.*do all nodes share the folder"
        with pytest.raises(UnreadableError, match=wanted) as error:
            manager.newest()
        assert "no older step is taken" in str(error.value) and "checkpoint.resume=previous" in str(error.value)
        return None

    selected = on_grid(Topology(dp=2), rank)
    assert selected == (["step-00000001"] * 2 if mode == "previous" else [None, None])
    assert len(log) == (mode == "previous") and all("left out, as checkpoint.resume=previous asks" in x for x in log)
    assert there(tmp_path / "a") == [1, 2] and there(tmp_path / "b") == [1]


def test_checkpoints_that_only_other_ranks_see_never_mean_random_weights(tmp_path) -> None:
    make_manager(tmp_path / "b", make_config()).save(1, solo_shards(OLD), {})
    (tmp_path / "a").mkdir()

    def rank(group):
        with pytest.raises(CheckpointError, match="rank 1 sees step-00000001, rank 0 none; do all nodes share it"):
            make_manager(tmp_path / "ab"[group.rank], make_config(), group).resume([])

    on_grid(Topology(dp=2), rank)


def rewrite(step: Path, **changes) -> None:
    body = json.loads((step / "manifest.json").read_bytes())
    body.pop("digest")
    (step / "manifest.json").write_bytes(manifest.render(body | changes))


def test_a_newer_format_is_refused_not_quarantined(folder: Path) -> None:
    rewrite(folder / "step-00000002", format=3)
    with pytest.raises(CheckpointError, match="has checkpoint format 3; this program reads formats 1 and 2"):
        resume(folder)
    assert (folder / "step-00000002").is_dir()


def test_another_architecture_is_listed_key_by_key(folder: Path) -> None:
    other = MODEL.model_copy(update={"num_layers": 6, "rope_theta": 500000.0, "num_kv_heads": 4, "init_std": 0.5})
    with pytest.raises(CheckpointError) as error:
        make_manager(folder, make_config(other)).resume([])
    lines = [line.strip() for line in str(error.value).splitlines() if line.startswith("  ")]
    assert lines == [
        "model.num_layers: checkpoint 4, now 6",
        "model.num_kv_heads: checkpoint 2, now 4",
        "model.rope_theta: checkpoint 10000.0, now 500000.0",
    ]
    assert not isinstance(error.value, DamagedError) and (folder / "step-00000002").is_dir()


def test_another_tokenizer_is_refused(tmp_path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps({"added_tokens": [], "name": name}))
    config, folder = make_config(), tmp_path / "c"
    make_manager(folder, config, tokenizer=tmp_path / "a.json").save(1, solo_shards(OLD), {})
    with pytest.raises(CheckpointError, match=r"data.tokenizer: checkpoint sha256 [0-9a-f]{16}..., now [0-9a-f]{16}"):
        make_manager(folder, config, tokenizer=tmp_path / "b.json").resume(empty_solo())
    for same in (tmp_path / "a.json", None):
        assert make_manager(folder, config, tokenizer=same).resume(empty_solo()) == {}
