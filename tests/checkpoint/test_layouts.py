"""A checkpoint has no layout: the same bytes from any ranks, readable by any ranks."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from megallama.checkpoint.disk import CheckpointError
from megallama.checkpoint.manifest import file_set, layout
from megallama.config.schema import ModelConfig
from megallama.plan.topology import Topology
from tests.checkpoint.states import (
    MODEL,
    assert_holds,
    boxes,
    empty,
    empty_solo,
    file_hashes,
    make_config,
    make_manager,
    make_state,
    on_grid,
    save_on,
    solo_shards,
)

TIED = MODEL.model_copy(update={"tie_embeddings": True})
LAYOUTS = [
    (Topology(), 1),
    (Topology(tp=2), 1),
    (Topology(dp=2), 1),
    (Topology(pp=2), 1),
    (Topology(pp=3), 1),
    (Topology(tp=4), 1),  # more ranks than kv heads, vocabulary padded
    (Topology(tp=2, pp=2), 1),
    (Topology(dp=3, pp=2), 1),
    (Topology(tp=2, pp=2, dp=2), 2),  # interleaved
]
IDS = [f"tp{g.tp}pp{g.pp}dp{g.dp}c{c}" for g, c in LAYOUTS]


def load_on(folder, config, state, grid, chunks, owned):
    def rank(group):
        dtype = torch.float64 if config.precision.dtype == "fp64" else torch.float32
        shards = empty(boxes(config.model, grid, chunks, group.rank, owned), dtype)
        counters = make_manager(folder, config, group).load(folder / "step-00000001", shards)
        assert_holds(shards, state)
        return counters

    assert on_grid(grid, rank) == [{"step": 1}] * grid.world_size


@pytest.mark.parametrize("model", [MODEL, TIED], ids=["untied", "tied"])
def test_every_layout_writes_the_same_bytes_and_reads_any(model: ModelConfig, tmp_path) -> None:
    state, config = make_state(model), make_config(model)
    hashes = []
    for (grid, chunks), name in zip(LAYOUTS, IDS, strict=True):
        save_on(tmp_path / name, config, state, grid, chunks)
        hashes.append(file_hashes(tmp_path / name / "step-00000001"))
    assert len(hashes[0]) > 12  # several files of each kind
    assert all(h == hashes[0] for h in hashes)
    for number, (grid, chunks) in enumerate(LAYOUTS):  # files are equal, so one source stands for all
        load_on(tmp_path / IDS[number - 1], config, state, grid, chunks, owned=False)


MATRIX = [
    (Topology(), 1),
    (Topology(tp=2), 1),
    (Topology(pp=2), 1),
    (Topology(dp=2), 1),
    (Topology(tp=2, pp=2), 1),
    (Topology(dp=2, pp=2), 1),
    (Topology(tp=4), 1),
    (Topology(pp=2), 2),  # interleaved
]


@pytest.mark.parametrize("source", MATRIX, ids=str)
def test_saved_in_one_layout_and_loaded_in_every(source: tuple[Topology, int], tmp_path) -> None:
    """All 64 pairs: every rank's boxes, owned or copies, are bitwise the state that was saved."""
    state, config = make_state(seed=7), make_config()
    save_on(tmp_path, config, state, *source)
    for grid, chunks in MATRIX:
        load_on(tmp_path, config, state, grid, chunks, owned=False)


@pytest.mark.parametrize("source", range(len(LAYOUTS)), ids=IDS)
def test_round_trip_is_bitwise_in_fp64(source: int, tmp_path) -> None:
    state, config = make_state(dtype=torch.float64), make_config(dtype="fp64")
    save_on(tmp_path, config, state, *LAYOUTS[source])
    load_on(tmp_path, config, state, *LAYOUTS[(source + 4) % len(LAYOUTS)], owned=True)


