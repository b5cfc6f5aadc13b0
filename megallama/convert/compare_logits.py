"""Do two checkpoints compute the same?  Logits of random tokens, both models side by side, one layer in memory.

Nothing here follows `foreign`'s maps: each format is read as its own programs read it.  Meta's shards are
joined along the dimension that each of its parallel layers splits and its pairs are turned as complex numbers;
Megatron's fused qkv is seen as [query groups, heads of a group + 2, d].  So a mistake in a map shows.  A tensor or a
setting that nobody here looks at would be missing from both sides: Hugging Face folders are read by transformers
too, and by a second reader that shares no code with ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from megallama.checkpoint.manifest import DTYPES, WEIGHTS
from megallama.convert.convert import UnverifiedError
from megallama.convert.source import Source
from megallama.kernels.pointwise import attention_factor, inverse_frequencies
from megallama.plan.params import heads, num_parameters

TOLERANCE = 1e-4  # of the largest logit; sums in another order differ by about 1e-6
MOST_PARAMETERS = 2_000_000_000  # of a model that is given to transformers, which holds it whole, in fp32
# norm, q, k, v, o, norm, gate, up, down
HF_PARTS = ["input_layernorm", *(f"self_attn.{x}_proj" for x in "qkvo"), "post_attention_layernorm"]
HF_PARTS += [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
META_PARTS = ["attention_norm", *(f"attention.w{x}" for x in "qkvo"), "ffn_norm"]
META_PARTS += [f"feed_forward.w{x}" for x in "132"]


class _HuggingFace:
    """Tensors as they are called; element i of a head turns with i + d/2."""

    def __init__(self, source: Source) -> None:
        self.source, self.model, self.ranks = source, source.model, sorted(source.files)

    def joined(self, files: Sequence[str], key: str, dim: int = 0) -> Tensor:
        """The ranks' matrices joined; of a norm, which all have, any. Raises: UnverifiedError."""
        parts = [self.source.raw(file, key) for file in files]
        if parts[0].dim() == 1 and not all(torch.equal(part, parts[0]) for part in parts):
            raise UnverifiedError("a norm is not the same on all tensor-parallel ranks")
        return torch.cat(parts, dim) if parts[0].dim() == 2 else parts[0]

    def embedding(self) -> Tensor:
        return self.source.raw("", "model.embed_tokens.weight")

    def head(self) -> tuple[Tensor, Tensor]:
        head = self.embedding() if self.model.tie_embeddings else self.source.raw("", "lm_head.weight")
        return self.source.raw("", "model.norm.weight"), head

    def layer(self, i: int) -> tuple[Tensor, ...]:
        return tuple(self.source.raw("", f"model.layers.{i}.{part}.weight") for part in HF_PARTS)

    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        (a, b), cos, sin = x.chunk(2, -1), angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class _Meta(_HuggingFace):
    """Column-parallel layers join rows, row-parallel ones columns; elements 2i, 2i + 1 are complex."""

    def embedding(self) -> Tensor:
        width = self.source.files[self.ranks[0]].places["tok_embeddings.weight"].shape[1]
        return self.joined(self.ranks, "tok_embeddings.weight", int(width < self.model.hidden_size))

    def head(self) -> tuple[Tensor, Tensor]:
        return self.joined(self.ranks, "norm.weight"), self.joined(self.ranks, "output.weight")

    def layer(self, i: int) -> tuple[Tensor, ...]:
        keys = [f"layers.{i}.{part}.weight" for part in META_PARTS]
        return tuple(self.joined(self.ranks, key, int(key.endswith(("wo.weight", "w2.weight")))) for key in keys)

    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        numbers = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


