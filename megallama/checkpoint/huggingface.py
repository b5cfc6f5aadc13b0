"""The Hugging Face side of a checkpoint: config.json both ways, and the tokenizer's files.

`model/` must open with ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer``, in transformers 4 and 5.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from megallama.checkpoint import disk
from megallama.checkpoint.disk import CheckpointError
from megallama.config.schema import ROPE, Config, ModelConfig, RopeScaling
from megallama.config.special_tokens import NAMES, merges_of, read_settings, special_id
from megallama.plan.params import heads

META_CONTEXT = 131_072  # tokens, of LLaMA 3.1 and 3.2
TORCH_NAMES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_THEIRS = {"original_max_position": "original_max_position_embeddings"}
_PLAIN = {"truncate": True, "mscale": None, "mscale_all_dim": None}  # of YaRN
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = range(1, 6)  # types of pieces in a .model file
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece writes for a space
Piece = tuple[str, float, int]  # text, score, type
PROBES = (
    # between the bars: white space, digits, characters of several codes, control tokens; then what is long
    *"| |  two   three |\n|\r\n\tx\t|1234567890|🦙👩\u200d👧🏽|naïve cafe\u0301 東京|\0 \ufeff\xa0|<s>|</s>".split("|"),
    *(" <s> a</s>b<unk><0x0A>", SPACE, f"{SPACE * 2}a {SPACE}", "a" * 99, " " * 70, "=-" * 50, "#" * 33),
    "def f(x):\n    return {'a': [x**2, -1e-9]}  # ==> !!! ... ---- ____",
)


def model_files(
    config: Config,
    tokenizer: Path | None,
    marks: Mapping[str, int | None] | None = None,
    longest: int | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> dict[str, bytes]:
    """The small files of model/ by name: configs and tokenizer.

    `marks`: "bos_id" and "eos_id" of the training's documents. Without an eos_id the tokenizer says;
    without a bos_id a document begins with the end of another. `log` hears what cannot be exported.
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
    """Of the exported model [tokens]: that of training, or what scaled rotary frequencies say."""
    scaling, trained = config.model.rope_scaling, config.batch.seq_length
    if scaling is None or scaling.kind == "linear":
        return trained
    old = scaling.original_max_position
    meta = scaling.kind == "llama3" and old == 8192 and scaling.factor in (8.0, 32.0)  # of LLaMA 3.1 and 3.2
    return max(trained, META_CONTEXT if meta else int(scaling.factor * old))


def _config_json(config: Config, longest: int) -> dict[str, Any]:
    model, dtype = config.model, TORCH_NAMES[config.precision.dtype]
    n, k, d = heads(model)
    if (rope := model.rope_scaling) is not None:
        values = {_THEIRS.get(key, key): getattr(rope, key) for key in ("factor", *ROPE[rope.kind])}
        scaling = {"rope_type": rope.kind, **{key: value for key, value in values.items() if value is not None}}
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
        "rope_scaling": scaling if rope else None,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def _read_rope(path: Path, rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ROPE:
        known = ", ".join(map(repr, ROPE))
        raise CheckpointError(f"{path} has rotary scaling {kind!r}; only {known} (and none) are supported")
    if wrong := [f"{k}={rope[k]!r}" for k, v in _PLAIN.items() if rope.get(k, v) != v]:
        raise CheckpointError(f"{path} has rotary scaling {kind!r} with {', '.join(wrong)}, which is not supported")
    names = {key: _THEIRS.get(key, key) for key in ("factor", *ROPE[kind])}
    optional = ROPE["yarn"][1:]
    return RopeScaling(kind=kind, **{k: rope[name] for k, name in names.items() if k not in optional or rope.get(name)})


def read_model_config(folder: Path) -> ModelConfig:
    """The architecture of a Hugging Face config.json. Raises: CheckpointError."""
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
            rope_scaling=_read_rope(path, rope),
            tie_embeddings=found.get("tie_word_embeddings", False),
            init_std=found.get("initializer_range", 0.02),
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} does not describe a LLaMA: {error}") from error


def special_tokens(tokenizer: Path, marks: Mapping[str, int | None] | None = None) -> dict[str, tuple[str, int]]:
    """(text, id) of a tokenizer's "bos" and "eos", where it has them; `marks` win."""
    own: dict[str, int] = {}
    if tokenizer.suffix == ".json":  # read by ourselves: the library takes its own version's files alone
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
    """The tokenizer in use: SentencePiece's .model (not LLaMA 3's), or tokenizer.json."""
    model = small.get("tokenizer.model", b"")
    return model if model[:1] == b"\n" else small.get("tokenizer.json")  # a protocol buffer


