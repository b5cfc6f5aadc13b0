"""The models of time and memory against sums done by hand, on hardware with numbers of its own.

The numbers are no machine's, so that fitting the constants again changes nothing here; every one is different, so that
one in another's place is seen.
"""

from __future__ import annotations

from dataclasses import replace
from math import log2

import pytest

from benchmarks.planner_rows import evenly
from megallama.config.load import load
from megallama.forecast.cost import Pricer, closed_form
from megallama.forecast.forecast import (
    GIB,
    buffer_bytes,
    flags,
    hardware_flops,
    in_flight,
    job_bytes,
    predict,
    rank_bytes,
    saved_per_layer,
    seconds_by_cause,
)
from megallama.forecast.hardware import Gpu, Hardware, Kernel, Stack
from megallama.forecast.job import Job
from megallama.plan.timeline import StageCost

GPU = Gpu(
    peak_tflops=1000.0, memory_gib=64.0, memory_gb_per_s=2000.0, nvlink_gb_per_s=200.0, nic_gbit=80.0, gpus_per_node=8,
    watts=500.0, gemm=0.5, small=100.0, attention=0.8, bandwidth=0.75, tp_bus=0.6, tp_latency_us=7.0, nic=0.9,
    leaf_nodes=4, hop_latency_us=11.0,
)  # fmt: skip
THEIRS = Stack(
    speed=0.95, fp8=1.7, residual=13.0, inner=17.0, head=19.0, whole=23.0, accumulate=6.0, tp_overlap=0.3,
    dp_overlap=0.4, blocking=0.8, scatter_gather=False, launch_us=29.0, network=0.7, ring_ns=0.31, step_ms=37.0,
    jitter=0.041, grad_bytes=4.0, param_bytes=2.0, state_bytes=5.0, shard_bytes=12.0, keep_residual=10.0,
    keep_heads=4.0, keep_ffn=6.0, keep_logits=3.0, keep_whole=0.5, reserve_gb=2.0,
)  # fmt: skip
KERNELS = {"fused": Kernel(0.7, 0.6), "plain": Kernel(0.5, 0.4, passes=3.0, unaligned=4.0, causal=False)}
HARDWARE = Hardware("own", GPU, KERNELS, {"theirs": THEIRS, "megallama": replace(THEIRS, reserve_gb=3.0)})
PEAK, MEMORY, NODE = 1e15, 1.5e12, 1.2e11  # operations, streamed bytes, and bytes within a node, per second
NIC = 80e9 / 8 * 0.9 * 0.7
T, H, F, WIDTH, KV, SEQ, VOCAB = 512, 1024, 2560, 1280, 256, 256, 2000  # tokens of a micro-batch, and the model


def job(**changes: object) -> Job:
    """8 layers on 32 GPUs: tp 2, pp 4, dp 4 with 6 micro-batches of two sequences."""
    base = Job(8, H, F, True, 10, WIDTH, KV, VOCAB, SEQ, 32, 2, 4, 4, 2, 6, (), kernel="fused", stack="theirs")
    own = replace(base, **changes)  # type: ignore[arg-type]
    return replace(own, stages=own.stages or evenly(own.layers, own.pp * own.chunks))


def price(**changes: object) -> Pricer:
    return Pricer(job(**changes), HARDWARE)


