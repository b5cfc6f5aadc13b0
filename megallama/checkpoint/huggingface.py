"""The Hugging Face side of a checkpoint: config.json both ways, generation_config.json, the tokenizer.

`model/` must open with ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer``, in
transformers 4 and 5, so rotary settings are written in the form that both read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megallama.checkpoint import disk
from megallama.checkpoint.disk import CheckpointError
from megallama.config.schema import Config, ModelConfig, RopeScaling
from megallama.config.special_tokens import NAMES, read_settings, special_id
from megallama.plan.params import heads

META_CONTEXT = 131_072  # tokens, of LLaMA 3.1 and 3.2
TORCH_NAMES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_KEPT = ("chat_template", "padding_side")  # of a tokenizer_config.json beside it
_ROPE = {key: key for key in ("factor", "low_freq_factor", "high_freq_factor")} | {
    "original_max_position_embeddings": "original_max_position"  # Hugging Face's name of ours
}


def model_files(
    config: Config,
    tokenizer: Path | None,
    marks: Mapping[str, int | None] | None = None,
    longest: int | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> dict[str, bytes]:
    """The small files of model/ by name: configs and tokenizer.

    `marks`: "bos_id" and "eos_id" of the training's documents. Without an eos_id the tokenizer
    says; without a bos_id what stands before a document is the end of another, and so it is
    exported. `longest` is the longest sequence, default that of training; `log` hears what cannot
    be exported as it was.
    """
    marks, longest = marks or {}, longest or longest_sequence(config)
    special = special_tokens(tokenizer, marks) if tokenizer else {}
    bos_id = marks.get("bos_id")
    eos_id = special["eos"][1] if "eos" in special else marks.get("eos_id")
    ids = {"bos_token_id": eos_id if bos_id is None else bos_id, "eos_token_id": eos_id}
    generation = {"_from_model_config": True, **{k: v for k, v in ids.items() if v is not None}}
    out = {"config.json": _json(_config_json(config, longest) | ids), "generation_config.json": _json(generation)}
    return out | (_tokenizer_files(tokenizer, special, bos_id is not None, longest, log) if tokenizer else {})


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


def _config_json(config: Config, longest: int) -> dict[str, Any]:
    model = config.model
    n, k, d = heads(model)
    scaling: dict[str, Any] | None = None
    if model.rope_scaling is not None:
        scaling = {"rope_type": "llama3"} | {key: getattr(model.rope_scaling, ours) for key, ours in _ROPE.items()}
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
        "max_position_embeddings": longest,
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
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise CheckpointError(f"{path} has rotary scaling {kind!r}; only 'llama3' (and none) is supported")
        scaling = {ours: rope[key] for key, ours in _ROPE.items()} if kind == "llama3" else None
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
            rope_scaling=RopeScaling(**scaling) if scaling else None,
            tie_embeddings=found.get("tie_word_embeddings", False),
            init_std=found.get("initializer_range", 0.02),
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} does not describe a LLaMA: {error}") from error


def special_tokens(tokenizer: Path, marks: Mapping[str, int | None] | None = None) -> dict[str, tuple[str, int]]:
    """(text, id) of the "bos" and "eos" tokens of a tokenizer file, where it has them; `marks` win."""
    own: dict[str, int] = {}
    if tokenizer.suffix == ".json":
        vocabulary = held = json.loads(tokenizer.read_bytes())
        if merges_of(tokenizer) is None:
            model = held.get("model", {}).get("vocab", {})
            model = model if isinstance(model, dict) else {text: i for i, (text, _) in enumerate(model)}
            vocabulary = model | {token["content"]: token["id"] for token in held.get("added_tokens", [])}
    else:
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=str(tokenizer))
        vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
        own = {kind: i for kind, i in (("bos", pieces.bos_id()), ("eos", pieces.eos_id())) if i >= 0}
    ids = {kind: special_id(kind, tokenizer, vocabulary.get, own.get(kind)) for kind in NAMES}
    ids |= {kind: i for kind in NAMES if (i := (marks or {}).get(f"{kind}_id")) is not None}
    return {kind: (text, i) for kind in ids for text, i in vocabulary.items() if i == ids[kind]}


def own_tokenizer(small: Mapping[str, bytes]) -> bytes | None:
    """The tokenizer among small files that we use: a .model of SentencePiece (not LLaMA 3's), or a tokenizer.json."""
    model = small.get("tokenizer.model", b"")
    return model if model[:1] == b"\n" else small.get("tokenizer.json")  # SentencePiece's are protocol buffers


def merges_of(tokenizer: Path) -> Path | None:
    """The merges.txt that belongs to GPT-2's vocab.json; None for the other kinds of tokenizer, which are one file."""
    name = tokenizer.name
    return tokenizer.with_name(name.removesuffix("vocab.json") + "merges.txt") if name.endswith("vocab.json") else None


def _tokenizer_files(
    tokenizer: Path, special: dict[str, tuple[str, int]], begun: bool, longest: int, log: Callable[[str], None]
) -> dict[str, bytes]:
    """A tokenizer's files, with which Hugging Face's programs give the ids of the training.

    `special` is of `special_tokens`; `begun`: every document begins with bos. A SentencePiece model
    comes with a tokenizer.json that no version rebuilds in its own way; where that cannot be had,
    `log` hears of it.
    """
    from megallama.checkpoint.sentencepiece_json import NotEqualError, begin_with, to_tokenizer  # only where needed

    existing = read_settings(tokenizer.with_name("tokenizer_config.json"))
    merges = merges_of(tokenizer)
    first, eos = special.get("bos" if begun else "eos"), special.get("eos")
    settings: dict[str, Any] = {key: existing[key] for key in _KEPT if key in existing}
    settings |= {f"{kind}_token": token[0] for kind, token in (("bos", first), ("eos", eos)) if token}
    settings |= {
        "add_bos_token": begun,
        "add_eos_token": False,
        # text never became a control token in training; chat templates of others need it to
        "split_special_tokens": "chat_template" not in existing,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
    }
    if merges is not None:
        settings |= {"tokenizer_class": "GPT2Tokenizer"} | ({"unk_token": eos[0]} if eos else {})
        files = {"vocab.json": tokenizer.read_bytes(), "merges.txt": merges.read_bytes()}
    elif tokenizer.suffix == ".json":
        files = {"tokenizer.json": _begun(tokenizer.read_bytes(), first if begun else None)}
    else:
        files = {"tokenizer.model": tokenizer.read_bytes()}
        try:
            found = to_tokenizer(files["tokenizer.model"])
            found.post_processor = begin_with(first if begun else None)
            settings["unk_token"] = found.model.unk_token
            files["tokenizer.json"] = found.to_str().encode()
        except NotEqualError as why:
            settings |= {"tokenizer_class": "LlamaTokenizer", "legacy": False, "unk_token": "<unk>"}
            log(
                f"{tokenizer} is exported without a tokenizer.json, for {why}; transformers may give other ids than "
                "the training had: use the exported tokenizer.model with the sentencepiece library"
            )
    return files | {"tokenizer_config.json": _json(settings)}


def _begun(raw: bytes, token: tuple[str, int] | None) -> bytes:
    """A tokenizer.json that puts `token`, and nothing else, around a text; `raw` itself where it does."""
    if token is None and not json.loads(raw).get("post_processor"):
        return raw
    from megallama.checkpoint.sentencepiece_json import Tokenizer, begin_with

    model = Tokenizer.from_str(raw.decode())
    bare, whole = (model.encode("a", add_special_tokens=add).ids for add in (False, True))
    if whole == [*([token[1]] if token else []), *bare]:
        return raw
    model.post_processor = begin_with(token)
    return model.to_str().encode()


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