def _tokenizer_files(
    tokenizer: Path, special: dict[str, tuple[str, int]], begun: bool, longest: int, log: Callable[[str], None]
) -> dict[str, bytes]:
    """Files by which Hugging Face gives the training's ids; `begun`: documents begin with bos."""
    existing = read_settings(tokenizer.with_name("tokenizer_config.json"))
    merges = merges_of(tokenizer)
    first, eos = special.get("bos" if begun else "eos"), special.get("eos")
    settings: dict[str, Any] = {k: existing[k] for k in ("chat_template", "padding_side") if k in existing}
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
            found.post_processor = _begin_with(first if begun else None)
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
    """A tokenizer.json that puts `token`, and nothing else, around a text."""
    if token is None and not json.loads(raw).get("post_processor"):
        return raw
    model = Tokenizer.from_str(raw.decode())
    bare, whole = (model.encode("a", add_special_tokens=add).ids for add in (False, True))
    if whole == [*([token[1]] if token else []), *bare]:
        return raw
    model.post_processor = _begin_with(token)
    return model.to_str().encode()


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


class NotEqualError(Exception):
    """No tokenizer.json gives the ids of a SentencePiece model; the message says why."""


def to_tokenizer(model: bytes) -> Tokenizer:
    """The fast tokenizer of a SentencePiece .model file that gives the same ids. Raises: NotEqualError.

    SentencePiece merges by scores of what pairs become, the leftmost of equals first; tokenizer.json ranks pairs.
    Both agree where every score is one piece's and, of two overlapping pairs, the left is first.
    """
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made at run time

    file = ModelProto.FromString(model)
    pieces = [(piece.piece, piece.score, piece.type) for piece in file.pieces]
    trainer, prefix = file.trainer_spec, file.normalizer_spec.add_dummy_prefix
    user = [text for text, _, kind in pieces if kind == USER_DEFINED]
    if trainer.model_type != trainer.BPE or any(kind == UNUSED for _, _, kind in pieces):
        raise NotEqualError("it is no model of byte pairs, or has unused pieces")
    if user and (prefix or any({SPACE, " "} & {*text} for text in user)):
        raise NotEqualError("it has user-defined symbols, and begins a text with a space or has them with spaces")
    found = Tokenizer(
        models.BPE(
            {text: i for i, (text, _, _) in enumerate(pieces)},
            [*_merges(pieces)],
            unk_token=next(text for text, _, kind in pieces if kind == UNKNOWN),
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    )
    before, after = [normalizers.Prepend(SPACE)], [decoders.Strip(" ", 1, 0)]
    found.normalizer = normalizers.Sequence([*before * prefix, normalizers.Replace(" ", SPACE)])
    plain = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    found.decoder = decoders.Sequence([*plain, *after * prefix])
    found.add_special_tokens([text for text, _, kind in pieces if kind in (UNKNOWN, CONTROL)])
    found.add_tokens([AddedToken(text, normalized=False) for text in user])
    found.encode_special_tokens = True
    theirs = SentencePieceProcessor(model_proto=model)
    listed = (" ".join(text for text, *_ in pieces[i : i + 64]) for i in range(0, len(pieces), 64))
    for text in [*PROBES, *listed]:  # what is difficult, and all pieces
        if found.encode(text, add_special_tokens=False).ids != theirs.encode(text):
            raise NotEqualError(f"the text {text[:40]!r} becomes other ids")
    return found


def _begin_with(token: tuple[str, int] | None) -> processors.TemplateProcessing:
    """The post-processor that puts a token before a text, or nothing."""
    first = [token[0]] if token else []
    return processors.TemplateProcessing([*first, "$A"], [*first, "$A", *first, "$B:1"], [token] if token else [])


def _merges(pieces: Sequence[Piece]) -> Iterator[tuple[str, str]]:
    """All pairs of pieces that become one, in the order of merging. Raises: NotEqualError."""
    scores = {text: score for text, score, kind in pieces if kind == NORMAL}
    if odd := next((text for text in scores if any(c not in scores for c in text)), None):
        raise NotEqualError(f"its piece {odd!r} has characters that are no pieces")
    last = None
    for text in sorted(scores, key=lambda text: -scores[text]):
        pairs = [(text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in scores and text[i:] in scores]
        if pairs and scores[text] == last:
            raise NotEqualError(f"another piece has the score of its piece {text!r}")
        last = scores[text] if pairs else last
        while pairs:
            first = next((a for a in pairs if not any(b[1] == a[0] and a != b for b in pairs)), pairs[0])
            pairs.remove(first)
            yield first
