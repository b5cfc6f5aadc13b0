"""`megallama evaluate` and `compare`: texts, items, results, layouts, and what they refuse."""

from __future__ import annotations

import json
import math
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from megallama.cli import command
from megallama.config.errors import ConfigError, DataError
from megallama.data.tokenizer import load_tokenizer
from megallama.evaluation.evaluate import evaluate, opened, read_texts
from megallama.evaluation.harness import Encoder, Item, Request, read_items
from megallama.evaluation.results import beyond_noise, compare, read_results, table
from megallama.evaluation.scorer import Row, windows
from megallama.inference.generate import Sampling, generate_batch, load_llama
from tests.inference.test_generate import byte_tokenizer, reference

ITEMS = [
    {"context": "the cat", "choices": [" sat", " sit", " set on"], "gold": 0},
    {"context": "a dog ", "choices": ["barks", "flies"], "gold": 1},
    {"context": "", "choices": ["one", "two"], "gold": 0},
]
TEXTS = ["the cat sat on the mat. " * 9, "a dog barks.", "x"]
main, compare_main = command("evaluate"), command("compare")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA of Hugging Face whose tokenizer has a token per byte, a beginning and an end."""
    path = tmp_path_factory.mktemp("model")
    reference(path, vocab_size=258, bos_token_id=256, eos_token_id=257)
    named_byte_tokenizer(path)
    (path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (path / "held.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def named_byte_tokenizer(path: Path) -> None:
    """Bytes, 256 which begins and 257 which ends a document; it puts nothing before a text."""
    byte_tokenizer(path)
    says = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "add_bos_token": False}
    (path / "tokenizer_config.json").write_text(json.dumps(says))


def log_probs(folder: Path, ids: list[int]) -> np.ndarray:
    """Of every id but the first, by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).double()
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


def test_texts_and_items_are_scored_as_transformers_would(folder: Path) -> None:
    """To what its angles in fp32 leave."""
    asked = Request(folder, ("precision.dtype=fp64",), (folder / "held.jsonl",), (folder / "items.jsonl",))
    shown: list[str] = []
    results = evaluate(asked, shown.append, lambda text: None)
    tokenizer = load_tokenizer(folder)
    rows = [row for text in TEXTS for row in windows(tokenizer.encode(text), 256, 64)]
    parts = [log_probs(folder, list(row.ids))[row.first - 1 :] for row in rows]
    total, size = np.concatenate(parts), sum(len(text.encode()) for text in TEXTS)
    held = results["texts"]["held.jsonl"]
    assert held["tokens"] == len(total) == size  # a token per byte
    assert held["documents"] == 3
    assert held["loss"] == pytest.approx(-total.mean(), abs=1e-6)
    assert held["perplexity"] == pytest.approx(math.exp(-total.mean()), rel=1e-6)
    assert held["bits_per_byte"] == pytest.approx(-total.sum() / math.log(2) / size, abs=1e-6)
    first = np.array([part[0] for row, part in zip(rows, parts, strict=True) if row.first == 1])
    assert held["loss_by_position"]["1"] == pytest.approx(-first.mean(), abs=1e-6)
    assert list(held["loss_by_position"]) == ["1", "2-3", "4-7", "8-15", "16-31", "32-63", "64-127"]

    own = []
    for context, choices in (("the cat", ITEMS[0]["choices"]), ("a dog", [" barks", " flies"]), ("", ["one", "two"])):
        before = tokenizer.encode(context) or [256]
        own.append([log_probs(folder, before + tokenizer.encode(c))[len(before) - 1 :].sum() for c in choices])
    want = [float(np.argmax(sums) == item["gold"]) for sums, item in zip(own, ITEMS, strict=True)]
    assert results["items"]["items"]["acc"] == want
    long = [[s / len(c) for s, c in zip(sums, i["choices"], strict=True)] for sums, i in zip(own, ITEMS, strict=True)]
    norm = [float(np.argmax(x) == item["gold"]) for x, item in zip(long, ITEMS, strict=True)]
    assert results["items"]["items"]["acc_norm"] == norm
    bits = [-s[i["gold"]] / math.log(2) / len(i["choices"][i["gold"]]) for s, i in zip(own, ITEMS, strict=True)]
    np.testing.assert_allclose(results["items"]["items"]["bits_per_byte"], bits, atol=1e-6)
    assert results["results"]["items"]["acc,none"] == pytest.approx(np.mean(want))
    assert results["results"]["items"]["acc_stderr,none"] == pytest.approx(np.std(want, ddof=1) / math.sqrt(3))
    assert shown[0].startswith("text        loss    perplexity")
    assert f"held.jsonl  {held['loss']:.4f}" in shown[0]


