"""The Hugging Face side of a checkpoint: config.json both ways, generation_config.json, the tokenizer.

`model/` must open with ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer``, in transformers
4 and 5 alike, so rotary settings are written in the form that both read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megallama.checkpoint import disk
from megallama.checkpoint.errors import CheckpointError
from megallama.config.schema import Config, ModelConfig, RopeScaling
from megallama.plan.params import heads

META_CONTEXT = 131_072  # tokens, of LLaMA 3.1 and 3.2
TORCH_NAMES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_BEGIN = ("<|begin_of_text|>", "<s>", "<bos>")
_END = ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>")


def model_files(config: Config, tokenizer: Path | None) -> dict[str, bytes]:
    """The small files of model/ by name: configs and tokenizer."""
    special = special_tokens(tokenizer) if tokenizer else {}
    ids = {f"{kind}_token_id": special[kind][1] if kind in special else None for kind in ("bos", "eos")}
    generation = {"_from_model_config": True, **{k: v for k, v in ids.items() if v is not None}}
    out = {"config.json": _json(_config_json(config) | ids), "generation_config.json": _json(generation)}
    return out | (_tokenizer_files(tokenizer, special, longest_sequence(config)) if tokenizer else {})


def longest_sequence(config: Config) -> int:
    """The longest sequence of the exported model: that of training, or with scaled rotary frequencies theirs [tokens].

    Meta's scalings, of factor 8 in LLaMA 3.1 and 32 in 3.2, both go with 131,072.
    """
    scaling, trained = config.model.rope_scaling, config.batch.seq_length
    if scaling is None:
        return trained
    old = scaling.original_max_position
    known = (scaling.factor, old) in ((8.0, 8192), (32.0, 8192))
    return max(trained, META_CONTEXT if known else int(scaling.factor * old))


def _config_json(config: Config) -> dict[str, Any]:
    model = config.model
    n, k, d = heads(model)
    scaling = None
    if model.rope_scaling is not None:
        s = model.rope_scaling
        scaling = {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_position,
        }
    dtype = TORCH_NAMES[config.precision.dtype]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": n,
        "num_key_value_heads": k,
        "head_dim": d,
        "hidden_act": "silu",
        "max_position_embeddings": longest_sequence(config),
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def read_model_config(folder: Path) -> ModelConfig:
    """The architecture that a Hugging Face config.json describes.

    Raises: CheckpointError if it is missing, unreadable or no LLaMA.
    """
    path = folder / "config.json"
    try:
        found = disk.read_json(path)
    except disk.MissingError:
        raise CheckpointError(f"{path} does not exist; give a step folder or a Hugging Face model folder") from None
    fixed = {"model_type": "llama", "attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
    wrong = [f"{k}={found[k]!r} instead of {want!r}" for k, want in fixed.items() if found.get(k, want) != want]
    if wrong:
        raise CheckpointError(f"{path} is not a LLaMA: {', '.join(wrong)}")
    try:
        rope = {"rope_theta": found.get("rope_theta", 10000.0)}
        rope |= found.get("rope_parameters") or found.get("rope_scaling") or {}
        return ModelConfig(
            hidden_size=found["hidden_size"],
            num_layers=found["num_hidden_layers"],
            num_heads=found["num_attention_heads"],
            num_kv_heads=found.get("num_key_value_heads") or found["num_attention_heads"],
            head_dim=found.get("head_dim") or found["hidden_size"] // found["num_attention_heads"],
            ffn_hidden_size=found["intermediate_size"],
            vocab_size=found["vocab_size"],
            norm_eps=found.get("rms_norm_eps", 1e-6),
            rope_theta=rope["rope_theta"],
            rope_scaling=_rope_scaling(path, rope),
            tie_embeddings=found.get("tie_word_embeddings", False),
            init_std=found.get("initializer_range", 0.02),
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} does not describe a LLaMA: {error}") from error


def _rope_scaling(path: Path, rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(f"{path} has rotary scaling {kind!r}; only 'llama3' (and none) is supported")
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_position=rope["original_max_position_embeddings"],
    )


def special_tokens(tokenizer: Path) -> dict[str, tuple[str, int]]:
    """(text, id) of the "bos" and "eos" tokens of a tokenizer file, where it has them."""
    if tokenizer.suffix == ".json":
        held = json.loads(tokenizer.read_bytes())
        added = {t["content"]: t["id"] for t in held.get("added_tokens", [])} if merges_of(tokenizer) is None else held
        known = {"bos": _BEGIN, "eos": _END}
        first = {kind: next((t for t in names if t in added), None) for kind, names in known.items()}
        return {kind: (text, added[text]) for kind, text in first.items() if text is not None}
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(tokenizer))
    ids = {"bos": pieces.bos_id(), "eos": pieces.eos_id()}
    return {kind: (pieces.id_to_piece(i), i) for kind, i in ids.items() if i >= 0}


def merges_of(tokenizer: Path) -> Path | None:
    """The merges.txt that belongs to GPT-2's vocab.json; None for the other kinds of tokenizer, which are one file."""
    name = tokenizer.name
    return tokenizer.with_name(name.removesuffix("vocab.json") + "merges.txt") if name.endswith("vocab.json") else None


def _tokenizer_files(tokenizer: Path, special: dict[str, tuple[str, int]], longest: int) -> dict[str, bytes]:
    name = "tokenizer.json" if tokenizer.suffix == ".json" else "tokenizer.model"
    beside, merges = tokenizer.parent / "tokenizer_config.json", merges_of(tokenizer)
    settings: dict[str, Any] = {f"{kind}_token": text for kind, (text, _) in special.items()}
    more = {}
    if merges is not None:
        name, more = "vocab.json", {"merges.txt": merges.read_bytes()}
        settings |= {"tokenizer_class": "GPT2Tokenizer"}
    elif name == "tokenizer.json":
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    else:
        settings |= {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "legacy": False}
        # training documents begin without a bos token, so a prompt must too
        settings |= {"add_bos_token": False, "add_eos_token": False}
    settings["model_max_length"] = longest
    config = beside.read_bytes() if beside.is_file() else _json(settings)
    return {name: tokenizer.read_bytes(), "tokenizer_config.json": config, **more}


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
