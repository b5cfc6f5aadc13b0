"""The page of a plan, word by word."""

from __future__ import annotations

from megallama.config.load import load
from megallama.plan.plan import _ranges, make_plan

PAGE = """
model      debug: 217,664 parameters
           4 layers, hidden 64, 4 heads of 16 (2 key/value), ffn 176, vocabulary 512, tied embeddings
layout     tp=2 x pp=4 x dp=2 = 16 ranks, sequence parallel; rank order tp-cp-dp-pp
precision  bf16, recompute selective
batch      32 sequences x 64 = 2,048 tokens per step = 2 replicas x 4 micro-batches x 4
           grows from 8 by 8 over the first 64 sequences
run        100 steps, 197,632 tokens
work       0.001402 GFLOP per token (causal attention); 2.77e+11 FLOP in all
schedule   zb-h1: ranks idle 38.9% of the step; in flight per rank 4 4 4 4

stage  rank   layers  parameters  share of work
    0     0  0-0 (1)      78,976          21.5%
    1     1  1-1 (1)      46,208          21.5%
    2     2  2-2 (1)      46,208          21.5%
    3     3  3-3 (1)      79,040          35.5%

pipeline rank  weights  main grads  optimizer  in flight  activations  logits  total
            0     0.08        0.15       0.23          4         0.81    0.00   1.26
            1     0.04        0.09       0.13          4         0.93    0.00   1.20
            2     0.04        0.09       0.13          4         1.07    0.00   1.34
            3     0.08        0.15       0.23          4         1.20    0.38   2.04
MiB per rank; communication and work buffers come on top

rank  0 |00112233......AAaaBBbbCCccDDdd|
rank  1 |..001122....AA33BBaaCCbbDDccdd|
rank  2 |....0011..AA22BB33CCaaDDbbccdd|
rank  3 |......00AA11BB22CC33DDaabbccdd|
digits: forward, capitals: backward (A is micro-batch 0), small letters: weight gradients, dots: idle
"""


def test_a_page() -> None:
    words = ["model.preset=debug", "model.tie_embeddings=true", "model.num_kv_heads=2", "parallel.tp=2"]
    words += ["parallel.pp=4", "parallel.schedule=zb-h1", "batch.global_batch_size=32", "batch.ramp_start=8"]
    words += ["batch.ramp_increment=8", "batch.ramp_samples=64"]
    assert str(make_plan(load(None, words, ranks=16, need_data=False), 16)) == PAGE.strip("\n")


def test_the_batch_of_replicas_that_differ_by_one_micro_batch() -> None:
    """28 sequences are 7 micro-batches: 3, 2 and 2 of 3 x 3, so 2/9 of the replicas' time is idle."""
    words = ["parallel.pp=4", "batch.global_batch_size=28", "batch.uneven=true"]
    lines = str(make_plan(load(None, words, ranks=12, need_data=False), 12)).split("\n")
    assert lines[4:6] == [
        "batch      28 sequences x 256 = 7,168 tokens per step = 3 replicas x 3 or 2 micro-batches x 4",
        "           replicas idle 22.2% of the time, as 2 of 3 have one micro-batch less",
    ]
    assert "rank  0 |001122.." in lines[-5]  # the pipeline of a replica that has most
    few = str(make_plan(load(None, [*words, "parallel.pp=1", "batch.global_batch_size=12"], need_data=False), 2))
    assert "= 2 replicas x 2 or 1 micro-batch x 4\n           replicas idle 25.0% of the time, as 1 of 2 have" in few
    even = str(make_plan(load(None, [*words, "batch.global_batch_size=24"], ranks=12, need_data=False), 12))
    assert "= 3 replicas x 2 micro-batches x 4\nrun " in even


def test_a_page_of_many_ranks() -> None:
    """Of tables of more than 20 rows the middle is left out; there is no chart of more than 8 ranks."""
    words = ["model.num_layers=40", "parallel.pp=32", "precision.fp8=tensorwise", "batch.global_batch_size=64"]
    page = str(make_plan(load(None, words, ranks=64, need_data=False), 64))
    assert "fp8 tensorwise in the layers' linear maps" in page
    assert "in flight per rank 8 8 8 8 8 8 8 8 ... 4 3 2 1" in page
    _, stages, memory = page.split("\n\n")
    rows = [line.split() for line in stages.split("\n")[1:]]
    assert [row[0] for row in rows] == [*map(str, range(9)), "...", *map(str, range(22, 32))]
    assert rows[-1] == ["31", "31", "none", "1,048,832", "3.0%"] and rows[-2][2:4] == ["38-39", "(2)"]
    last = memory.split("\n")[-2].split()
    assert last == ["31", "2.00", "4.00", "6.00", "1", "1.00", "24.00", "37.07"]  # one chunk of 1024 tokens
    assert memory.endswith("MiB per rank; communication and work buffers come on top")


def test_when_a_chart_is_drawn() -> None:
    """Two to 8 ranks, and at most 64 (stage, micro-batch) pairs."""

    def charted(ranks: int, micro: int) -> bool:
        words = ["model.num_layers=16", f"parallel.pp={ranks}", "batch.micro_batch_size=1"]
        config = load(None, [*words, f"batch.global_batch_size={micro}"], ranks=ranks, need_data=False)
        return "digits: forward" in str(make_plan(config, ranks))

    assert charted(8, 8) and charted(2, 32)
    assert not any(charted(ranks, micro) for ranks, micro in ((8, 9), (9, 4), (1, 4)))


def test_long_lists_of_numbers() -> None:
    assert _ranges(range(16)) == "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15"
    assert _ranges(range(17)) == "0 1 2 3 4 5 6 7 ... 13 14 15 16"