def test_windows_score_every_id_once_with_all_the_context_there_is() -> None:
    assert windows([], 9, 4) == []
    assert windows([1, 2, 3], 9, 4) == [Row([9, 1, 2, 3], 1)]
    rows = windows([*range(10)], 99, 4)
    assert rows == [Row([99, 0, 1, 2, 3], 1), Row([3, 4, 5, 6, 7], 1), Row([5, 6, 7, 8, 9], 3)]
    for length in range(1, 30):
        scored = [i for row in windows([*range(length)], 99, 4) for i in row.ids[row.first :]]
        assert scored == [*range(length)]


def test_rows_are_cut_as_the_harness_does(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    plain, encoder = tokenizer.encode, Encoder(tokenizer, 8, bos=False, prefix=256)
    space = plain(" ")[0]
    assert encoder.row("ab ", "cd") == Row([*plain("ab"), space, *plain("cd")], 2)
    assert encoder.row("", "cd") == Row([256, *plain("cd")], 1)
    assert encoder.row("abcdefghijkl", "xy") == Row(plain("fghijklxy"), 7)
    begins = Encoder(tokenizer, 8, bos=True, prefix=256)
    assert begins.row("ab", "cd") == Row([256, *plain("abcd")], 3)
    with pytest.raises(DataError, match="a continuation has 9 tokens, and the context 8"):
        encoder.row("a", "123456789")


def test_the_command_writes_results_that_compare_reads(folder: Path, tmp_path: Path, capfd: Any) -> None:
    words = [str(folder), "--items", str(folder / "items.jsonl"), "--data", str(folder / "held.jsonl")]
    assert main([*words, "--output", str(tmp_path / "a.json"), "precision.dtype=fp64", "--limit", "2"]) == 0
    assert main([*words, "--output", str(tmp_path / "b.json"), "--limit", "2"]) == 0
    out = capfd.readouterr().out
    assert out.count("loss by tokens before") == 2
    a = read_results(tmp_path / "a.json")
    assert a["n-samples"]["items"] == {"original": 2, "effective": 2}
    assert a["texts"]["held.jsonl"]["documents"] == 2
    assert (a["config"]["dtype"], a["config"]["context"], a["config"]["ranks"]) == ("fp64", 64, 1)
    assert compare_main([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    rows = capfd.readouterr().out.splitlines()
    assert rows[1].split()[:3] == ["items", "acc", f"{a['results']['items']['acc,none']:.4f}"]
    assert rows[1].endswith("+0.0000 ± 0.0000")


def result(values: list[float], task: str = "t", metric: str = "acc", items: bool = True) -> dict[str, Any]:
    own = np.array(values)
    error = float(own.std(ddof=1) / math.sqrt(len(own)))
    out = {
        "results": {task: {f"{metric},none": float(own.mean()), f"{metric}_stderr,none": error}},
        "n-shot": {task: 0},
    }
    return out | ({"items": {task: {metric: values}}} if items else {})


def test_differences_beyond_noise_are_marked() -> None:
    draw = np.random.default_rng(5)
    base = (draw.random(400) < 0.5).astype(float)
    better = base.copy()
    better[:12] = 1 - better[:12]
    better[:12] = np.maximum(base[:12], better[:12])  # right wherever the base was, and in a few more
    difference, error = beyond_noise(base.tolist(), better.tolist())
    assert difference == pytest.approx((better - base).mean())
    assert error == pytest.approx((better - base).std() / 20, rel=0.1)
    lines = compare({"base": result(base.tolist()), "better": result(better.tolist())})
    assert lines[1].endswith("*")  # by item it is clear
    alone = compare({"base": result(base.tolist(), items=False), "better": result(better.tolist(), items=False)})
    assert not alone[1].endswith("*")  # from two standard errors it is not
    with pytest.raises(DataError, match="have no task in common"):
        compare({"a": result([0, 1.0]), "b": result([0, 1.0], task="u")})


def test_the_papers_numbers_stand_beside_the_same_task_only() -> None:
    lines = table(result([0.0, 1.0, 1.0], "piqa", "acc_norm"))
    assert lines[0].split()[-8:] == ["LLaMA", "7B", "LLaMA", "13B", "LLaMA", "33B", "LLaMA", "65B"]
    assert lines[1].split()[-4:] == ["0.798", "0.801", "0.823", "0.828"]
    assert "LLaMA" not in "".join(table(result([0.0, 1.0], "piqa", "acc")))
    few = result([0.0, 1.0], "piqa", "acc_norm") | {"n-shot": {"piqa": 5}}
    assert "LLaMA" not in "".join(table(few))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name a checkpoint first"),
        (["parallel.tp=2", "--items", "i"], "name a checkpoint first"),
        (["{folder}"], "nothing to evaluate on; give --data, --items or --tasks"),
        (["{folder}", "--items", "{folder}/items.jsonl", "--limit", "0"], "--limit=0 is too small; write 1 or more"),
        (["{folder}", "--items", "{folder}/no.jsonl"], "no.jsonl does not exist"),
        (["{folder}", "--data", "{folder}/no.jsonl"], "no.jsonl does not exist"),
        (["{folder}", "--items", "{folder}/held.jsonl"], "held.jsonl:1 is not an item; write lines like"),
        (["{folder}", "--items", "{folder}/items.jsonl", "--context", "65"], "more than the 64 tokens"),
        (["{folder}", "--items", "{folder}/items.jsonl", "paralel.tp=2"], "unknown setting 'paralel.tp'"),
        (["{folder}", "--items", "{folder}/items.jsonl", "parallel.tp=2"], "parallel.tp=2"),
        (
            ["{folder}", "--items", "{folder}/items.jsonl", "model.num_layers=2"],
            "the checkpoint says what the model is",
        ),
        (["{folder}/nothing", "--items", "{folder}/items.jsonl"], "nothing is not a folder"),
        (["{folder}", "--items", "{folder}/items.jsonl", "{folder}/items.jsonl"], "two tasks would be called 'items'"),
        (["{folder}", "--items", "{folder}/items.jsonl", "--output", "{folder}"], "cannot be written; name a file"),
        (["{folder}", "--items", "{folder}/items.jsonl", "--output", "{folder}/items.jsonl/r"], "cannot be written"),
        (["{folder}", "--itms", "x"], "did you mean --items?"),
    ],
    ids=lambda x: " ".join(x)[:60] if isinstance(x, list) else "",
)
def test_what_can_be_typed_wrong(words: list[str], said: str, folder: Path, capfd: Any) -> None:
    assert main([word.format(folder=folder) for word in words]) == 2
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        '{"context": "a", "choices": ["b", "c"]}',
        '{"context": "a", "choices": ["b", "c"], "gold": 2}',
        '{"context": "a", "choices": ["b"], "gold": 0}',
        '{"context": "a", "choices": ["b", ""], "gold": 0}',
        '{"context": 1, "choices": ["b", "c"], "gold": 0}',
        '{"context": "a", "choices": ["b", "c"], "gold": true}',
        "no json",
    ],
)
def test_a_line_that_is_no_item_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "i.jsonl"
    file.write_text(json.dumps(ITEMS[0]) + "\n\n" + line + "\n")
    with pytest.raises(DataError, match=r"i\.jsonl:3 is not an item"):
        read_items(file)
    file.write_text("\n")
    with pytest.raises(DataError, match="has no items"):
        read_items(file)
    file.write_text(json.dumps(ITEMS[0]))
    assert read_items(file) == [Item(context="the cat", choices=(" sat", " sit", " set on"), gold=0)]


