"""Checkpoints of other programs for the tests, cut and read by rules of their own, not by the package's maps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from megallama.checkpoint.huggingface import model_files
from megallama.config.schema import ModelConfig, RopeScaling
from megallama.convert.convert import ConvertOptions, convert
from megallama.plan.params import global_shapes, heads
from tests.checkpoint.states import make_config

Tensors = dict[str, Tensor]

MHA = ModelConfig(
    hidden_size=64, num_layers=4, num_heads=8, num_kv_heads=8, head_dim=8, ffn_hidden_size=96, vocab_size=160
)
GQA = MHA.model_copy(update={"num_kv_heads": 4, "vocab_size": 131, "norm_eps": 1e-6})
LLAMA3 = MHA.model_copy(
    update={"num_kv_heads": 4, "rope_theta": 500000.0, "tie_embeddings": True, "rope_scaling": RopeScaling()}
)
MODELS = {"mha": MHA, "gqa": GQA, "llama3-tied": LLAMA3}


def random_weights(model: ModelConfig, dtype: torch.dtype = torch.bfloat16, seed: int = 3) -> Tensors:
    """Weights of a size that makes every matrix matter."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in global_shapes(model).items():
        values = torch.randn(shape, generator=generator) / (1 if len(shape) == 1 else math.sqrt(shape[1]))
        out[name] = (values + (len(shape) == 1)).to(dtype)
    return out