@pytest.mark.parametrize(
    ("dtype", "bits"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_safetensors_reads_our_files(dtype: str, bits: torch.dtype, tmp_path) -> None:
    from safetensors.torch import load_file

    state = make_state()
    save_on(tmp_path, make_config(dtype=dtype), state, Topology(tp=2, dp=2))
    found: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in ("model", *state)}
    for path in (tmp_path / "step-00000001").rglob("*.safetensors"):
        found[path.name.split("-")[0]] |= load_file(path)
    for kind, tensors in state.items():
        assert found[kind].keys() == tensors.keys()
        assert all(torch.equal(found[kind][n], t) for n, t in tensors.items())
    assert all(found["model"][n].dtype == bits for n in state["master"])
    assert all(torch.equal(found["model"][n], t.to(bits)) for n, t in state["master"].items())


def test_headers_do_not_change_without_a_new_format_number() -> None:
    sets = layout(MODEL, "bf16", 60_000)
    headers = hashlib.sha256(b"".join(h for s in sets.values() for h in s.headers.values())).hexdigest()
    assert headers == "394bbfaa51b850dcb78c2637ad6b31375f64a0f2e33b1232d52d4f79ac147223"
    assert {len(h) % 8 for s in sets.values() for h in s.headers.values()} == {0}


def test_files_are_begun_at_the_size_limit() -> None:
    shapes = {"a": (4, 10), "b": (1000,), "c": (3,), "d": (3,)}
    found = file_set("x/y", shapes, "F32", 200)
    assert list(found.sizes) == [f"x/y-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [p.file[4] for p in found.places.values()] == ["0"] * 4
    assert [int(p.file[4:9]) for p in found.places.values()] == [1, 2, 3, 3]
    assert json.loads(found.index())["metadata"]["total_size"] == (40 + 1000 + 6) * 4
    assert found.places["d"].offset == found.places["c"].offset + 12
    assert found.sizes["x/y-00002-of-00003.safetensors"] == len(found.headers["x/y-00002-of-00003.safetensors"]) + 4000


def test_a_file_may_be_exactly_full() -> None:
    places = file_set("x/y", dict.fromkeys("abcd", (25,)), "F32", 200).places
    assert [int(place.file[4:9]) for place in places.values()] == [1, 1, 2, 2]


def test_a_block_may_be_the_whole_file(tmp_path) -> None:
    state = make_state()
    sizes = layout(MODEL, "fp32", 60_000)["master"].sizes
    for step, size in enumerate(sorted(sizes.values()), 1):
        manager = make_manager(tmp_path, make_config(keep_last=1), block_bytes=size)
        manager.save(step, solo_shards(state), {})
        shards = empty_solo()
        manager.load(tmp_path / f"step-{step:08d}", shards)
        assert_holds(shards, state)


def test_sizes_of_the_released_models() -> None:
    llama_7b = ModelConfig(hidden_size=4096, num_layers=32, num_heads=32, ffn_hidden_size=11008, vocab_size=32000)
    sets = layout(llama_7b, "bf16")
    assert len(sets["model"].sizes) == 3 and len(sets["master"].sizes) == 6
    assert json.loads(sets["model"].index())["metadata"]["total_size"] == 2 * 6_738_415_616
    assert all(size < 5_000_100_000 for s in sets.values() for size in s.sizes.values())


def test_state_that_no_rank_owns_is_an_error(tmp_path) -> None:
    state, config = make_state(), make_config()

    def rank(group):
        from tests.checkpoint.states import take

        found = boxes(MODEL, Topology(tp=2), 1, group.rank, owned=True)
        make_manager(tmp_path, config, group).save(1, take(state, found[group.rank :]), {})

    missing = boxes(MODEL, Topology(tp=2), 1, 1, owned=True)[0].numel
    total = sum(t.numel() for t in state["master"].values())
    with pytest.raises(CheckpointError, match=f"hold {total - missing} elements of state, the model has {total}"):
        on_grid(Topology(tp=2), rank)
    assert list(tmp_path.iterdir()) == []
