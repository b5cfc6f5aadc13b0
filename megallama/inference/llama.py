"""The forward pass of rows of different lengths: packed weights, a cache that is written where it lies.

Every row begins at column 0 of the cache; what lies beyond its last position is masked.  Prompts run
back to back, without padding, and each attends to itself alone.  On a CPU a row's logits thus have
the same bits in every batch; with grouped queries up to 512 columns, beyond which sums are blocked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from megallama.config.schema import ModelConfig
from megallama.kernels.candidate import accumulate_dtype
from megallama.kernels.pointwise import rms_norm, rope_tables
from megallama.plan.params import heads

PACKED_FOR = 8  # rows: in this layout of oneDNN's a row's products have the same bits in every batch
PROMPT_TOKENS = 2048  # that run at once: what bounds the memory of their activations
Attend = Callable[[int, Tensor, Tensor], Tensor]  # layer, rotated q and k [T, n + k, d], v [T, k, d] -> [T, n, d]


def packer(like: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """How weights [out, in] are laid out, and the product x @ weight.T of such a one: oneDNN's where it can.

    Measured on one AMD core with AVX-512, 8 rows: 43 GFLOP/s in fp32 and 83 in bf16, F.linear 25 and 53.
    """
    mkldnn, kind = torch.ops.mkldnn, like.dtype

    def product(x: Tensor, weight: Tensor) -> Tensor:
        alone = x.shape[0] == 1 and x.shape[1] > 1024  # oneDNN would cut the sum of a single row in other places
        rows = x.expand(2, -1).contiguous() if alone else x
        return mkldnn._linear_pointwise(rows, weight, None, "none", [], "")[: x.shape[0]]

    able = like.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if able and (kind == torch.float32 or (kind == torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported())):
        return lambda weight: mkldnn._reorder_linear_weight(weight, PACKED_FOR), product
    return lambda weight: weight, F.linear


class Llama:
    """The model for inference: one process, no gradients."""

    def __init__(self, model: ModelConfig, context: int, weights: dict[str, Tensor]) -> None:
        self.model, self.weights = model, weights  # by name, until the first forward pass packs them
        self.notes: Sequence[str] = ()  # what is not as config.json says
        self.context = context  # longest sequence [tokens]
        self.eos = frozenset[int]()  # ids that end a text
        self.embed = weights["model.embed_tokens.weight"]
        self.head = self.embed if model.tie_embeddings else weights["lm_head.weight"]
        exact, device = accumulate_dtype(self.embed.dtype), self.embed.device
        self.cache_dtype = exact if device.type == "cpu" else self.embed.dtype  # there 16 bits are slow in attention
        cos, sin = rope_tables(context, heads(model)[2], model.rope_theta, model.rope_scaling, exact, device)
        self._cos, self._sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)  # [context, 1, d]
        self._layers: list[tuple[Tensor, ...]] = []

    def pack(self) -> None:
        """Lay the weights out for products, once; they leave `weights`: none is held twice."""
        if self._layers:
            return
        pack, self._product = packer(self.embed)
        own = self.weights

        def packed(layer: str, *parts: str) -> Tensor:
            return pack(torch.cat([own.pop(f"{layer}{part}_proj.weight") for part in parts]))

        for name in (f"model.layers.{i}." for i in range(self.model.num_layers)):
            qkv, out = packed(name, "self_attn.q", "self_attn.k", "self_attn.v"), packed(name, "self_attn.o")
            gate_up, down = packed(name, "mlp.gate", "mlp.up"), packed(name, "mlp.down")
            before, between = (own.pop(f"{name}{which}_layernorm.weight") for which in ("input", "post_attention"))
            self._layers.append((before, qkv, out, between, gate_up, down))
        self._norm, self.head = own.pop("model.norm.weight"), pack(self.head)
        own.clear()

    def bytes_per_position(self) -> int:
        """Of the keys and values of one row."""
        return 2 * self.model.num_layers * heads(self.model)[1] * heads(self.model)[2] * self.cache_dtype.itemsize

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend, rows: Tensor | None = None) -> Tensor:
        """Logits [T, v] of `tokens` [T] at `positions` [T]; or [R, v], those of `rows` [R] of them."""
        (n, k, d), eps = heads(self.model), self.model.norm_eps
        x = F.embedding(tokens, self.embed)
        cos, sin = self._cos[positions], self._sin[positions]
        for i, (before, qkv_weight, out, between, gate_up, down) in enumerate(self._layers):
            qkv = self._product(rms_norm(x, before, eps), qkv_weight).view(-1, n + 2 * k, d).to(cos.dtype)
            q_k = qkv[:, : n + k]  # element i is rotated with i + d/2
            q_k = (q_k * cos).addcmul_(q_k.roll(d // 2, -1), sin).to(self.cache_dtype)
            mixed = attend(i, q_k, qkv[:, n + k :].to(self.cache_dtype))
            x = x + self._product(mixed.reshape(-1, n * d).to(x.dtype), out)
            gate, up = self._product(rms_norm(x, between, eps), gate_up).chunk(2, -1)
            x = x + self._product(F.silu(gate).mul_(up), down)
        return self._product(rms_norm(x if rows is None else x[rows], self._norm, eps), self.head)


class Cache:
    """Keys and values of some rows, [layers, 2, rows, kv heads, columns, d].

    room: how many tokens may follow the longest prompt.
    """

    def __init__(self, llama: Llama, prompts: Sequence[Sequence[int]], room: int) -> None:
        llama.pack()
        self._llama, self._prompts, self._lengths = llama, prompts, [*map(len, prompts)]
        _, k, d = heads(llama.model)
        shape = llama.model.num_layers, 2, len(prompts), k, _whole_blocks(max(self._lengths) + room), d
        # zeros: what is masked is multiplied by 0, which must not meet a NaN
        self.tensor = torch.zeros(shape, dtype=llama.cache_dtype, device=llama.embed.device)

    @torch.inference_mode()
    def prefill(self) -> Tensor:
        """Logits [rows, v] after the prompts."""
        at_once, rows = max(1, PROMPT_TOKENS // max(self._lengths)), range(len(self._prompts))
        return torch.cat([self._prefill(rows[a : a + at_once]) for a in rows[::at_once]])

    def _prefill(self, rows: range) -> Tensor:
        (n, k, _), device, prompts = heads(self._llama.model), self.tensor.device, [self._prompts[row] for row in rows]
        ends = [*accumulate(map(len, prompts))]

        def attend(layer: int, q_k: Tensor, v: Tensor) -> Tensor:
            mixed = torch.empty_like(q_k[:, :n])
            for row, prompt, end in zip(rows, prompts, ends, strict=True):
                own, columns = slice(end - len(prompt), end), slice(len(prompt))
                query, keys = q_k[own].transpose(0, 1)[None].split([n, k], 1)
                values = v[own].transpose(0, 1)[None]
                self.tensor[layer, 0, row, :, columns], self.tensor[layer, 1, row, :, columns] = keys[0], values[0]
                out = F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=n != k)
                mixed[own] = out[0].transpose(0, 1)
            return mixed

        tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        positions = torch.cat([torch.arange(len(prompt), device=device) for prompt in prompts])
        return self._llama.forward(tokens, positions, attend, torch.tensor(ends, device=device) - 1)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Logits [rows, v] after one more token of every row."""
        (n, k, d), rows, device = heads(self._llama.model), len(tokens), self.tensor.device
        at, every = torch.tensor(self._lengths, device=device), torch.arange(rows, device=device)
        columns = _whole_blocks(max(self._lengths) + 1)
        hidden = torch.arange(columns, device=device) > at.view(-1, 1, 1, 1)
        mask = torch.zeros_like(hidden, dtype=self.tensor.dtype).masked_fill_(hidden, -torch.inf)

        def attend(layer: int, q_k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.tensor[layer, :, :rows]
            keys[every, :, at], values[every, :, at] = q_k[:, n:], v
            query = q_k[:, :n].view(rows, k, n // k, d)  # heads that share keys: rows of one product
            return F.scaled_dot_product_attention(query, keys[:, :, :columns], values[:, :, :columns], mask)

        self._lengths = [length + 1 for length in self._lengths]
        return self._llama.forward(torch.tensor(tokens, device=device), at, attend)

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Forget all rows but these, in this order; one that moves comes from beyond the last."""
        for to, row in enumerate(rows):
            if to != row:
                columns = slice(self._lengths[row])
                self.tensor[:, :, to, :, columns] = self.tensor[:, :, row, :, columns]
        self._lengths = [self._lengths[row] for row in rows]


def _whole_blocks(columns: int) -> int:
    """So many that the vectors of a sum over columns are full: a masked end adds exactly 0."""
    return -(-columns // 16) * 16