class _Megatron(_HuggingFace):
    """A rank's fused rows: of each query group its q heads, k, v; gate above up."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        stages: dict[str, list[str]] = {}  # mp_rank_TT/... or mp_rank_TT_PPP/...
        for name in self.ranks:
            stages.setdefault("".join(name.split("/")[0].split("_")[3:]), []).append(name)
        self.stages = [stages[stage] for stage in sorted(stages)]

    def embedding(self) -> Tensor:
        return self.joined(self.stages[0], "embedding.word_embeddings.weight")

    def head(self) -> tuple[Tensor, Tensor]:
        ranks = self.stages[-1]
        own = "output_layer.weight" in self.source.files[ranks[0]].places and not self.source.head_left_out
        head = self.joined(ranks, "output_layer.weight") if own else self.embedding()
        return self.joined(ranks, "decoder.final_layernorm.weight"), head[: self.model.vocab_size]

    def layer(self, i: int) -> tuple[Tensor, ...]:
        (n, k, d), h = heads(self.model), self.model.hidden_size
        stage, local = divmod(i, self.model.num_layers // len(self.stages))
        ranks, layer = self.stages[stage], f"decoder.layers.{local}."
        names = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
        if layer + names[0] not in self.source.files[ranks[0]].places:
            names = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
        first, second = (self.joined(ranks, layer + name) for name in names)
        groups = self.joined(ranks, layer + "self_attention.linear_qkv.weight").view(k, n // k + 2, d, h)
        q, key, value = (x.reshape(-1, h) for x in (groups[:, :-2], groups[:, -2], groups[:, -1]))
        o = self.joined(ranks, layer + "self_attention.linear_proj.weight", 1)
        gate_up = self.joined(ranks, layer + "mlp.linear_fc1.weight").view(len(ranks), 2, -1, h)
        gate, up = (gate_up[:, x].reshape(-1, h) for x in (0, 1))
        down = self.joined(ranks, layer + "mlp.linear_fc2.weight", 1)
        return first, q, key, value, o, second, gate, up, down


_VIEWS = {"step": _HuggingFace, "hf": _HuggingFace, "meta": _Meta, "megatron": _Megatron}


def run(source: Source, tokens: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The hidden states after each layer, and last the logits; a layer is read when it is needed."""
    model, view = source.model, _VIEWS[source.kind](source)
    (n, k, d), eps = heads(model), model.norm_eps
    frequencies = inverse_frequencies(d, model.rope_theta, model.rope_scaling, torch.float32)
    angles = torch.outer(torch.arange(len(tokens), dtype=torch.float32), frequencies)

    def fp32(weight: Tensor) -> Tensor:
        return weight.to(dtype).float()

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], fp32(weight), eps)

    x = fp32(view.embedding()[tokens])
    for i in range(model.num_layers):
        first, *qkv, o, second, gate, up, down = view.layer(i)
        y = norm(x, first)
        q, key, v = (F.linear(y, fp32(w)).view(len(y), -1, d).transpose(0, 1) for w in qkv)
        q, key = (view.turn(x, angles) * attention_factor(model.rope_scaling) for x in (q, key))
        mixed = F.scaled_dot_product_attention(q[None], key[None], v[None], is_causal=True, enable_gqa=n != k)[0]
        x = x + F.linear(mixed.transpose(0, 1).reshape(len(y), n * d), fp32(o))
        y = norm(x, second)
        x = x + F.linear(F.silu(F.linear(y, fp32(gate))) * F.linear(y, fp32(up)), fp32(down))
        del first, qkv, o, second, gate, up, down
        yield x
    weight, head = view.head()
    yield F.linear(norm(x, weight), fp32(head))


@torch.inference_mode()
def compare_logits(source: Source, target: Source, precision: str) -> float:
    """The largest difference of logits relative to the largest logit, weights rounded to `precision`.

    Raises: UnverifiedError if it is over `TOLERANCE` or no number, naming the layer from which on states differ.
    """
    tokens, dtype, worst = random_tokens(source), DTYPES[WEIGHTS[precision]], 0.0
    for i, (a, b) in enumerate(zip(run(source, tokens, dtype), run(target, tokens, dtype), strict=True)):
        where = "the logits" if i == source.model.num_layers else f"the states after layer {i}"
        worst = difference(a, b, f"source and target differ: {where}")
    return worst


def random_tokens(source: Source) -> Tensor:
    """The tokens that logits are compared of, [T]."""
    return torch.randint(source.model.vocab_size, (32,), generator=torch.Generator().manual_seed(0))


def difference(a: Tensor, b: Tensor, what: str) -> float:
    """Relative to the largest of `a`. Raises: UnverifiedError if it is over `TOLERANCE` or no number."""
    found = float((a - b).abs().max() / a.abs().max())
    if not found <= TOLERANCE:
        raise UnverifiedError(f"{what} of random tokens by {found:.3g} of the largest")
    return found


# ---- Hugging Face folders, as other programs read them ----


