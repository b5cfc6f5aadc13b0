"""What digests the blocks: named by the manifest, agreed on by the ranks, never mistaken for damage."""

from __future__ import annotations

import hashlib
import json
import random
import threading
from functools import partial
from pathlib import Path

import pytest

from megallama.checkpoint import manifest, writer
from megallama.checkpoint.disk import CheckpointError
from megallama.checkpoint.manifest import HASHERS, SHA256, XXH3
from megallama.checkpoint.reader import verify_blocks
from megallama.comm.group import Group
from megallama.plan.topology import Topology
from tests.checkpoint.states import (
    MODEL,
    assert_holds,
    boxes,
    empty_solo,
    make_config,
    make_manager,
    make_state,
    on_grid,
    save_on,
    solo_shards,
    take,
)

FROZEN = Path(__file__).parents[1] / "frozen" / "v1"
OLD, NEW = make_state(seed=1), make_state(seed=2)
LINE = "digests are SHA-256: {} lacks xxhash, which is faster (pip install xxhash)"


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """With the library, or one of 128 bits in its place where it is not installed."""
    if XXH3 not in HASHERS:
        monkeypatch.setitem(HASHERS, XXH3, partial(hashlib.blake2b, digest_size=16))
    return monkeypatch


def blocks(step: Path, by) -> dict[str, list[str]]:
    """The digests of all blocks of 4096 bytes, by file."""
    raw = {str(p.relative_to(step)): p.read_bytes() for p in step.rglob("*") if p.is_file() and p.name != manifest.NAME}
    starts = {name: range(0, len(data), 4096) for name, data in raw.items()}
    return {name: [by(data[i : i + 4096]).hexdigest()[:32] for i in starts[name]] for name, data in raw.items()}


@pytest.mark.parametrize("grid", [Topology(), Topology(tp=2, dp=2)], ids=["alone", "tp2 dp2"])
@pytest.mark.parametrize("name", [SHA256, XXH3])
def test_the_manifest_names_what_its_blocks_are_digested_with(tmp_path, fast, name: str, grid: Topology) -> None:
    if name == SHA256:
        fast.delitem(HASHERS, XXH3)
    save_on(tmp_path, make_config(), NEW, grid)
    step = tmp_path / "step-00000001"
    saved, body = manifest.read_manifest(step), json.loads((step / manifest.NAME).read_bytes())
    # what knows SHA-256 alone reads format 1, and refuses 2 instead of renaming what is whole
    assert (body["format"], body.get("digests")) == {SHA256: (1, SHA256), XXH3: (2, XXH3)}[name]
    assert {file: list(record.blocks) for file, record in saved.files.items()} == blocks(step, HASHERS[name])
    own = body.pop("digest")
    assert own == hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]
    assert verify_blocks(step, saved, list(saved.blocks())) == []
    shards = empty_solo()
    assert make_manager(tmp_path, make_config()).resume(shards) == {"step": 1}
    assert_holds(shards, NEW)


def test_a_manifest_without_a_name_is_of_sha_256(tmp_path) -> None:
    step = FROZEN / "bf16/checkpoints/step-00000003"
    saved = manifest.read_manifest(step)
    assert "digests" not in saved.body and saved.digests == SHA256 and saved.body["format"] == 1
    assert verify_blocks(step, saved, list(saved.blocks())) == [] and len(list(saved.blocks())) == 9
    name = next(name for name in saved.files if name.startswith("optimizer/exp_avg-"))
    (tmp_path / name).parent.mkdir()
    data = bytearray((step / name).read_bytes())
    data[-1] ^= 128
    (tmp_path / name).write_bytes(data)
    assert "is damaged in block 0 " in verify_blocks(tmp_path, saved, [(name, 0)])[0]


@pytest.mark.parametrize("resume", ["auto", "previous"])
def test_without_the_library_a_whole_checkpoint_is_neither_damaged_nor_passed_over(tmp_path, fast, resume) -> None:
    with fast.context() as patch:
        patch.delitem(HASHERS, XXH3)
        make_manager(tmp_path, make_config()).save(1, solo_shards(OLD), {"step": 1})
    make_manager(tmp_path, make_config()).save(2, solo_shards(NEW), {"step": 2})
    fast.delitem(HASHERS, XXH3)
    wrong = r"master-00001\S+ is digested with xxh3_128, which this program cannot make here: pip install xxhash"
    with pytest.raises(CheckpointError, match=wrong):
        make_manager(tmp_path, make_config(resume=resume)).resume(empty_solo())
    names = sorted(path.name for path in tmp_path.glob("step-*"))
    assert names == ["step-00000001", "step-00000002"]
    manager = make_manager(tmp_path, make_config(resume="fresh"))
    manager.save(3, solo_shards(OLD), {"step": 3})  # its place is after the one that cannot be verified
    assert manager.newest()[0].name == "step-00000003"


