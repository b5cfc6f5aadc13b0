"""Hugging Face folders as other programs read them: transformers, and a second reader that shares no code with ours.

Used by ``megallama convert --verify``: a tensor or a setting that nobody here looks at would be missing from
both sides of a conversion alike.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megallama.checkpoint.layout import DTYPES, WEIGHTS
from megallama.convert.compare_logits import difference, random_tokens, run
from megallama.convert.source import Source
from megallama.plan.params import num_parameters

MOST_PARAMETERS = 2_000_000_000  # of a model that is given to transformers, which holds it whole, in fp32


@torch.inference_mode()
def compare(source: Source, precision: str) -> tuple[float, str] | None:
    """How far logits of a Hugging Face folder are from another program's, relative to the largest, and whose those are.

    None for what no other program reads alike: other formats, master weights, a head that was left out.
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

    Configuration, tensors and arithmetic are read and written here once more, so that nothing is shared.
    """
    c = json.loads((folder / "config.json").read_bytes())
    index, names = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.is_file():
        names = {*json.loads(index.read_bytes())["weight_map"].values()}
    files = [safe_open(folder / name, framework="pt") for name in sorted(names)]
    where = {key: file for file in files for key in file.keys()}
    n, count = c["num_attention_heads"], len(tokens)
    k, d = c.get("num_key_value_heads") or n, c.get("head_dim") or c["hidden_size"] // n
    rope = {"rope_theta": c.get("rope_theta", 10000.0), **(c.get("rope_parameters") or c.get("rope_scaling") or {})}
    frequencies = rope["rope_theta"] ** (-torch.arange(0, d, 2).double() / d)
    if rope.get("rope_type", "default") == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = frequencies * rope["original_max_position_embeddings"] / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / rope["factor"])
    angles = torch.outer(torch.arange(count).double(), frequencies).float()
    rotation = torch.polar(torch.ones_like(angles), angles)[:, None]
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
        chances = scores.masked_fill(future, -torch.inf).softmax(-1)
        x = x + torch.einsum("nqk,knd->qnd", chances, value).flatten(1) @ weight(layer + "self_attn.o_proj").T
        y = norm(x, layer + "post_attention_layernorm")
        gate, up = (y @ weight(f"{layer}mlp.{part}_proj").T for part in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ weight(layer + "mlp.down_proj").T
    head = "lm_head" if "lm_head.weight" in where else "model.embed_tokens"
    return norm(x, "model.norm") @ weight(head).T, head