def test_items_are_lines_of_any_characters(tmp_path: Path) -> None:
    file, item = tmp_path / "i.jsonl", Item(context="a\u2028b\x85c", choices=(" \x0cd", " \xe9"), gold=1)
    line = json.dumps(item.model_dump(), ensure_ascii=False).encode()
    file.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n" + line)
    assert read_items(file) == [item, item]
    file.write_bytes(line + b"\n" + line.decode().encode("latin-1", "replace"))
    with pytest.raises(DataError, match=r"i\.jsonl:2 is not an item"):
        read_items(file)


def test_what_was_done_before_an_error_is_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (long := tmp_path / "long.jsonl").write_text(json.dumps({"context": "", "choices": ["x" * 99, "y"], "gold": 0}))
    (output := tmp_path / "r.json").write_text("an older one")
    shown: list[str] = []
    asked = Request(folder, items=(folder / "items.jsonl", long), output=output)
    with pytest.raises(DataError, match="long: a continuation has 99 tokens"):
        evaluate(asked, shown.append, lambda text: None)
    assert output.read_text() == "an older one"
    assert list(read_results(tmp_path / "r.json.part")["results"]) == ["items"]
    assert shown[0].splitlines()[1].startswith("items")
    monkeypatch.setattr("megallama.evaluation.evaluate.score_texts", lambda *x: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        evaluate(asked._replace(data=(folder / "held.jsonl",)), shown.append, lambda text: None)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and output.read_text() == "an older one"
    said: list[str] = []
    evaluate(asked._replace(items=asked.items[:1]), shown.append, said.append)
    assert said == [f"results are in {output}, in place of older ones"]
    assert list(read_results(output)["results"]) == ["items"]


@pytest.mark.parametrize(
    "text", ['{"a": 1}', '{"results": {"t": 1}}', '{"results": {}, "items": {"t": 1}}', "[1]", "\xff"]
)
def test_results_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text, "latin-1")
    with pytest.raises(DataError, match=r"r\.json is no result of an evaluation"):
        read_results(tmp_path / "r.json")