def product(m: float, k: float, n: float, rate: float = PEAK * 0.5 * 0.95) -> float:
    """Seconds of a matrix product whose k and n are filled up to tiles of 128."""
    tiles = -(-k // 128) * 128 * -(-n // 128) * 128
    return 2 * m * tiles / rate * (1 + 100 * (1 / m + 1 / n + 1 / k))


MATRIX = H * (2 * WIDTH + 2 * KV + 3 * F)  # parameters of a layer's matrices
MATRICES = product(T, H, 896) + product(T, 640, H) + product(T, H, 2560) + product(T, 1280, H)
SCORES = 4.0 * T * SEQ * WIDTH / 2
STREAM, INNER = 13 * T * H / MEMORY, 17 * T * (WIDTH + KV + 2 * F) / 2 / MEMORY
TP = 4 * 0.5 * 2 * T * H / NODE + 14e-6  # two all-reduces of a layer in one direction
LAYER = {  # forward, input gradient, weight gradient, done again with full recomputation
    "matrices": (MATRICES, MATRICES, MATRICES, MATRICES),
    "attention": (SCORES / 2 / 5.6e14, 2.5 * SCORES / 2 / 4.8e14, 0, SCORES / 2 / 5.6e14),
    "elementwise": (STREAM + INNER, 1.5 * (STREAM + INNER), 0, STREAM + INNER),
    "gradient sums": (0, 0, MATRIX * 6 / 2 / MEMORY, 0),
    "launch": (29e-6, 29e-6, 29e-6, 29e-6),
    "tp comm": (0.7 * TP, 0.7 * TP, 0, 0.7 * TP),
}


def test_a_layer() -> None:
    for recompute in ("none", "full"):
        items = {item.name: item[1:] for item in price(recompute=recompute).layer()}
        assert items.keys() == LAYER.keys()
        for name, (*want, again) in LAYER.items():
            assert items[name] == pytest.approx((*want, again * (recompute == "full"))), name


def test_a_layer_of_another_kind() -> None:
    """Two matrices and no gate, heads of 130; attention that keeps its scores, repeated by `selective`."""
    own = price(kernel="plain", gated=False, heads=10, width=1300, recompute="selective", sequence_parallel=True)
    items = {item.name: item[1:] for item in own.layer()}
    memory = 3 * 2.0 * T * SEQ * 10 / 2 / 2e12
    scores = 4.0 * T * SEQ * 1300 / 2
    forward, backward = scores / 4e14 + memory, 2 * (scores / 3.2e14 + memory)
    assert items["attention"] == pytest.approx((4 * forward, 4 * backward, 0, 4 * forward))
    shapes = product(T, H, (1300 + 512) / 2), product(T, 650, H), product(T, H, F / 2), product(T, F / 2, H)
    assert items["matrices"][0] == pytest.approx(sum(shapes))
    stream, inner = STREAM / 2, 17 * T * (1300 + KV + F) / 2 / MEMORY
    assert items["elementwise"] == pytest.approx((stream + inner, 1.5 * (stream + inner), 0, 0))


def test_the_llama_way_repeats_half_of_what_is_elementwise_outside_attention() -> None:
    items = {item.name: item for item in price(stack="megallama", recompute="selective").layer()}
    assert items["elementwise"].again == pytest.approx((STREAM + INNER / 3) / 2)
    assert [item.again for name, item in items.items() if name != "elementwise"] == [0] * 5


def test_the_head() -> None:
    gemm, logits = product(T, H, 1000), (19 / 2 + 23) * T * VOCAB / MEMORY / 2
    both = gemm + logits
    assert price().head()[1:] == pytest.approx((both, both, gemm + VOCAB * H * 6 / 2 / MEMORY, 0))
    assert price(fp8=True).product(T, H, 1000) == pytest.approx(gemm / 1.7)


def test_tensor_parallel_communication() -> None:
    assert price(tp=1).tensor_parallel() == 0
    assert price(hide_tp=False).tensor_parallel() == pytest.approx(TP)
    assert price(tp=8).tensor_parallel() == pytest.approx(0.7 * (4 * 7 / 8 * 2 * T * H / NODE + 14e-6))
    assert price(tp=16).tensor_parallel() == pytest.approx(0.7 * (4 * 15 / 16 * 2 * T * H / NIC + 14e-6))


def test_the_exchange_of_keys_and_values_by_gathering() -> None:
    """One key/value head of 128 on a rank, T tokens over four ranks; tp 2, so that four fit into a node."""
    whole = 2 * 2 * T * 128  # bytes of keys and values
    each = whole * 3 / 4 / NODE + 7e-6
    assert price(cp=4).context_parallel(1, 1) == pytest.approx((each, 2 * each))  # again, and gradients
    assert price(cp=4, keep_kv=True).context_parallel(1, 1) == pytest.approx((each, each))
    assert price(cp=8).over_cp(whole) == pytest.approx(whole * 7 / 8 / (4 * NIC) + 7e-6)  # in two nodes
    assert price(cp=4, stride=8).over_cp(whole) == pytest.approx(whole * 3 / 4 / NIC + 7e-6)  # in four
    assert price(cp=4, stride=4).over_cp(whole) == pytest.approx(whole * 3 / 4 / (2 * NIC) + 7e-6)
    items = {item.name: item for item in price(cp=4, recompute="full").layer()}
    assert items["cp comm"][1:] == pytest.approx((each, 2 * each, 0, each))
    assert "cp comm" not in [item.name for item in price().layer()]


def test_the_exchange_of_keys_and_values_by_heads() -> None:
    """Four heads and two key/value heads on a rank, copied for four ranks; each has its quarter of the tokens."""
    model = {"heads": 8, "width": 1024, "kv_width": 512, "exchange": "heads", "cp": 4}
    half = 2 * (4 + 4) * 128 * T / 4  # bytes of each of the two ways
    each = half * 3 / 4 / NODE + 7e-6
    assert price(**model).context_parallel(1, 1) == pytest.approx((2 * each, 2 * each))
    own = price(**model, stride=4)  # two in a node: two quarters go through the NIC of a rank
    assert own.over_cp(half) == pytest.approx(half * 2 / 4 / NIC + 7e-6)
    assert price(**model | {"cp": 2}).job.exchanged == T / 2 * (4 + 2) * 128  # nothing to copy


def test_what_of_the_exchange_hides_under_attention() -> None:
    each = 2 * 2 * T * 128 * 3 / 4 / NODE + 7e-6
    four = each + 3 * 7e-6  # as many collectives
    assert price(cp=4, cp_pieces=4).context_parallel(1, 1) == pytest.approx((four / 4, four / 4 + four))
    assert price(cp=4, cp_pieces=4).context_parallel(four / 2, four / 3) == pytest.approx((four / 2, four * 5 / 3))
    kept = price(cp=4, cp_pieces=4, keep_kv=True)
    assert kept.context_parallel(1, 1) == pytest.approx((four / 4, four))
    hardware = replace(HARDWARE, stacks={"theirs": replace(THEIRS, cp_overlap=0.6)})
    assert Pricer(job(cp=4), hardware).context_parallel(1, 1) == pytest.approx((0.4 * each, 0.8 * each))


def test_attention_in_chunks() -> None:
    """A quarter of a wave of 128 tiles of 128 queries is lost at each end; without cp it is in the constants."""
    waves = (512 / 4) * 5 / 128 / 128
    assert price().chunked() == 1
    assert price(cp=4).chunked() == pytest.approx((1 + 2 / 4 / waves) / (1 + 1 / 4 / (4 * waves)))
    assert price(cp=4, exchange="heads").chunked() == pytest.approx((1 + 1 / 4 / waves) / (1 + 1 / 4 / (4 * waves)))
    plain, cut = ({i.name: i for i in price(cp=c).layer()}["attention"] for c in (1, 4))
    assert cut.forward == pytest.approx(plain.forward / 4 * price(cp=4).chunked())


def test_transfers_between_stages() -> None:
    whole = 2.0 * T * H / NIC
    assert price().hop() == pytest.approx(whole + 11e-6)
    assert price(sequence_parallel=True).hop() == pytest.approx(whole / 2 + 11e-6)
    assert price(gpus=8).hop() == pytest.approx(2.0 * T * H / NODE + 11e-6)
    assert price(network_gbit=160.0).hop() == pytest.approx(whole / 2 + 11e-6)
    assert price(pp=1).hop() == 0
    assert price(cp=2).hop() == pytest.approx(whole / 2 + 11e-6)  # half of the tokens


def test_stages() -> None:
    own = price(stages=(3, 2, 2, 1), recompute="full")
    forward, back, weight, again = (sum(item[k] for item in LAYER.values()) for k in range(4))
    for blocking, wait in ((False, 0.0), (True, 0.8 * own.hop())):
        costs, head = own.stages(blocking=blocking), own.head()
        assert costs[0] == pytest.approx((3 * forward + wait, 3 * (back + again) + wait, 3 * weight))
        assert costs[3] == pytest.approx(
            (forward + wait + head.forward, back + again + wait + head.input_grad, weight + head.weight_grad)
        )


FULLEST = (2 * MATRIX + VOCAB * H) / 2  # parameters of the first rank, and of the last


def test_parameters_of_a_rank() -> None:
    own = job()
    assert [own.parameters_of(r) for r in range(4)] == [FULLEST, MATRIX, MATRIX, FULLEST]
    assert own.rank_parameters == FULLEST and own.layer_matrix == MATRIX
    assert own.parameters == 8 * (MATRIX + 2 * H) + 2 * VOCAB * H + H
    assert replace(own, tied=True).parameters == own.parameters - VOCAB * H
    assert replace(own, tied=True).parameters_of(3) == FULLEST  # a copy at the other end
    alone = job(pp=1, tied=True)
    assert alone.parameters_of(0) == (8 * MATRIX + VOCAB * H) / 2
    assert job(pp=1).parameters_of(0) == (8 * MATRIX + 2 * VOCAB * H) / 2
    assert job(gated=False).layer_matrix == H * (2 * WIDTH + 2 * KV + 2 * F)


def test_where_stages_lie() -> None:
    assert job(chunks=2).owned == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert job(chunks=2, schedule="zb-v").owned == ((0, 7), (1, 6), (2, 5), (3, 4))
    assert job(schedule="zb-v").owned == ((0,), (1,), (2,), (3,))
    assert job(pp=2, chunks=2, owners=(1, 0, 0, 1)).owned == ((1, 2), (0, 3))


def test_gradients_and_parameters_once_a_step() -> None:
    """Rings over four nodes' NICs; each more doubling of leaves costs `ring_ns` per parameter."""
    assert price(dp=1).data_parallel() == 0
    assert price().data_parallel() == pytest.approx(FULLEST * 6 * 3 / 4 / NODE)  # four ranks are in one node
    ring, leaves = 4 * NIC, log2(64 * 2 / 8 / 4)  # four members of the ring in each node
    assert price(dp=64).data_parallel() == pytest.approx(FULLEST * (6 * 63 / 64 / ring + 0.31e-9 * leaves))
    assert price(dp=32, cp=2).data_parallel() == pytest.approx(price(dp=64).data_parallel())
    assert price(dp=8).data_parallel() == pytest.approx(FULLEST * 6 * 7 / 8 / ring)  # one leaf, no doubling
    full = price(dp=64, sharding="none").data_parallel()
    assert full == pytest.approx(FULLEST * (8 * 63 / 64 / ring + 0.31e-9 * leaves))
    acc = price(dp=64, tp=16).data_parallel()  # one rank of a ring in a node
    assert acc == pytest.approx(FULLEST / 8 * (6 * 63 / 64 / NIC + 0.31e-9 * log2(64 * 16 / 8 / 4)))


def test_rings_are_no_faster_than_the_node() -> None:
    fast = Pricer(job(dp=64, tp=1, network_gbit=800.0), HARDWARE)
    params = fast.job.rank_parameters
    assert fast.data_parallel() == pytest.approx(params * (6 * 63 / 64 / NODE + 0.31e-9 * log2(2)))


def test_sharded_programs_communicate_with_every_micro_batch() -> None:
    each = 2.0 * FULLEST * 3 / 4 / NODE
    assert [price(sharding=s).gathering() for s in ("zero3", "zero2", "zero1")] == pytest.approx([3 * each, each, 0])


def test_the_optimizer() -> None:
    assert price().optimizer() == pytest.approx(FULLEST / 4 * 30 / MEMORY)
    assert price(cp=2).optimizer() == pytest.approx(FULLEST / 8 * 30 / MEMORY)
    assert price(sharding="none").optimizer() == pytest.approx(FULLEST * 30 / MEMORY)


@pytest.mark.parametrize("sharding", ["zero1", "zero2", "zero3"])
def test_causes_of_a_step(sharding: str) -> None:
    """The pipeline's clock says 4 s without transfers and 5 s with them."""
    own = job(sharding=sharding, recompute="full", chunks=2, stages=(2, 1, 1, 1, 1, 1, 1, 0), gpus=128)
    pricer = Pricer(own, HARDWARE)
    found = seconds_by_cause(own, HARDWARE, lambda _, costs, hop: 5.0 if hop else 4.0)
    times = 6 * 8 / 4  # micro-batches, and layers of an average rank
    want = {name: times * sum(item[:3]) for name, item in LAYER.items()}
    want["head and loss"] = 6 / 4 * sum(pricer.head()[1:4])
    want["recompute"] = times * sum(item[3] for item in LAYER.values())
    layer = sum(map(sum, LAYER.values()))
    ranks = [3 * layer, 2 * layer, 2 * layer, layer + sum(pricer.head()[1:4])]
    want["imbalance"] = 6 * (max(ranks) - sum(ranks) / 4)
    want["pp bubble"] = 4.0 - 6 * max(ranks)
    want["pp transfers"] = 1.0
    if sharding == "zero1":
        each, window = pricer.data_parallel(), 3 * layer / 2 * (1 + 4)
        want["dp comm"] = each - min(0.4 * each, window)
    else:
        each = pricer.gathering()
        want["dp comm"] = 6 * (each - min(0.4 * each, sum(want.values()) / 6))
    want["optimizer"] = pricer.optimizer()
    want["step overhead"] = 0.037
    want["jitter"] = sum(want.values()) * 0.041 * log2(128 / 8)
    assert found == pytest.approx(want) and list(found) == list(want)


def test_what_cannot_hide_is_paid() -> None:
    """Gradients hide under no more than what is computed while they move."""
    causes = seconds_by_cause(job(dp=64, network_gbit=0.01), HARDWARE)
    own = Pricer(job(dp=64, network_gbit=0.01), HARDWARE)
    first = sum(own.stages(blocking=False)[0])
    assert causes["dp comm"] == pytest.approx(own.data_parallel() - first)
    slow = job(sharding="zero3", dp=64, network_gbit=0.01)
    causes = seconds_by_cause(slow, HARDWARE)
    before = sum(s for cause, s in causes.items() if cause not in ("dp comm", "optimizer", "step overhead", "jitter"))
    assert causes["dp comm"] == pytest.approx(6 * Pricer(slow, HARDWARE).gathering() - before)


def test_pipelines_alone_have_transfers_and_jitter() -> None:
    causes = seconds_by_cause(job(pp=1, gpus=128), HARDWARE)
    assert causes["pp transfers"] == causes["jitter"] == 0 < causes["tp comm"]
    assert seconds_by_cause(job(gpus=4), HARDWARE)["jitter"] == 0  # half a node is no negative number of doublings


@pytest.mark.parametrize(
    ("name", "chunks", "want"),
    [
        ("zb-h1", 1, 6 * 12 + 3 * (3 + 4 - 5 + 4 * 0.25)),
        ("zb-1p", 1, 6 * 12 + 3 * (3 + 4 - 5 + 4 * 0.25)),
        ("zb-h2", 1, 6 * 12 + 3 * 2 * 0.25),  # 3 + 4 - 2 x 5 is no time
        ("zb-2p", 1, 6 * 12 + 3 * 2 * 0.25),
        ("zb-v", 2, 6 * 12 + 3 * 2 * 0.25),
        ("dualpipe-v", 2, 6 * 12 + 3 * 2 * 0.25),
        ("v-half", 2, 6 * 12 + 3 * (6 + 2 * 0.25)),
        ("1f1b", 2, 6 * 12 + 3 * (12 / 2 + 2 * 0.25) + 2 * 4 * 0.25),
    ],
)
def test_closed_forms(name: str, chunks: int, want: float) -> None:
    """Four ranks of 3 + 4 + 5 s per micro-batch, whatever their chunks; a transfer takes a quarter of a second."""
    costs = [StageCost(3 / chunks, 4 / chunks, 5 / chunks)] * (4 * chunks)
    assert closed_form(job(schedule=name, chunks=chunks), costs, 0.25) == pytest.approx(want)


def test_idle_time_where_weight_gradients_are_short() -> None:
    costs = [StageCost(3, 4, 1)] * 4
    assert closed_form(job(schedule="zb-h2"), costs, 0.0) == pytest.approx(6 * 8 + 3 * (3 + 4 - 2))
    halves = [StageCost(1.5, 2, 0.5)] * 8
    for name in ("zb-v", "dualpipe-v"):
        assert closed_form(job(schedule=name, chunks=2), halves, 0.0) == pytest.approx(6 * 8 + 3 * (3 + 4 - 2) / 2)


def test_a_prediction() -> None:
    own = job()
    p = predict(own, HARDWARE, closed_form)
    step = sum(p.causes.values())
    assert p.step_seconds == step and p.causes == seconds_by_cause(own, HARDWARE)
    assert p.tokens_per_second == pytest.approx(4 * 6 * 2 * SEQ / step / 32)
    assert p.memory_limit == 64 * GIB and p.flags == tuple(flags(own, HARDWARE))
    matrices = 3 * (8 * 2 * MATRIX + 2 * VOCAB * H)
    flops = [matrices + 3 * 8 * 4 * WIDTH * SEQ, matrices + 3 * 8 * 2 * WIDTH * (SEQ + 1)]
    assert (p.mfu_full, p.mfu_causal) == pytest.approx([f * p.tokens_per_second / PEAK for f in flops])
    assert p.hfu == pytest.approx(hardware_flops(own, HARDWARE) * p.tokens_per_second / PEAK)


def test_operations_done_again() -> None:
    head, causal, whole = 6 * VOCAB * H, 2 * WIDTH * (SEQ + 1), 4 * WIDTH * SEQ
    for changes, want in (
        ({}, 6 * MATRIX + 3.5 * causal),
        ({"recompute": "selective"}, 6 * MATRIX + 3.5 * causal),
        ({"recompute": "full"}, 8 * MATRIX + 4.5 * causal),
        ({"kernel": "plain"}, 6 * MATRIX + 3 * whole),
        ({"kernel": "plain", "recompute": "selective"}, 6 * MATRIX + 4 * whole),
        ({"kernel": "plain", "recompute": "full"}, 8 * MATRIX + 4 * whole),
    ):
        assert hardware_flops(job(**changes), HARDWARE) == 8 * want + head, changes


def test_what_a_layer_keeps() -> None:
    inside = (4 * (WIDTH + KV) + 6 * F) / 2
    assert saved_per_layer(job(), HARDWARE) == ((10 * H + inside) * T, 0)
    assert saved_per_layer(job(sequence_parallel=True), HARDWARE) == ((5 * H + inside) * T, 0)
    assert saved_per_layer(job(recompute="full"), HARDWARE) == (2 * H * T, (10 * H + inside) * T)
    assert saved_per_layer(job(recompute="full", sequence_parallel=True), HARDWARE)[0] == H * T
    assert saved_per_layer(job(recompute="selective"), HARDWARE) == ((10 * H + inside) * T / 2, 0)  # by operator
    scores = 5 * 10 * SEQ / 2
    assert saved_per_layer(job(kernel="plain"), HARDWARE) == ((10 * H + inside + scores) * T, 0)
    assert saved_per_layer(job(kernel="plain", recompute="selective"), HARDWARE) == ((10 * H + inside) * T, 0)
    ours = (4 * (WIDTH + KV) + 4 * F) / 2
    assert saved_per_layer(job(stack="megallama", recompute="selective"), HARDWARE) == ((5 * H + ours) * T, 0)


def test_bytes_of_a_rank() -> None:
    layer = saved_per_layer(job(), HARDWARE)[0]
    state = 5 + 12 / 4
    logits = (3 / 2 + 0.5) * T * VOCAB
    assert rank_bytes(job(), HARDWARE, 0) == pytest.approx(FULLEST * state + 2 * 4 * layer + 2e9)
    assert rank_bytes(job(), HARDWARE, 1) == pytest.approx(MATRIX * state + 2 * 3 * layer + 2e9)
    assert rank_bytes(job(), HARDWARE, 3) == pytest.approx(FULLEST * state + 2 * layer + logits + 2e9)
    assert rank_bytes(job(sharding="none"), HARDWARE, 1) == pytest.approx(MATRIX * 17 + 2 * 3 * layer + 2e9)
    split = rank_bytes(job(cp=2), HARDWARE, 1)
    assert split == pytest.approx(MATRIX * (5 + 12 / 8) + 2 * 3 * layer / 2 + 2e9)
    whole = rank_bytes(job(sharding="zero3"), HARDWARE, 1)
    assert whole == pytest.approx(MATRIX * 17 / 4 + 4 * MATRIX + 2 * 3 * layer + 2e9)
    kept, working = saved_per_layer(job(recompute="full"), HARDWARE)
    assert rank_bytes(job(recompute="full"), HARDWARE, 1) == pytest.approx(
        MATRIX * state + 2 * 3 * kept + working + 2e9
    )
    halves = rank_bytes(job(chunks=2), HARDWARE, 1)  # of two chunks of one layer
    assert halves == pytest.approx(MATRIX * state + in_flight(job(chunks=2), 1) * layer + 2e9)


def test_our_loss_holds_a_chunk_of_logits() -> None:
    own, long = (job(stack="megallama", micro_batch=m) for m in (2, 4))
    for each in (own, long):
        kept = saved_per_layer(each, HARDWARE)[0]
        want = FULLEST * 8 + 2 * kept + (3 / 2 + 0.5) * 512 * VOCAB + 3e9
        assert rank_bytes(each, HARDWARE, 3) == pytest.approx(want)
    short = job(stack="megallama", micro_batch=1)
    want = FULLEST * 8 + 2 * saved_per_layer(short, HARDWARE)[0] + (3 / 2 + 0.5) * 256 * VOCAB + 3e9
    assert rank_bytes(short, HARDWARE, 3) == pytest.approx(want)


def test_the_fullest_rank() -> None:
    """The first, the second (without the embedding, more layers may follow) or the last."""
    for stages in ((2, 2, 2, 2), (1, 5, 1, 1), (1, 1, 1, 5)):
        own = job(stages=stages)
        assert job_bytes(own, HARDWARE) == max(rank_bytes(own, HARDWARE, r) for r in range(4))
    for stages, fullest in (((5, 1, 1, 1), 0), ((1, 5, 1, 1), 1)):
        own = job(stages=stages)
        assert job_bytes(own, HARDWARE) == rank_bytes(own, HARDWARE, fullest)
    assert job_bytes(job(pp=1), HARDWARE) == rank_bytes(job(pp=1), HARDWARE, 0)


def test_few_micro_batches_in_flight() -> None:
    assert [in_flight(job(num_microbatches=2), r) for r in range(4)] == [2, 2, 2, 1]
    assert [in_flight(job(schedule="gpipe", num_microbatches=40), r) for r in range(4)] == [40] * 4
    assert [in_flight(job(schedule="zb-1p"), r) for r in range(4)] == [4] * 4
    unknown = job(schedule="zb-9", num_microbatches=50)  # as many as the deepest of ours
    assert [in_flight(unknown, r) for r in range(4)] == [7] * 4
    assert in_flight(job(schedule="zb-9", num_microbatches=5, chunks=2), 0) == 10


def test_work_buffers() -> None:
    words = ["model.preset=debug", "overlap.bucket_mb=0.5", "batch.global_batch_size=64"]
    tokens, h, f = 256, 64, 176
    for more, ranks, gathered, moving, tp in (
        ([], 1, 0, 0, 1),
        (["parallel.tp=2"], 2, 2, 0, 2),
        (["parallel.tp=2", "parallel.pp=2"], 4, 2, 4 / 2, 2),
        (["parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=false"], 4, 2, 4, 2),
    ):
        config = load(None, [*words, *more], ranks=ranks, need_data=False)
        want = (gathered + moving) * tokens * h * 2 + 6 * tokens * f // tp * 2 + 2 * 2**19 + 3e9
        assert buffer_bytes(config, HARDWARE) == want, more


INSIDE = {  # a job within everything that was measured, at its limits
    "tp": 8, "dp": 256, "seq": 8192, "gpus": 4096, "layers": 20, "heads": 10, "width": 1280, "stack": "megallama",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"tp": 9}, ["tp=9 leaves a node of 8 GPUs"]),
        ({"dp": 257}, ["dp=257 is above 256"]),
        ({"cp": 2}, ["dp=512 is above 256"]),
        ({"seq": 8193}, ["seq=8193 is above 8192 tokens"]),
        ({"gpus": 4097}, ["4097 GPUs are above 4096"]),
        ({"width": 1300}, ["heads of 130 are no multiple of 8"]),
        ({"layers": 2}, ["0.0261e9 parameters are outside 0.1e9 to 1,100e9"]),
        ({"layers": 200_000}, ["2.2e+03e9 parameters are outside 0.1e9 to 1,100e9"]),
        ({"fp8": True}, ["fp8 products have other programs' speed"]),
        ({"fp8": True, "stack": "theirs"}, []),
        ({"kernel": "flash3"}, []),
    ],
)
def test_flags(changes: dict[str, object], words: list[str]) -> None:
    assert flags(job(**INSIDE | changes, stages=(1,) * 4), HARDWARE) == words


def test_flash3_wants_a_hopper_gpu() -> None:
    for peak, words in ((399.0, ["flash3 needs a Hopper GPU"]), (400.0, [])):
        hardware = replace(HARDWARE, gpu=replace(GPU, peak_tflops=peak))
        assert flags(job(**INSIDE, kernel="flash3", stages=(1,) * 4), hardware) == words
