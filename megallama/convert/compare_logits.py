"""Do two checkpoints compute the same?  Logits of random tokens, both models side by side, one layer in memory.

Nothing here follows `foreign`'s maps: each format is read as its own programs read it.  Meta's shards are
joined along the dimension that each of its parallel layers splits and its pairs are turned as complex numbers;
Megatron's fused qkv is seen as [query groups, heads of a group + 2, d].  So a mistake in a map shows.  What both
sides would read wrongly alike is seen by other programs: `second_reader` asks them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from megallama.checkpoint.layout import DTYPES, WEIGHTS
from megallama.convert.convert import UnverifiedError
from megallama.convert.source import Source
from megallama.kernels.rope import inverse_frequencies
from megallama.plan.params import heads

TOKENS = 32
TOLERANCE = 1e-4  # of the largest logit; sums in another order differ by about 1e-6
PARTS = ("input_norm", "q", "k", "v", "o", "post_attention_norm", "gate", "up", "down")
HF_PARTS = ("input_layernorm", *(f"self_attn.{x}_proj" for x in "qkvo"), "post_attention_layernorm") + tuple(
    f"mlp.{x}_proj" for x in ("gate", "up", "down")
)
META_PARTS = (
    "attention_norm",
    *(f"attention.w{x}" for x in "qkvo"),
    "ffn_norm",
    *(f"feed_forward.w{x}" for x in "132"),
)


class _HuggingFace:
    """Tensors as they are called; element i of a head turns with i + d/2."""

    def __init__(self, source: Source) -> None:
        self.source, self.model = source, source.model

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
    """Column-parallel layers join rows, row-parallel ones columns; elements 2i and 2i + 1 are one complex number."""

    def _join(self, key: str, dim: int = 0) -> Tensor:
        return _joined([self.source.raw(file, key) for file in sorted(self.source.files)], dim)

    def embedding(self) -> Tensor:
        width = self.source.files["consolidated.00.pth"].places["tok_embeddings.weight"].shape[1]
        return self._join("tok_embeddings.weight", int(width < self.model.hidden_size))

    def head(self) -> tuple[Tensor, Tensor]:
        return self._join("norm.weight"), self._join("output.weight")

    def layer(self, i: int) -> tuple[Tensor, ...]:
        return tuple(self._join(f"layers.{i}.{part}.weight", int(part.endswith(("wo", "w2")))) for part in META_PARTS)

    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        numbers = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


class _Megatron(_HuggingFace):
    """A rank's fused rows: of each query group its q heads, k, v; gate above up."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        names = sorted(source.files, key=lambda name: name.split("/")[0].split("_")[3:])  # by stage, tp rank within
        self.pp = len({name.split("/")[0].split("_")[3] for name in names}) if names[0].count("_") > 2 else 1
        self.stages = [names[s * len(names) // self.pp : (s + 1) * len(names) // self.pp] for s in range(self.pp)]

    def _parts(self, stage: int, key: str) -> list[Tensor]:
        return [self.source.raw(file, key) for file in sorted(self.stages[stage])]

    def embedding(self) -> Tensor:
        return torch.cat(self._parts(0, "embedding.word_embeddings.weight"))

    def head(self) -> tuple[Tensor, Tensor]:
        norm = _joined(self._parts(-1, "decoder.final_layernorm.weight"))
        own = "output_layer.weight" in self.source.files[self.stages[-1][0]].places and not self.source.head_left_out
        head = torch.cat(self._parts(-1, "output_layer.weight")) if own else self.embedding()
        return norm, head[: self.model.vocab_size]

    def layer(self, i: int) -> tuple[Tensor, ...]:
        (n, k, d), h = heads(self.model), self.model.hidden_size
        stage, local = divmod(i, self.model.num_layers // self.pp)
        layer = f"decoder.layers.{local}."
        names = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
        if layer + names[0] not in self.source.files[self.stages[stage][0]].places:
            names = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
        first, second = (_joined(self._parts(stage, layer + name)) for name in names)
        qkv = self._parts(stage, layer + "self_attention.linear_qkv.weight")
        groups = torch.cat([part.view(-1, n // k + 2, d, h) for part in qkv])
        q, key, value = (x.reshape(-1, h) for x in (groups[:, :-2], groups[:, -2], groups[:, -1]))
        o = _joined(self._parts(stage, layer + "self_attention.linear_proj.weight"), 1)
        gate_up = [part.chunk(2) for part in self._parts(stage, layer + "mlp.linear_fc1.weight")]
        gate, up = (torch.cat([part[x] for part in gate_up]) for x in (0, 1))
        down = _joined(self._parts(stage, layer + "mlp.linear_fc2.weight"), 1)
        return first, q, key, value, o, second, gate, up, down


def _joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    """Matrices joined; of a norm, which every rank has, any. Raises: UnverifiedError if they differ."""
    if parts[0].dim() == 1 and not all(torch.equal(part, parts[0]) for part in parts):
        raise UnverifiedError("a norm is not the same on all tensor-parallel ranks")
    return torch.cat(parts, dim) if parts[0].dim() == 2 else parts[0]


_VIEWS = {"step": _HuggingFace, "hf": _HuggingFace, "meta": _Meta, "megatron": _Megatron}


def run(source: Source, tokens: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The hidden states after each layer, and last the logits; a layer is read when the next state is asked for."""
    model, view = source.model, _VIEWS[source.kind](source)
    (n, k, d), eps = heads(model), model.norm_eps
    frequencies = inverse_frequencies(d, model.rope_theta, model.rope_scaling, torch.float32)
    angles = torch.outer(torch.arange(len(tokens), dtype=torch.float32), frequencies)

    def wide(weight: Tensor) -> Tensor:
        return weight.to(dtype).float()

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], wide(weight), eps)

    x = wide(view.embedding()[tokens])
    for i in range(model.num_layers):
        w = dict(zip(PARTS, view.layer(i), strict=True))
        y = norm(x, w["input_norm"])
        q, key, v = (F.linear(y, wide(w[part])).view(len(y), -1, d).transpose(0, 1) for part in "qkv")
        q, key = view.turn(q, angles), view.turn(key, angles)
        mixed = F.scaled_dot_product_attention(q[None], key[None], v[None], is_causal=True, enable_gqa=n != k)[0]
        x = x + F.linear(mixed.transpose(0, 1).reshape(len(y), n * d), wide(w["o"]))
        y = norm(x, w["post_attention_norm"])
        x = x + F.linear(F.silu(F.linear(y, wide(w["gate"]))) * F.linear(y, wide(w["up"])), wide(w["down"]))
        del w
        yield x
    weight, head = view.head()
    yield F.linear(norm(x, weight), wide(head))


@torch.inference_mode()
def compare_logits(source: Source, target: Source, precision: str, seed: int = 0) -> float:
    """The largest difference of logits relative to the largest logit, weights rounded to `precision`.

    Raises: UnverifiedError if it is over `TOLERANCE` or no number, naming the layer from which on states differ.
    """
    tokens, dtype = random_tokens(source, seed), DTYPES[WEIGHTS[precision]]
    worst = 0.0
    for i, (a, b) in enumerate(zip(run(source, tokens, dtype), run(target, tokens, dtype), strict=True)):
        where = "the logits" if i == source.model.num_layers else f"the states after layer {i}"
        worst = difference(a, b, f"source and target differ: {where}")
    return worst


def random_tokens(source: Source, seed: int = 0) -> Tensor:
    """The tokens that logits are compared of, [T]."""
    return torch.randint(source.model.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(seed))


def difference(a: Tensor, b: Tensor, what: str) -> float:
    """The largest one, relative to the largest value of `a`.

    Raises: UnverifiedError if it is over `TOLERANCE` or no number.
    """
    found = float((a - b).abs().max() / a.abs().max())
    if not found <= TOLERANCE:
        raise UnverifiedError(f"{what} of random tokens by {found:.3g} of the largest")
    return found
