"""The table of other trainers: which rounds count, which rows stay, and that every version is fixed."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "drivers")]

import peers  # noqa: E402
import step  # noqa: E402
from drivers.work import SHAPES  # noqa: E402
from report import Run, machine  # noqa: E402

ROW = ("S", "fp32", "a")
TOKEN = step.flops_per_token(SHAPES["S"]) / 1e9  # GFLOP of a token: at 1 token/s this is the rate in GFLOP/s
HERE, THERE = "Xeon, 2 cores, Linux 6", "EPYC, 2 cores, Linux 6"


def run(system: str, speed: float, **changes: Any) -> Run:
    of = Run(system, "S", "a", "fp32", True, speed, speed, [], 1.0, [100], 0.0, gemm_gflops=100 * TOKEN)
    return replace(of, **changes)


def test_the_peers_are_fixed_in_one_file() -> None:
    """Versions of all that is measured, and drivers that exist."""
    assert {peer.name for peer in peers.PEERS} >= {"hf", "litgpt", "megatron-core", "torchtitan", "torch.compile"}
    assert all((peers.DRIVERS / peer.driver).exists() and set(peer.layouts) <= set("abcde") for peer in peers.PEERS)
    assert [peer.name for peer in peers.PEERS if peer.compiled] == ["torch.compile"]
    words = [word for packages in peers.INSTALL for word in packages]
    names = ("torch", "numpy", "transformers", "litgpt", "megatron-core", "torchtitan")
    assert all(any(re.fullmatch(rf"{name}==[\d.]+", word) for word in words) for name in names)
    assert peers.INSTALL[0] == [next(word for word in words if word.startswith("torch=="))]


def test_a_round_with_a_slow_peer_does_not_count() -> None:
    recorded = {"S fp32 a": {"hf": 0.50, "litgpt": 0.40, "megallama": 0.99}}
    fine = [run("megallama", 60), run("hf", 48), run("litgpt", 38.5)]  # at 0.48 and 0.385: within 5 %
    assert peers.judged(fine, recorded) == fine
    slow = peers.judged([*fine[:2], run("litgpt", 37.9)], recorded)
    assert {one.void for one in slow} == {"litgpt had 0.379 of the rate of products, 0.400 is recorded"}
    assert peers.judged(fine, {}) == fine, "nothing is recorded on this processor"


def test_rounds_are_made_again_until_enough_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "RESULTS", tmp_path)
    monkeypatch.setattr(peers, "machine", lambda: {"machine": HERE})
    known = {"Xeon, 2 cores": {"S fp32 a": {"hf": 0.50}}}
    (tmp_path / "peer_shares.json").write_text(json.dumps(known))
    speeds = iter([50, 40, 49, 40, 51, 1, 1])
    monkeypatch.setattr(peers, "one_round", lambda row, chosen, args: [run("megallama", 60), run("hf", next(speeds))])
    monkeypatch.setattr(peers, "peer_versions", lambda python: "")
    args = argparse.Namespace(peers="hf", rounds=3, kept=None, seconds=1e9, python="")
    piece = peers.Piece(args)
    assert peers.measure_row(ROW, args, piece)
    runs = piece.of("S fp32 a")
    assert [bool(one.void) for one in runs[::2]] == [False, True, False, True, False]
    assert [one.tokens_per_second for one in peers.counting(runs) if one.system == "hf"] == [50, 49, 51]
    speeds = iter([1] * 6)
    piece = peers.Piece(args)
    assert peers.measure_row(ROW, args, piece)
    assert all(one.void for one in piece.of("S fp32 a")), "six times, and no more"
    with pytest.raises(StopIteration):
        next(speeds)


def test_rounds_are_kept_until_none_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Piece by piece: none is measured twice, none begins without the time, and who failed is not tried again."""
    clock, made = [0.0], []

    def one_round(row: tuple[str, str, str], chosen: list[peers.Peer], args: argparse.Namespace) -> list[Run]:
        made.append([peer.name for peer in chosen])
        chosen[:] = [peer for peer in chosen if peer.name != "litgpt"]
        clock[0] += 30.0
        return [run("megallama", 60 + len(made)), run("hf", 50)]

    monkeypatch.setattr(peers, "RESULTS", tmp_path)
    monkeypatch.setattr(peers, "machine", lambda: {"machine": HERE, "commit": "abc"})
    monkeypatch.setattr(peers, "peer_versions", lambda python: "")
    monkeypatch.setattr(peers, "one_round", one_round)
    monkeypatch.setattr(peers.time, "monotonic", lambda: clock[0])
    kept = tmp_path / "kept.json"
    args = argparse.Namespace(peers="hf,litgpt", rounds=3, kept=kept, seconds=70.0, python="")
    assert not peers.measure_row(ROW, args, peers.Piece(args)), "two rounds of 30 s fit into 70"
    assert made == [["hf", "litgpt"], ["hf"]]
    args.seconds = 1.0
    piece = peers.Piece(args)
    assert peers.measure_row(ROW, args, piece), "a command without time for it makes one round all the same"
    assert made[2:] == [["hf"]]
    assert peers.measure_row(ROW, args, peers.Piece(args)) and len(made) == 3, "nothing is missing"
    assert [one.tokens_per_second for one in piece.of("S fp32 a") if one.system == "megallama"] == [61, 62, 63]
    assert set(piece.measured()) == {"machine", "commit", "peers", "command", "runs", "failed"}
    assert piece.measured()["failed"] == {"S fp32 a": ["litgpt"]}