def test_without_the_harness_tasks_say_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    asked = Request(folder, tasks=("piqa",))
    with pytest.raises(ConfigError, match=r"pip install 'megallama\[eval\]', or give --items"):
        evaluate(asked, lambda text: None, lambda text: None)


def test_answers_are_those_of_each_prompt_alone(folder: Path) -> None:
    tokenizer, llama = load_tokenizer(folder), load_llama(folder, torch.float64)
    texts = ["the cat", "a dog barks", "x", "long " * 30, "the cat"]
    limits = [(("\n",), 9), ((), 5), ((), 5), ((), 9), (("e", "a"), 20)]
    asked = [(tokenizer.encode(text), *limit) for text, limit in zip(texts, limits, strict=True)]
    with opened(folder, ["precision.dtype=fp64"]) as model:
        said = model.answers(asked, tokenizer)
    for text, (ids, stop, most) in zip(said, asked, strict=True):
        prompt = ids[most - 64 :]  # of what does not fit the end is kept
        (alone,) = generate_batch(llama, [prompt], most, Sampling(temperature=0), tokenizer=tokenizer, stop=stop)
        assert text == alone.text
    assert len({*said}) > 2


def test_sources_of_one_name_stay_apart(tmp_path: Path) -> None:
    for name in ("a/x.jsonl", "b/x.jsonl", "b/y.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a text"}')
    found = read_texts([tmp_path / "a" / "x.jsonl", tmp_path / "b"], str, "text", None, print)
    sources = [str(tmp_path / "a" / "x.jsonl"), str(tmp_path / "b" / "x.jsonl"), "y.jsonl"]
    assert [*found] == [(source, "a text", 6.0) for source in sources]


def test_a_pair_is_read_once_however_it_is_named(folder: Path, tmp_path: Path) -> None:
    words = [str(folder / "held.jsonl"), "--tokenizer", str(folder), "--output", str(tmp_path / "held")]
    assert command("prepare")(words) == 0
    found: list[dict[str, Any]] = []
    for given in ((tmp_path / "held",), tuple(sorted(tmp_path.glob("held*")))):
        found.append(evaluate(Request(folder, data=given), lambda text: None, lambda text: None)["texts"])
    assert len(given) > 2 and found[0] == found[1]
    size = sum(len(text) for text in TEXTS)
    assert found[0]["held"]["tokens"] == size + len(TEXTS)  # and the ends of documents
    assert found[0]["held"]["documents"] == len(TEXTS)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_of_a_worker_that_only_evaluates_the_weights_are_all_there_is(dtype: str, folder: Path) -> None:
    with opened(folder, [f"precision.dtype={dtype}"]) as model:
        worker = model.scorer.worker
        (buffers,) = worker.buffers.values()
        size = buffers.layout.numel * (2 if dtype == "bf16" else 4)
        held = [buffers.weights, buffers.grads]
        for shard in worker.optimizer.shards(owned_only=False):
            assert [*shard.state] == ["master"]
            held += shard.state.values()
        bytes_of = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        assert size <= sum(bytes_of.values()) <= size + 4
        assert float(buffers.weights.float().std()) > 0.1