@torch.inference_mode()
def compare_with_others(source: Source, precision: str) -> tuple[float, str] | None:
    """How far logits of a Hugging Face folder are from another program's, relative to the largest, and whose those are.

    None for what no other program reads: other formats, master weights, a head that was left out.
    Raises: UnverifiedError.
    """
    if source.kind not in ("hf", "step") or source.state != "model" or source.head_left_out:
        return None
    folder = source.folder / "model" if source.kind == "step" else source.folder
    tokens, dtype = random_tokens(source), DTYPES[WEIGHTS[precision]]
    *_, ours = run(source, tokens, dtype)
    theirs, head = _second_reading(folder, tokens, dtype)
    name = "a second reader"
    worst = difference(theirs, ours, f"{name} and megallama read {folder} differently: logits")
    with suppress(ImportError):
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        if num_parameters(source.model) <= MOST_PARAMETERS:
            logging.set_verbosity_error()
            logging.disable_progress_bar()
            tied = head != "lm_head"  # some versions tie a head that is in the files
            model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=dtype, tie_word_embeddings=tied).float()
            theirs = model(tokens[None]).logits[0]
            found = difference(theirs, ours, f"transformers and megallama read {folder} differently: logits")
            worst, name = max(worst, found), "transformers"
    return worst, name


def _second_reading(folder: Path, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, str]:
    """Logits [T, v] of a Hugging Face folder, and the head they are made with; a layer at a time.

    Configuration, tensors and arithmetic stand here once more, so that nothing is shared.
    """
    c = json.loads((folder / "config.json").read_bytes())
    index = folder / "model.safetensors.index.json"
    names = {*json.loads(index.read_bytes())["weight_map"].values()} if index.is_file() else {"model.safetensors"}
    files = [safe_open(folder / name, framework="pt") for name in sorted(names)]
    where = {key: file for file in files for key in file.keys()}
    n, count = c["num_attention_heads"], len(tokens)
    k, d = c.get("num_key_value_heads") or n, c.get("head_dim") or c["hidden_size"] // n
    rope = {"rope_theta": c.get("rope_theta", 10000.0), **(c.get("rope_parameters") or c.get("rope_scaling") or {})}
    frequencies, grown = rope["rope_theta"] ** (-torch.arange(0, d, 2).double() / d), 1.0
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        turns = frequencies * rope.get("original_max_position_embeddings", 0) / (2 * math.pi)
        low, high, kept = rope.get("low_freq_factor", 0), rope.get("high_freq_factor", 0), turns * 0
        if kind == "llama3":
            kept = ((turns - low) / (high - low)).clamp(0, 1)
        elif kind == "yarn":
            grown = rope.get("attention_factor") or 1 + 0.1 * math.log(max(1, rope["factor"]))
            ends = (math.log(turns[0] / (rope.get(key) or n)) for key, n in (("beta_fast", 32), ("beta_slow", 1)))
            low, high = (end * d / 2 / math.log(rope["rope_theta"]) for end in ends)
            at, low = torch.arange(d // 2).double(), max(math.floor(low), 0)
            kept = 1 - ((at - low) / max(min(math.ceil(high), d - 1) - low, 0.001)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / rope["factor"])
    angles = torch.outer(torch.arange(count).double(), frequencies).float()
    rotation = torch.polar(torch.full_like(angles, grown), angles)[:, None]
    future = torch.ones(count, count).triu(1).bool()

    def weight(name: str) -> Tensor:
        return where[f"{name}.weight"].get_tensor(f"{name}.weight").to(dtype).float()

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + c.get("rms_norm_eps", 1e-6)).rsqrt() * weight(name)

    def rotated(x: Tensor) -> Tensor:
        turned = torch.complex(*x.chunk(2, -1)) * rotation
        return torch.cat([turned.real, turned.imag], -1)

    x = weight("model.embed_tokens")[tokens]
    for layer in (f"model.layers.{i}." for i in range(c["num_hidden_layers"])):
        y = norm(x, layer + "input_layernorm")
        q, key, value = ((y @ weight(f"{layer}self_attn.{part}_proj").T).view(count, -1, d) for part in "qkv")
        q, key, value = rotated(q), rotated(key).repeat_interleave(n // k, 1), value.repeat_interleave(n // k, 1)
        scores = torch.einsum("qnd,knd->nqk", q, key) / math.sqrt(d)
        probs = scores.masked_fill(future, -torch.inf).softmax(-1)
        x = x + torch.einsum("nqk,knd->qnd", probs, value).flatten(1) @ weight(layer + "self_attn.o_proj").T
        y = norm(x, layer + "post_attention_layernorm")
        gate, up = (y @ weight(f"{layer}mlp.{part}_proj").T for part in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ weight(layer + "mlp.down_proj").T
    head = "lm_head" if "lm_head.weight" in where else "model.embed_tokens"
    return norm(x, "model.norm") @ weight(head).T, head