def test_what_is_recorded_only_grows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "RESULTS", tmp_path)
    monkeypatch.setattr(peers, "machine", lambda: {"machine": HERE})
    peers.record([run("megallama", 60), run("hf", 50), run("hf", 40), run("hf", 44), run("litgpt", 30, void="slow")])
    assert peers.read_json("peer_shares", {}) == {"Xeon, 2 cores": {"S fp32 a": {"hf": 0.44}}}
    peers.record([run("hf", 40)])
    assert peers.read_json("peer_shares", {})["Xeon, 2 cores"]["S fp32 a"] == {"hf": 0.44}


def session(commit: str, where: str, *runs: Run) -> dict[str, Any]:
    return {"commit": commit, "machine": where, "runs": [one.__dict__ for one in runs]}


def lines(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| S ")
    ]


def test_rows_of_other_processors_stay_with_their_commit() -> None:
    old = session("aaa", THERE, run("megallama", 70), run("hf", 35))
    more = session("aab", HERE, run("megallama", 11), run("litgpt", 10))
    replaced = session("bbb", HERE, run("megallama", 10), run("hf", 10))
    other = session("bbb", HERE, run("megallama", 20, dtype="bf16"), run("hf", 10, dtype="bf16"))
    new = session("ccc-dirty", HERE, run("megallama", 60, recompute="none"), run("hf", 40), run("torch.compile", 80))
    ratios = lines(peers.report([old, replaced, more, other, new]).partition("## Every system")[0])
    columns = [(x[0], x[1], x[2], x[4], x[5], x[7], x[8], *x[-2:]) for x in ratios]
    assert columns == [
        ("S fp32 a", "70", "selective", "hf", "2.00", "-", "-", "EPYC, 2 cores", "aaa"),
        ("S fp32 a", "11", "selective", "litgpt", "1.10", "-", "-", "Xeon, 2 cores", "aab"),
        ("S bf16 a", "20", "selective", "hf", "2.00", "-", "-", "Xeon, 2 cores", "bbb"),
        ("S fp32 a", "60", "none", "hf", "1.50", "80", "0.75", "Xeon, 2 cores", "ccc*"),
    ]


def test_a_disturbed_round_shows_no_ratio() -> None:
    rounds = [run("megallama", 60), run("megallama", 63), run("megallama", 66)]
    peer = [run("hf", 50), run("hf", 7, other_load=0.9), run("hf", 55)]
    line = peers.compare([*rounds, *peer])
    assert (line["of each round"], line["ratio"], line["others' load"]) == ("1.20 disturbed 1.20", "1.26", "0.90")
    assert line["peers that ran"] == "hf"


def test_what_is_in_the_results_can_be_read() -> None:
    text = peers.report(peers.read_json("peers", []))
    assert len(lines(text)) > 20 and "AMD EPYC, 2 cores" in text