def hf_folder(folder: Path, model: ModelConfig, dtype: torch.dtype = torch.bfloat16, files: int = 1) -> Tensors:
    """A Hugging Face folder of `files` safetensors files; its tensors."""
    tensors = random_weights(model, dtype)
    folder.mkdir(parents=True)
    for name, data in model_files(make_config(model), None).items():
        (folder / name).write_bytes(data)
    if files == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return tensors
    names = list(tensors)
    numbers = {name: i * files // len(names) + 1 for i, name in enumerate(names)}
    places = {name: f"model-{i:05d}-of-{files:05d}.safetensors" for name, i in numbers.items()}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return tensors


def read_hf(folder: Path) -> Tensors:
    """All tensors of a Hugging Face folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal(found: Tensors, want: Tensors) -> None:
    assert found.keys() == want.keys()
    assert [n for n in want if found[n].dtype != want[n].dtype or not torch.equal(found[n], want[n])] == []


def to(source: Path, target: Path, kind: str, tp: int = 1, pp: int = 1, **more) -> Path:
    """Convert without verification; the folder that holds the result."""
    check = more.pop("check", lambda *_: None)
    context = more.pop("context", None)
    convert(source, target, ConvertOptions(kind, tp, pp, **more), context, check)
    return next(target.glob("step-*")) if kind == "step" else target


def megatron_ranks(tensors: Tensors, model: ModelConfig, tp: int, pp: int, padded: int) -> dict[str, Tensors]:
    """What Megatron's ranks hold, by folder."""
    n, k, d = heads(model)
    depth, per = model.num_layers // pp, padded // tp

    def vocabulary(name: str, t: int) -> Tensor:
        return F.pad(tensors[name], (0, 0, 0, padded - model.vocab_size))[t * per : (t + 1) * per]

    ranks = {}
    for t in range(tp):
        for s in range(pp):
            out = {}
            if s == 0:
                out["embedding.word_embeddings.weight"] = vocabulary("model.embed_tokens.weight", t)
            for local in range(depth):
                a, b = f"model.layers.{s * depth + local}.", f"decoder.layers.{local}."
                q, key, v, o = (tensors[f"{a}self_attn.{x}_proj.weight"] for x in "qkvo")
                gate, up = (tensors[f"{a}mlp.{x}_proj.weight"].chunk(tp)[t] for x in ("gate", "up"))
                down = tensors[f"{a}mlp.down_proj.weight"].chunk(tp, 1)[t]
                groups = torch.cat([q.view(k, n // k, d, -1), key.view(k, 1, d, -1), v.view(k, 1, d, -1)], 1)
                out |= {
                    b + "self_attention.linear_qkv.layer_norm_weight": tensors[a + "input_layernorm.weight"],
                    b + "self_attention.linear_qkv.weight": groups.chunk(tp)[t].flatten(0, 2),
                    b + "self_attention.linear_proj.weight": o.chunk(tp, 1)[t],
                    b + "mlp.linear_fc1.layer_norm_weight": tensors[a + "post_attention_layernorm.weight"],
                    b + "mlp.linear_fc1.weight": torch.cat([gate, up]),
                    b + "mlp.linear_fc2.weight": down,
                }
            if s == pp - 1:
                out["decoder.final_layernorm.weight"] = tensors["model.norm.weight"]
                if not model.tie_embeddings:
                    out["output_layer.weight"] = vocabulary("lm_head.weight", t)
                elif pp > 1:
                    out["output_layer.weight"] = vocabulary("model.embed_tokens.weight", t)
            name = f"mp_rank_{t:02d}" + (f"_{s:03d}" if pp > 1 else "")
            ranks[name] = {key: value.contiguous() for key, value in out.items()}
    return ranks


def write_ranks(folder: Path, ranks: dict[str, Tensors], config: Path) -> None:
    """Shards per rank with the config.json of another folder."""
    folder.mkdir()
    (folder / "config.json").write_bytes((config / "config.json").read_bytes())
    for name, tensors in ranks.items():
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")


def meta_shards(folder: Path) -> list[Tensors]:
    """The tensors of consolidated.NN.pth."""
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("consolidated.*.pth"))]


def meta_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Logits [T, v] in fp64 of Meta's release, by its definition: rotary embedding as complex numbers."""
    params, shards = json.loads((folder / "params.json").read_text()), meta_shards(folder)
    columns = ("wo.weight", "w2.weight") + (("tok_embeddings.weight",) if params.get("rope_theta") is None else ())
    w = {}
    for key, value in shards[0].items():
        joined = torch.cat([s[key] for s in shards], int(key.endswith(columns))) if value.dim() == 2 else value
        w[key] = joined.double()
    n, h = params["n_heads"], params["dim"]
    k, d = params.get("n_kv_heads", n), h // n
    freqs = 1.0 / (params.get("rope_theta", 10000.0) ** (torch.arange(0, d, 2).double() / d))
    if params.get("use_scaled_rope"):
        freqs = torch.tensor([_scaled(float(f), params["rope_scaling_factor"]) for f in freqs]).double()
    angles = torch.outer(torch.arange(len(tokens)).double(), freqs)
    turns = torch.polar(torch.ones_like(angles), angles)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * weight

    def rotary(x: Tensor) -> Tensor:
        numbers = torch.view_as_complex(x.view(len(tokens), -1, d // 2, 2))
        return torch.view_as_real(numbers * turns[:, None]).flatten(2)

    x = w["tok_embeddings.weight"][tokens]
    for i in range(params["n_layers"]):
        p = f"layers.{i}."
        y = norm(x, w[p + "attention_norm.weight"])
        q, key, v = (y @ w[f"{p}attention.w{c}.weight"].T for c in "qkv")
        q, key, v = rotary(q), rotary(key), v.view(len(tokens), -1, d)
        key, v = (t.repeat_interleave(n // k, 1) for t in (key, v))
        scores = torch.einsum("qnd,knd->nqk", q, key) / math.sqrt(d)
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf")).softmax(-1)
        x = x + torch.einsum("nqk,knd->qnd", scores, v).flatten(1) @ w[p + "attention.wo.weight"].T
        y = norm(x, w[p + "ffn_norm.weight"])
        inner = F.silu(y @ w[p + "feed_forward.w1.weight"].T) * (y @ w[p + "feed_forward.w3.weight"].T)
        x = x + inner @ w[p + "feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


def _scaled(freq: float, factor: float) -> float:
    """LLaMA 3.1: long wavelengths are stretched, short ones kept, interpolated between."""
    low, high, old = 1.0, 4.0, 8192
    wavelength = 2 * math.pi / freq
    if wavelength < old / high:
        return freq
    if wavelength > old / low:
        return freq / factor
    smooth = (old / wavelength - low) / (high - low)
    return (1 - smooth) * freq / factor + smooth * freq