def test_a_digest_that_nobody_knows_is_refused(tmp_path, fast) -> None:
    make_manager(tmp_path, make_config()).save(1, solo_shards(OLD), {"step": 1})
    path = tmp_path / "step-00000001" / manifest.NAME
    body = json.loads(path.read_bytes())
    del body["digest"]
    path.write_bytes(manifest.render(body | {"digests": "md5"}))
    with pytest.raises(CheckpointError, match="digested with md5, which this program cannot make here: use the v"):
        make_manager(tmp_path, make_config()).resume(empty_solo())
    assert path.exists()


def test_where_one_rank_lacks_the_library_all_use_sha_256_and_say_so_once(tmp_path, fast) -> None:
    lacking = threading.local()

    class Hashers(dict):
        def __contains__(self, name: object) -> bool:
            return super().__contains__(name) and not (name == XXH3 and lacking.is_so)

    fast.setattr(manifest, "HASHERS", Hashers(HASHERS))
    log: list[str] = []

    def rank(group: Group) -> None:
        lacking.is_so = group.rank == 2
        shards = take(NEW, boxes(MODEL, Topology(dp=4), 1, group.rank, owned=True))
        manager = make_manager(tmp_path, make_config(), group, log=log.append, told_of_digests=True)
        for step in (1, 2):
            manager.save(step, shards, {"step": step})

    on_grid(Topology(dp=4), rank)
    for step in (1, 2):
        saved = manifest.read_manifest(tmp_path / f"step-0000000{step}")
        assert saved.digests == SHA256 and saved.body["format"] == 1
    assert [line for line in log if "digests are" in line] == [LINE.format("rank 2")]


def test_alone_it_is_said_of_the_machine(tmp_path, fast) -> None:
    log: list[str] = []
    make_manager(tmp_path, make_config(), log=log.append, told_of_digests=True).save(1, solo_shards(OLD), {})
    assert not [line for line in log if "digests are" in line]
    fast.delitem(HASHERS, XXH3)
    make_manager(tmp_path, make_config(), log=log.append, told_of_digests=True).save(2, solo_shards(OLD), {})
    assert [line for line in log if "digests are" in line] == [LINE.format("rank 0")]


def test_one_thousand_of_one_thousand_flipped_bits_change_the_digest(fast) -> None:
    dice = random.Random(0)
    data = bytearray(dice.randbytes(1 << 16))
    right, found = manifest.digest(data, HASHERS[XXH3]), set()
    for place in dice.sample(range(8 * len(data)), 1000):
        data[place // 8] ^= 1 << place % 8
        found.add(manifest.digest(data, HASHERS[XXH3]))
        data[place // 8] ^= 1 << place % 8
    assert len(found) == 1000 and right not in found and all(len(one) == 32 for one in found)


def test_the_library_is_what_its_name_says() -> None:
    pytest.importorskip("xxhash", reason="xxhash is not installed")
    assert HASHERS[XXH3](b"").hexdigest() == "99aa06d3014798d86001c324468d497f"  # of the specification of XXH3
    by_parts = HASHERS[XXH3]()
    by_parts.update(memoryview(b"mega"))
    by_parts.update(memoryview(b"llama"))
    assert by_parts.hexdigest() == HASHERS[XXH3](b"megallama").hexdigest()


def test_shards_in_any_order_are_digested_while_they_are_written(tmp_path, monkeypatch) -> None:
    """The optimizer has the last layer first; read back are the blocks with a header, which was there before."""
    again, real = set[tuple[str, int]](), writer._digest_blocks

    def noting(content: writer.Content, blocks: list[tuple[str, int]], flusher: writer.Flusher) -> writer.Digests:
        again.update(blocks)
        return real(content, blocks, flusher)

    monkeypatch.setattr(writer, "_digest_blocks", noting)
    make_manager(tmp_path, make_config()).save(1, solo_shards(NEW)[::-1], {"step": 1})
    saved = manifest.read_manifest(tmp_path / "step-00000001")
    tensors = {name for name in saved.files if name.endswith(".safetensors")}
    assert len(tensors) > 4 and {place for place in again if place[0] in tensors} == {(name, 0) for name in tensors}
    shards = empty_solo()
    make_manager(tmp_path, make_config()).resume(shards)
    assert_holds(shards, NEW)
