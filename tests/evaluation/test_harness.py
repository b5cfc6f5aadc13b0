"""Tasks of lm-evaluation-harness, where it is installed, against its own model on the same weights."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megallama.config.errors import ConfigError, DataError
from megallama.evaluation.evaluate import evaluate
from megallama.evaluation.harness import Request
from megallama.evaluation.scorer import Scorer
from tests.evaluation.test_evaluate import named_byte_tokenizer
from tests.inference.test_generate import reference
from tests.pool import Pool

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'megallama[eval]'")

GOALS = ["keep bread fresh", "open a jar", "dry wet shoes", "find a stud", "cool soup", "clean glass"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    reference(path / "model", vocab_size=258, bos_token_id=256, eos_token_id=257, max_position_embeddings=512)
    named_byte_tokenizer(path / "model")
    data = path / "data" / "piqa" / "plain_text" / "validation"
    data.mkdir(parents=True)
    rows = [{"goal": g, "sol1": f"{g} slowly", "sol2": "no", "label": i % 2} for i, g in enumerate(GOALS)]
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(folder: Path, *tasks: str, shots: int | None = None) -> tuple[dict, list[str], list[str]]:
    shown: list[str] = []
    said: list[str] = []
    asked = Request(folder / "model", tasks=tasks, task_data=folder / "data", shots=shots)
    return evaluate(asked, shown.append, said.append), shown, said


def test_accuracies_are_those_of_the_harness_and_its_own_model(folder: Path) -> None:
    pytest.importorskip("accelerate", reason="the harness's own model needs accelerate")
    import lm_eval

    from megallama.evaluation import harness

    results, shown, _ = run(folder, "piqa")
    library = harness._library()
    config = harness._local(library.read(library.index["piqa"].yaml_path), folder / "data", print)
    options = f"pretrained={folder / 'model'},dtype=float32"
    found = lm_eval.simple_evaluate(
        "hf", model_args=options, tasks=[library.Task(config=config)], bootstrap_iters=9, device="cpu"
    )
    for name in ("acc,none", "acc_norm,none", "acc_stderr,none"):
        assert results["results"]["piqa"][name] == pytest.approx(found["results"]["piqa"][name], abs=1e-12)
    assert "LLaMA 65B" in shown[0]


def test_the_papers_set_says_what_it_leaves_out(folder: Path) -> None:
    results, _, said = run(folder, "llama1")
    assert list(results["results"]) == ["piqa"]
    assert results["n-samples"]["piqa"]["original"] == len(GOALS)
    assert results["configs"]["piqa"]["split"] == "validation"
    left = results["left_out"]
    assert "has no boolq/boolq with train" in left["boolq"]
    assert "has no trivia_qa/rc.wikipedia.nocontext" in left["triviaqa"]
    assert "runs code that the model writes" in left["humaneval"]
    assert "has no allenai/real-toxicity-prompts" in left["realtoxicityprompts"]
    assert sum(line.startswith("left out: ") for line in said) == len(left) == 19


def test_a_task_asked_for_by_name_must_be_there(folder: Path) -> None:
    with pytest.raises(DataError, match="boolq: .* has no boolq/boolq"):
        run(folder, "boolq")
    with pytest.raises(ConfigError, match="no such task; did you mean piqa"):
        run(folder, "piqaa")
    with pytest.raises(ConfigError, match="mbpp: it runs code"):
        run(folder, "mbpp")


def test_every_rank_of_a_launcher_has_the_results(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")  # where the harness by itself would give none
    assert list(run(folder, "piqa")[0]["results"]) == ["piqa"]


def test_a_wrong_name_is_said_before_anything_is_scored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def score(self: Scorer, rows: object) -> None:
        raise AssertionError("scored")

    monkeypatch.setattr(Scorer, "__call__", score)
    with pytest.raises(ConfigError, match="no such task; did you mean piqa"):
        run(folder, "piqa", "piqaa")


@pytest.mark.parametrize(
    "text", ["", "no rows", '{"goal": "g", "sol1": "a"}'], ids=["empty", "broken", "a column less"]
)
def test_data_that_cannot_be_read_name_the_task(text: str, folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "piqa" / "plain_text" / "validation"
    data.mkdir(parents=True)
    (data / "rows.jsonl").write_text(text)
    with pytest.raises(ConfigError, match="piqa: it cannot be loaded: "):
        evaluate(Request(folder / "model", tasks=("piqa",), task_data=tmp_path), print, print)


def test_items_of_ready_requests_are_a_tasks_data(tmp_path: Path) -> None:
    from megallama.evaluation import harness

    library, said = harness._library(), list[str]()
    for place, doc in (
        ("gsm8k/gold_bpb_5shot", {"question": "2 + 3?", "answer": "2 + 3 = 5\n#### 5"}),
        ("minerva_math_algebra/gold_bpb_0shot", {"problem": "x?", "solution": r"It is $\boxed{2}$."}),
    ):
        (folder := tmp_path / "oe_eval_tasks" / place).mkdir(parents=True)
        rows = [{"doc": doc, "request": {"context": "c"}, "idx": i} for i in range(2)]
        with gzip.open(folder / "requests.jsonl.gz", "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    config = library.read(library.index["gsm8k"].yaml_path)
    task = library.Task(config=harness._local(config, tmp_path / "hf_datasets", said.append))
    assert [*task.eval_docs] == [{"question": "2 + 3?", "answer": "2 + 3 = 5\n#### 5"}] * 2
    assert said[0].startswith("gsm8k: solved examples are those of test, for there is no train in ")
    config = {"task": "m", "dataset_path": "a/hendrycks_math", "dataset_name": "algebra", "test_split": "test"}
    config |= {"doc_to_text": "{{q}}", "doc_to_target": "{{q}}"}
    config["process_docs"] = lambda docs: docs.rename_column("problem", "q")
    task = library.Task(config=harness._local(config, tmp_path / "hf_datasets", said.append))
    assert [doc["q"] for doc in task.eval_docs] == ["x?"] * 2  # the task's own program comes after


def test_answers_are_generated(folder: Path) -> None:
    data = folder / "data" / "nq_open" / "none" / "validation"
    data.mkdir(parents=True)
    rows = [{"question": f"what is {goal}", "answer": ["x", goal]} for goal in GOALS]
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results, shown, _ = run(folder, "nq_open")
    assert results["items"]["nq_open"]["exact_match"] == [0.0] * len(GOALS)  # of random weights
    assert "LLaMA 65B" in shown[0]


def test_a_training_measures_a_task_as_its_checkpoint_does(folder: Path, pool: Pool, tmp_path: Path) -> None:
    settings = {
        "data": {"synthetic": True, "tokenizer": str(folder / "model" / "tokenizer.json")},
        "batch": {"seq_length": 128},
        "train": {"steps": 2},
        "checkpoint": {"interval": 2},
        "eval": {"tasks": ["piqa"], "tasks_interval": 2, "task_data": str(folder / "data")},
    }
    (answer,) = pool.run(1, "tests.evaluation.in_training:run", str(tmp_path / "run"), settings)
    assert answer.get("status") == 0, answer
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (record,) = [line for line in lines if line["kind"] == "task"]
    step = tmp_path / "run" / "checkpoints" / "step-00000002"
    asked = Request(step, tasks=("piqa",), task_data=folder / "data")
    found = evaluate(asked, lambda text: None, lambda text: None)["results"]["piqa"]
    assert {"acc", "acc_norm", "bits_per_byte"} <= set(record["metrics"])
    assert record["metrics"] == pytest.approx({n: found[f"{n},none"] for n in record["metrics"]}, rel=1e-12)
    assert record["items"] == len(GOALS)


def test_code_is_run_only_if_that_is_allowed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HumanEval's and MBPP's own definitions, on questions of ours, with answers that are known."""
    from megallama.evaluation.evaluate import Opened

    tests = ["assert add(2, 3) == 5", "assert add(0, 1) == 1", "assert add(-1, 1) == 0"]
    prompt = "def add(a, b):\n"
    question = {"prompt": prompt, "entry_point": "add", "test": f"def check(add):\n    {tests[0]}\n"}
    rows = {
        "openai_humaneval": [question] * 2,
        "mbpp/full": [{"text": "Add.", "code": prompt, "test_list": tests}] * 2,
    }
    for place, lines in rows.items():
        (data := folder / "code" / place / "test").mkdir(parents=True)
        (data / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = Request(folder / "model", tasks=("humaneval", "mbpp"), task_data=folder / "code", shots=0)
    with pytest.raises(ConfigError, match="humaneval: it runs code that the model writes, as `megallama evaluate --"):
        evaluate(asked, lambda text: None, lambda text: None)

    def answers(self: Opened, asked: list, tokenizer: object) -> list[str]:
        texts = [tokenizer.decode(ids) for ids, _, _ in asked]
        bodies = ["    return a + b", "    return a * b"]
        return [body if text.endswith(prompt) else prompt + body for text, body in zip(texts, bodies, strict=True)]

    monkeypatch.setattr(Opened, "answers", answers)
    found = evaluate(asked._replace(allow_code=True), lambda text: None, lambda text: None)
    assert found["items"]["humaneval"]["pass@1"] == [1.0, 0.0] == found["items"]["mbpp"]["pass_at_1"]
