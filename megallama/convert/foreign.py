"""Where the tensors of a LLaMA lie in the files of other programs.

A *format* says of every tensor in every file which rectangles of Hugging Face tensors are stacked in its
rows, the same idea as `plan.params.Part`.  Reading and writing follow the same map, so a format is
described once.  docs/checkpoint_formats.md describes the formats in words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megallama.checkpoint.disk import CheckpointError
from megallama.config.schema import ModelConfig, RopeScaling
from megallama.plan.box import Box
from megallama.plan.params import global_shapes, heads

Shape = tuple[int, ...]
EMBEDDING = "model.embed_tokens.weight"
MEGATRON_EMBEDDING, MEGATRON_HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
SPLIT_COLUMNS = ("o_proj.weight", "down_proj.weight")
META_FILE = "consolidated.{:02d}.pth"  # of a model-parallel rank
_META = {f"self_attn.{x}_proj": f"attention.w{x}" for x in "qkvo"} | {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
_META_ENDS = {EMBEDDING: "tok_embeddings.weight", "model.norm.weight": "norm.weight", "lm_head.weight": "output.weight"}
_META_MULTIPLES = (256, 1024, 4096, 128, 64, 32, 16, 8, 4, 2, 1)
_META_ROPE = {"kind": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 8192}
_META_FACTOR = {False: 8.0, True: 32.0}  # unless it is said: LLaMA 3.1; 3.2, whose head is tied
_META_PARAMS = {*"dim n_layers n_heads n_kv_heads multiple_of ffn_dim_multiplier norm_eps vocab_size".split()}
_META_PARAMS |= {*"rope_theta use_scaled_rope rope_scaling_factor max_seq_len max_batch_size".split()}
FUSED_NORMS = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
LOCAL_NORMS = ("input_layernorm.weight", "pre_mlp_layernorm.weight")  # Megatron without Transformer Engine


@dataclass(frozen=True)
class Piece:
    """Rows ``row .. row + box.shape[0]`` of tensor `key` of `file` are `box` of the Hugging Face tensor ``box.key``.

    A piece has the full width of the file's tensor, so it is one run of bytes.
    """

    file: str
    key: str
    row: int
    box: Box


@dataclass
class Format:
    """The files of a format with their tensors, and where each Hugging Face tensor lies in them.

    The pieces of a tensor first cover it once; those after that are further copies.
    """

    shapes: Mapping[str, Shape]  # of the Hugging Face tensors
    # heads and head size where rotary pairs lie side by side (q_proj, k_proj): see `paired`
    pairs: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    files: dict[str, dict[str, Shape]] = field(default_factory=dict)
    pieces: dict[str, list[Piece]] = field(default_factory=dict)

    def stack(self, file: str, key: str, boxes: Sequence[Box], rows: int = 0) -> None:
        """Tensor `key` of `file` holds `boxes` under one another, and zeros below them up to `rows` rows."""
        at = 0
        for box in boxes:
            self.pieces.setdefault(box.key, []).append(Piece(file, key, at, box))
            at += box.shape[0]
        self.files.setdefault(file, {})[key] = (rows or at, *boxes[0].shape[1:])

    def cut(self, name: str, rank: int, size: int, axis: int | None = None) -> Box:
        """The part of a tensor-parallel rank: rows (axis 0); of o_proj, down_proj columns (1); of norms all."""
        shape = self.shapes[name]
        whole, axis = Box.whole(name, shape), int(name.endswith(SPLIT_COLUMNS)) if axis is None else axis
        if len(shape) == 1:
            return whole
        a, b = (shape[axis] // size * r for r in (rank, rank + 1))
        return whole.rows(a, b) if axis == 0 else Box(name, (0, a), (shape[0], b))


def paired(weight: Tensor, count: int, d: int) -> Tensor:
    """q_proj or k_proj in Meta's order: elements 2i, 2i + 1 of a head turn together, here i, i + d/2."""
    return weight.view(count, 2, d // 2, -1).transpose(1, 2).reshape(weight.shape)


def halved(weight: Tensor, count: int, d: int) -> Tensor:
    """The inverse of `paired`."""
    return weight.view(count, d // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def whole_format(model: ModelConfig) -> Format:
    """A Hugging Face folder: every tensor once and whole; `TensorFiles` and `FileSet` know the file."""
    format = Format(global_shapes(model))
    for name, shape in format.shapes.items():
        format.stack("", name, [Box.whole(name, shape)])
    return format


def divides(size: int, option: str, what: Mapping[str, int]) -> None:
    """Raises: CheckpointError if `size` does not divide every value of `what`."""
    wrong = [f"{name}={value}" for name, value in what.items() if value % size]
    if wrong:
        fits = [n for n in range(1, min(what.values()) + 1) if not any(value % n for value in what.values())]
        near = [str(n) for n in [n for n in fits if n < size][-1:] + [n for n in fits if n > size][:1]]
        raise CheckpointError(f"{option}={size} does not divide {', '.join(wrong)}; use {' or '.join(near)}")


def meta_format(model: ModelConfig, ranks: int, embedding_rows: bool) -> Format:
    """Meta's release: consolidated.NN.pth of each model-parallel rank.

    The embedding is split by columns in LLaMA 1 and 2, by rows (`embedding_rows`) in LLaMA 3.  A tied head is a copy.
    """
    n, k, d = heads(model)
    if n * d != model.hidden_size:
        unlike = f"head_dim={d} times num_heads={n} is not hidden_size={model.hidden_size}"
        raise CheckpointError(f"{unlike}: Meta's format has no such model")
    sizes = {"num_kv_heads": k, "num_heads": n, "ffn_hidden_size": model.ffn_hidden_size}
    divides(ranks, "--tp", sizes | {"vocab_size": model.vocab_size, "hidden_size": model.hidden_size})
    turned = {"q_proj.weight": (n, d), "k_proj.weight": (k, d)}
    shapes = global_shapes(model)
    format = Format(shapes, {name: turned[name[-13:]] for name in shapes if name[-13:] in turned})
    keys = [(name, meta_key(name)) for name in shapes] + [(EMBEDDING, "output.weight")] * model.tie_embeddings
    for name, key in keys:
        for r in range(ranks):
            axis = 1 if key == _META_ENDS[EMBEDDING] and not embedding_rows else None
            format.stack(META_FILE.format(r), key, [format.cut(name, r, ranks, axis)])
    return format


def meta_key(name: str) -> str:
    """Meta's name of a Hugging Face tensor."""
    if name in _META_ENDS:
        return _META_ENDS[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"layers.{layer}.{_META[part]}.weight"


def meta_ffn(hidden: int, multiple_of: int, multiplier: float | None) -> int:
    """The feed-forward width that Meta's code derives from params.json."""
    width = int((multiplier or 1) * int(2 * 4 * hidden / 3))
    return -(-width // multiple_of) * multiple_of


def meta_params(model: ModelConfig) -> dict[str, Any]:
    """params.json, with only what the model needs: the first LLaMA's code refuses other keys."""
    h, f, (n, k, _) = model.hidden_size, model.ffn_hidden_size, heads(model)
    ratio = f / int(2 * 4 * h / 3)
    multipliers = [None, *(round(ratio, digits) for digits in range(1, 9)), (f + 0.5) / int(2 * 4 * h / 3)]
    multiplier, multiple_of = next((m, u) for m in multipliers for u in _META_MULTIPLES if meta_ffn(h, u, m) == f)
    params: dict[str, Any] = {"dim": h, "n_layers": model.num_layers, "n_heads": n, "vocab_size": model.vocab_size}
    params |= {"multiple_of": multiple_of, "norm_eps": model.norm_eps}
    params |= {"n_kv_heads": k} if k != n else {}
    params |= {"ffn_dim_multiplier": multiplier} if multiplier else {}
    params |= {"rope_theta": model.rope_theta} if model.rope_theta != 1e4 else {}
    if (scaling := model.rope_scaling) is None:
        return params
    found = {key: getattr(scaling, key) for key in _META_ROPE}
    if wrong := [f"{k}={v:{'' if k == 'kind' else 'g'}}" for k, v in found.items() if v != _META_ROPE[k]]:
        raise CheckpointError(f"model.rope_scaling {', '.join(wrong)}: Meta's code has only {_META_ROPE}")
    known = scaling.factor == _META_FACTOR[model.tie_embeddings]
    return params | {"use_scaled_rope": True} | ({} if known else {"rope_scaling_factor": scaling.factor})


def meta_model(params: Mapping[str, Any], shapes: Mapping[str, Shape], ranks: int, tied: bool) -> ModelConfig:
    """The model that params.json and the tensors of the first rank describe; widths are those of the tensors.

    Raises: CheckpointError for keys that are unknown or missing.
    """
    problems = [f"does not know {key!r}" for key in sorted(params.keys() - _META_PARAMS)]
    problems += [f"needs {key!r}" for key in ("dim", "n_heads", "n_layers", "norm_eps") if key not in params]
    if problems:
        raise CheckpointError("params.json is not that of a LLaMA 1, 2 or 3: this tool " + ", ".join(problems))
    factor = params.get("rope_scaling_factor") or _META_FACTOR[tied]
    vocab, width = ((shapes.get(k) or (0,))[0] * ranks for k in ("output.weight", "layers.0.feed_forward.w1.weight"))
    return ModelConfig(
        hidden_size=params["dim"],
        num_layers=params["n_layers"],
        num_heads=params["n_heads"],
        num_kv_heads=params.get("n_kv_heads") or params["n_heads"],
        head_dim=params["dim"] // params["n_heads"],
        ffn_hidden_size=width or 1,
        vocab_size=max(params.get("vocab_size", -1), 0) or vocab or 1,
        norm_eps=params["norm_eps"],
        rope_theta=params.get("rope_theta", 10000.0),
        rope_scaling=RopeScaling(factor=factor, **_META_ROPE) if params.get("use_scaled_rope") else None,
        tie_embeddings=tied,
    )


def megatron_file(tp_rank: int, pp_rank: int, pp: int) -> str:
    """The file of one rank: the pipeline rank is named only where there are several."""
    return f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if pp > 1 else "") + "/model.safetensors"


def megatron_format(
    model: ModelConfig, tp: int, pp: int, vocab_rows: int, norms: Sequence[str] = FUSED_NORMS, copy: bool = True
) -> Format:
    """Megatron's GPTModel, a file for each of tp x pp ranks; `vocab_rows` is the padded vocabulary.

    `copy`: the last of several stages has a copy of a tied embedding.
    """
    n, k, _ = heads(model)
    divides(tp, "--tp", {"num_kv_heads": k, "num_heads": n, "ffn_hidden_size": model.ffn_hidden_size})
    divides(pp, "--pp", {"num_layers": model.num_layers})
    format, depth = Format(global_shapes(model)), model.num_layers // pp
    last = "lm_head.weight" if not model.tie_embeddings else EMBEDDING
    for t in range(tp):
        _vocab(format, megatron_file(t, 0, pp), MEGATRON_EMBEDDING, EMBEDDING, (t, tp), vocab_rows)
    for i in range(model.num_layers):
        stage, local = divmod(i, depth)
        for t in range(tp):
            _megatron_layer(format, megatron_file(t, stage, pp), i, f"decoder.layers.{local}.", (t, tp), k, norms)
    for t in range(tp):
        file = megatron_file(t, pp - 1, pp)
        format.stack(file, "decoder.final_layernorm.weight", [format.cut("model.norm.weight", t, tp)])
        if (pp > 1 and copy) or not model.tie_embeddings:
            _vocab(format, file, MEGATRON_HEAD, last, (t, tp), vocab_rows)
    return format


def _vocab(format: Format, file: str, key: str, name: str, rank: tuple[int, int], rows: int) -> None:
    per, (v, h) = rows // rank[1], format.shapes[name]
    first, stop = (min(v, r * per) for r in (rank[0], rank[0] + 1))
    format.stack(file, key, [Box(name, (first, 0), (stop, h))], per)


def _megatron_layer(
    format: Format, file: str, i: int, theirs: str, rank: tuple[int, int], k: int, norms: Sequence[str]
) -> None:
    """One layer of one rank: query groups [their q heads, k, v] under one another; gate above up."""
    (t, tp), name = rank, f"model.layers.{i}."
    groups = range(t * k // tp, (t + 1) * k // tp)
    qkv = [format.cut(f"{name}self_attn.{part}_proj.weight", group, k) for group in groups for part in "qkv"]
    format.stack(file, theirs + "self_attention.linear_qkv.weight", qkv)
    for key, parts in {
        norms[0]: ["input_layernorm"],
        "self_attention.linear_proj.weight": ["self_attn.o_proj"],
        norms[1]: ["post_attention_layernorm"],
        "mlp.linear_fc1.weight": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.linear_fc2.weight": ["mlp.down_proj"],
    }.items():
        format.stack(file, theirs + key, [format.cut(f"{name}{part}.weight", t, tp) for part in parts])
