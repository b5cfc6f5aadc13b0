"""Scaled rotary frequencies are those of transformers; so are rotated heads; configurations and files have them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megallama.checkpoint.disk import CheckpointError
from megallama.checkpoint.huggingface import model_files, read_model_config
from megallama.config.errors import ConfigError
from megallama.config.load import load, to_toml
from megallama.config.schema import ModelConfig, RopeScaling
from megallama.convert.compare_logits import compare_logits, compare_with_others
from megallama.convert.source import open_source
from megallama.inference.generate import load_llama
from megallama.kernels.pointwise import attention_factor, inverse_frequencies, rope_tables
from tests.convert.formats import GQA, hf_folder
from tests.inference.test_generate import logits_of

transformers = pytest.importorskip("transformers")

KINDS: dict[str, dict[str, Any]] = {
    "llama3": {"factor": 8.0, "original_max_position": 8192},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position": 4096},
    "yarn-given": {
        "factor": 16.0, "original_max_position": 48, "beta_fast": 20.0, "beta_slow": 2.0, "attention_factor": 1.25,
    },
    "yarn-narrow": {"factor": 1.0, "original_max_position": 16},  # stretches nothing
}  # fmt: skip


def scaling(name: str) -> RopeScaling:
    return RopeScaling(kind=name.partition("-")[0], **KINDS[name])  # type: ignore[arg-type]


def hugging_face(found: RopeScaling, theta: float) -> dict[str, Any]:
    names = {"factor": found.factor, "original_max_position_embeddings": found.original_max_position}
    if found.kind == "linear":
        names = {"factor": found.factor}
    keys = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_fast", "beta_slow", "attention_factor")}
    own = {key: value for key in keys.get(found.kind, ()) if (value := getattr(found, key)) is not None}
    return {"rope_type": found.kind, "rope_theta": theta, **names, **own}


@pytest.mark.parametrize("name", KINDS)
def test_angles_are_those_of_transformers(name: str) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from tests.model.reference import lifted

    for d, theta in ((8, 1e4), (64, 1e4), (128, 5e5)):
        found = scaling(name)
        rope = hugging_face(found, theta)
        config = transformers.LlamaConfig(hidden_size=d, num_attention_heads=1, head_dim=d, rope_parameters=rope)
        with lifted(torch.float64):
            theirs, grown = ROPE_INIT_FUNCTIONS[found.kind](config)
        own = inverse_frequencies(d, theta, found, torch.float64)
        assert theirs.dtype == torch.float64
        assert ((own - theirs) / theirs).abs().max() <= 1e-12 and abs(attention_factor(found) - grown) <= 1e-12
        plain = inverse_frequencies(d, theta, None, torch.float64)
        assert torch.allclose(own, plain, rtol=1e-12) == (found.factor == 1)


def test_the_formulas_by_hand() -> None:
    linear, yarn = (RopeScaling(kind=kind, factor=4.0, original_max_position=4096) for kind in ("linear", "yarn"))
    plain = inverse_frequencies(64, 1e4, None, torch.float64)
    assert torch.equal(inverse_frequencies(64, 1e4, linear, torch.float64), plain / 4)
    scaled = inverse_frequencies(64, 1e4, yarn, torch.float64)
    turns = plain * 4096 / (2 * math.pi)  # over the original context
    fast, slow = int((turns >= 32).sum()) - 1, int((turns >= 1).sum())  # the last that turns so often, the first not
    ramp = torch.arange(32, dtype=torch.float64).sub(fast).div(slow - fast).clamp(0, 1)
    assert 0 < fast < slow < 31 and torch.allclose(scaled, plain * (1 - ramp) + plain / 4 * ramp, rtol=1e-14)
    cos, sin = rope_tables(9, 64, 1e4, yarn, torch.float64, torch.device("cpu"))
    angles = torch.outer(torch.arange(9).double(), scaled)
    grown = 0.1 * math.log(4) + 1
    assert torch.allclose(cos[:, 0], angles.cos() * grown) and torch.allclose(sin[:, 0], angles.sin() * grown)


@pytest.mark.parametrize("name", KINDS)
def test_files_of_transformers_and_back(name: str, tmp_path: Path) -> None:
    """Exported, read by transformers, saved by it, read by us; logits of both, and of a second reader, agree."""
    model = GQA.model_copy(update={"rope_theta": 3e4, "rope_scaling": scaling(name)})
    hf_folder(tmp_path / "hf", model, torch.float32)
    assert read_model_config(tmp_path / "hf").rope_scaling == model.rope_scaling
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "again")
    assert read_model_config(tmp_path / "again") == read_model_config(tmp_path / "hf")
    tokens = torch.arange(40) % 97
    with torch.no_grad():
        want = theirs(tokens[None]).logits[0, 8:]
    got = logits_of(load_llama(tmp_path / "hf"), tokens.tolist(), 9)
    assert (got - want).norm() / want.norm() < 2e-5
    with open_source(tmp_path / "hf") as source:
        assert compare_logits(source, source, "fp32") == 0.0
        assert compare_with_others(source, "fp32")[1] == "transformers"  # type: ignore[index]


def test_the_longest_sequence_of_an_exported_model() -> None:
    for kind, longest in ("linear", 512), ("yarn", 4 * 8192):
        words = [f"model.rope_scaling.kind={kind}", "model.rope_scaling.factor=4", "batch.seq_length=512"]
        config = load(None, words, need_data=False)
        assert json.loads(model_files(config, None)["config.json"])["max_position_embeddings"] == longest
        assert f'rope_scaling = {{kind = "{kind}", factor = 4.0' in to_toml(config)


@pytest.mark.parametrize(
    "rope, message",
    [
        ({"type": "dynamic", "factor": 2.0}, "rotary scaling 'dynamic'; only 'llama3', 'linear', 'yarn' "),
        ({"rope_type": "linear"}, "does not describe a LLaMA: 'factor'"),
        ({"rope_type": "yarn", "factor": 2.0}, "does not describe a LLaMA: 'original_max_position_embeddings'"),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "truncate": False},
            "rotary scaling 'yarn' with truncate=False, which is not supported",
        ),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "mscale": 1.0},
            "rotary scaling 'yarn' with mscale=1.0, which is not supported",
        ),
    ],
    ids=["kind", "factor", "original", "truncate", "mscale"],
)
def test_scalings_that_nobody_here_computes_are_refused(rope: dict[str, Any], message: str, tmp_path: Path) -> None:
    hf_folder(tmp_path / "hf", GQA)
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_scaling": rope}))
    with pytest.raises(CheckpointError, match=message):
        read_model_config(tmp_path / "hf")


@pytest.mark.parametrize(
    "words, message",
    [
        ("kind=yarn beta_slow=32", "beta_slow=32.0 is not below model.rope_scaling.beta_fast=32.0; YaRN uses 1.0 and"),
        ("kind=linear original_max_position=64", 'original_max_position=64 is not read with kind="linear"; leave it'),
        ("kind=yarn low_freq_factor=2", 'model.rope_scaling.low_freq_factor=2.0 is not read with kind="yarn"; leave'),
        ("beta_fast=2", 'model.rope_scaling.beta_fast=2.0 is not read with kind="llama3"; leave it out'),
        ("kind=ntk", 'model.rope_scaling.kind="ntk" must be one of "llama3", "linear", "yarn"'),
        ("kind=yarn attention_factor=0", "model.rope_scaling.attention_factor=0 must be a number above 0"),
    ],
    ids=["order", "linear", "yarn", "llama3", "unknown", "zero"],
)
def test_settings_that_do_not_belong_together(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(None, [f"model.rope_scaling.{word}" for word in words.split()], need_data=False)
    assert message in str(error.value)
    with pytest.raises(ConfigError, match="model.rope_theta=1.0 is not above 1, as YaRN needs"):
        load(None, ["model.rope_scaling.kind=yarn", "model.rope_theta=1"], need_data=False)


def test_a_preset_of_llama_3_1_may_take_another_kind() -> None:
    config = load(None, ["model.preset=llama3.1-8b", "model.rope_scaling.kind=yarn"], need_data=False)
    assert config.model.rope_scaling == RopeScaling(kind="yarn", factor=8.0)
    assert ModelConfig(rope_scaling={"factor": 8.0}).rope_scaling == RopeScaling()  # type: ignore[arg-type]  # saved before