def test_medians_are_of_an_odd_number() -> None:
    runs = [run("hf", speed) for speed in (10, 20, 30, 40)]
    assert [one.tokens_per_second for one in peers.counting(runs)] == [10, 20, 30]
    assert peers.speed(runs) == 20
    assert peers.speed([*runs, run("hf", 5), *[run("hf", 99, other_load=0.5)] * 9]) == 20


def test_a_disturbed_run_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "wait_for_calm", lambda limit: None)
    args = argparse.Namespace(calm=0)
    for loads, taken in (([0.1, 0.0], 0.1), ([0.5, 0.16, 0.1], 0.1), ([0.5, 0.4, 0.3, 0.0], 0.3)):
        left = iter(loads)
        assert peers.undisturbed(lambda left=left: run("hf", 50, other_load=next(left)), args).other_load == taken


def test_the_generation_of_a_processor_is_part_of_its_name() -> None:
    """Two that are called the same have different rates of products."""
    place = peers.processor(machine()["machine"])
    assert place.endswith(" cores")
    if "cpu family" in Path("/proc/cpuinfo").read_text():
        assert re.search(r" \(family \d+ model \d+\), \d+ cores$", place)


def test_ours_recomputes_as_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing, as the peers, unless it is asked for."""
    monkeypatch.setattr(peers, "wait_for_calm", lambda limit: None)
    monkeypatch.setattr(step, "probe", lambda layout, dtype: 50.0)
    asked: list[list[str]] = []

    def measure(shape: str, layout: str, dtype: str, steps: int, extra: list[str], timeout: float) -> Run:
        asked.append(extra)
        return run("megallama", 60)

    monkeypatch.setattr(step, "measure", measure)
    for settings, wanted in (([], "none"), (["memory.recompute=full", "run.compile=true"], "full")):
        args = argparse.Namespace(calm=0, steps=3, set=settings, timeout=1.0)
        (ours,) = peers.one_round(ROW, [], args)
        assert (ours.recompute, ours.gemm_gflops) == (wanted, 50.0)
    assert asked == [["memory.recompute=none"], ["memory.recompute=full", "run.compile=true"]]


def test_plain_pytorch_does_the_same_work() -> None:
    """Loss and gradients of transformers' LLaMA with the same weights, in float64."""
    import run_plain
    import torch
    from drivers.work import Shape
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = Shape(hidden=32, layers=2, heads=4, ffn=48, vocab=61, seq=16, micro_batch=2)
    torch.manual_seed(0)
    ours = run_plain.Llama(shape).double()
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, rms_norm_eps=1e-5, attn_implementation="eager",
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).double()
    state = {"model.embed_tokens.weight": ours.embedding.weight, "model.norm.weight": ours.norm.weight}
    state["lm_head.weight"] = ours.head.weight
    for number, block in enumerate(ours.blocks):
        at = f"model.layers.{number}."
        parts = zip("qkv", block.qkv.weight.chunk(3), strict=True)
        state |= {f"{at}self_attn.{name}_proj.weight": part for name, part in parts}
        gate, up = block.gate_up.weight.chunk(2)
        state |= {f"{at}self_attn.o_proj.weight": block.out.weight, f"{at}mlp.down_proj.weight": block.down.weight}
        state |= {f"{at}mlp.gate_proj.weight": gate, f"{at}mlp.up_proj.weight": up}
        names = ("input_layernorm", "post_attention_layernorm")
        state |= {f"{at}{name}.weight": norm.weight for name, norm in zip(names, block.norms, strict=True)}
    theirs.load_state_dict(state)
    tokens = torch.randint(61, (2, 17))
    loss = ours(tokens[:, :-1], tokens[:, 1:])
    logits = theirs(input_ids=tokens[:, :-1]).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)  # angles and loss are in fp32
    loss.backward()
    wanted.backward()
    for own, other in ((ours.embedding, theirs.model.embed_tokens), (ours.head, theirs.lm_head)):
        torch.testing.assert_close(own.weight.grad, other.weight.grad, rtol=1e-4, atol=1e-7)
    q = theirs.model.layers[0].self_attn.q_proj.weight.grad
    torch.testing.assert_close(ours.blocks[0].qkv.weight.grad[:32], q, rtol=1e-4, atol=1e-7)
