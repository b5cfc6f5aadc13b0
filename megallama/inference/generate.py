"""Text from a checkpoint: one process, a KV cache, greedy or sampled.

Any ``model/`` folder of a checkpoint is a Hugging Face folder and any LLaMA of Hugging Face's form can
be read here.  The prompt is run once; then each new token costs one row: its keys and values join
the cache of all earlier positions, which is why earlier rows never run again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megallama.checkpoint import disk, manifest, reader
from megallama.checkpoint.disk import CheckpointError, DamagedError
from megallama.checkpoint.folder import find_checkpoint, step_folder
from megallama.checkpoint.huggingface import read_model_config
from megallama.config.errors import ConfigError, counted
from megallama.config.schema import ModelConfig
from megallama.config.special_tokens import read_settings
from megallama.data.tokenizer import Tokenizer
from megallama.kernels.candidate import accumulate_dtype
from megallama.kernels.pointwise import apply_rope, rms_norm, rope_tables
from megallama.plan.params import global_shapes, heads

MAX_CONTEXT = 1 << 24  # a model that claims more would fill the memory with tables of angles
_PARTIAL = "\N{REPLACEMENT CHARACTER}"  # how a decoder shows the bytes of half a character


class Cache:
    """Keys and values of the positions already run: [layers, 2, kv heads, capacity, d]."""

    def __init__(self, model: ModelConfig, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        _, k, d = heads(model)
        self.tensor = torch.empty(model.num_layers, 2, k, capacity, d, dtype=dtype, device=device)
        self.length = 0


class Llama:
    """The model for inference: plain torch, no parallelism."""

    def __init__(
        self, model: ModelConfig, context: int, weights: Mapping[str, Tensor], eos: frozenset[int] = frozenset()
    ) -> None:
        self.model, self.weights = model, weights
        self.notes: list[str] = []  # what is not as config.json says
        self.context = context  # longest sequence [tokens]
        self.eos = eos  # ids that end a text
        self.embed = weights["model.embed_tokens.weight"]
        self.head = self.embed if model.tie_embeddings else weights["lm_head.weight"]
        dtype, device = accumulate_dtype(self.embed.dtype), self.embed.device
        self.cos, self.sin = rope_tables(context, heads(model)[2], model.rope_theta, model.rope_scaling, dtype, device)

    def cache(self, capacity: int) -> Cache:
        """An empty cache for `capacity` positions."""
        return Cache(self.model, capacity, self.embed.dtype, self.embed.device)

    @torch.inference_mode()
    def forward(self, tokens: Tensor, cache: Cache, *, last_only: bool = False) -> Tensor:
        """Logits [T, v] of `tokens` [T], which follow what is in `cache` and join it; or [1, v], the last row's."""
        start, stop = cache.length, cache.length + len(tokens)
        x = F.embedding(tokens, self.embed)
        for i in range(self.model.num_layers):
            x = x + self._attention(i, self._norm(x, f"model.layers.{i}.input_layernorm"), cache.tensor[i], start, stop)
            y = self._norm(x, f"model.layers.{i}.post_attention_layernorm")
            gate, up = (self._linear(y, f"model.layers.{i}.mlp.{part}_proj") for part in ("gate", "up"))
            x = x + self._linear(F.silu(gate) * up, f"model.layers.{i}.mlp.down_proj")
        cache.length = stop
        return F.linear(self._norm(x[-1:] if last_only else x, "model.norm"), self.head)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.weights[name + ".weight"], self.model.norm_eps)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[name + ".weight"])

    def _attention(self, layer: int, x: Tensor, cache: Tensor, start: int, stop: int) -> Tensor:
        """Rows start..stop-1 attend to all positions up to their own. x, result [T, h]."""
        n, k, d = heads(self.model)
        name = f"model.layers.{layer}.self_attn."
        parts = {"q": n, "k": k, "v": k}
        query, key, value = (self._linear(x, f"{name}{p}_proj").view(1, -1, count, d) for p, count in parts.items())
        for rows in (query, key):
            apply_rope(rows, self.cos[start:stop], self.sin[start:stop], out=rows)
        cache[0, :, start:stop] = key[0].transpose(0, 1)
        cache[1, :, start:stop] = value[0].transpose(0, 1)
        seen = None  # a single row sees everything
        if start > 0 and stop - start > 1:
            seen = torch.ones(stop - start, stop, dtype=torch.bool, device=x.device).tril(start)
        keys, values = cache[:, None, :, :stop]
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), keys, values, seen, is_causal=start == 0 and stop > 1, enable_gqa=n != k
        )
        return self._linear(mixed[0].transpose(0, 1).reshape(-1, n * d), name + "o_proj")


def find_model(path: Path, tell: Callable[[str], None] = lambda text: None) -> Path:
    """The Hugging Face folder that `path` means: one itself, or the model/ of the step that `find_checkpoint` finds.

    Raises: CheckpointError if there is none.
    """
    for folder in (path, path / "model"):
        if disk.exists(folder / "config.json"):
            return folder
    if (step := find_checkpoint(path, tell)) != path:
        return step / "model"
    what = "has no complete checkpoint in it" if path.is_dir() else "is not a folder"
    raise CheckpointError(f"{path} {what}; give a step folder, a folder of steps, a run or a Hugging Face folder")


def load_llama(folder: Path, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Llama:
    """The model of a step folder, run or Hugging Face folder, in the number format it was saved in or in `dtype`.

    Bytes are verified against the checkpoint's digests as they are read.  Raises CheckpointError for
    a folder, file or tensor that is missing, damaged or no part of a LLaMA.
    """
    folder = find_model(folder)
    step = step_folder(folder)
    if step and (problems := reader.verify_blocks(step, manifest.read_manifest(step), [("model/config.json", 0)])):
        raise DamagedError(problems[0])
    model = read_model_config(folder)
    with reader.open_folder(folder) as files:
        model, notes = reader.head_of(folder, files, model)
        reader.check_tensors(folder, files, model)
        weights = {name: files.tensor(name, dtype).to(device or "cpu") for name in global_shapes(model)}
    path = folder / "config.json"
    raw = disk.read_json(path)
    longest = raw.get("max_position_embeddings")
    if type(longest) is not int or not 0 < longest <= MAX_CONTEXT:
        raise CheckpointError(f"{path} has max_position_embeddings={longest}; write the longest sequence [tokens]")
    eos = read_settings(folder / "generation_config.json").get("eos_token_id", raw.get("eos_token_id"))
    ends = frozenset(i for i in (eos if isinstance(eos, list) else [eos]) if isinstance(i, int))
    llama = Llama(model, longest, weights, ends)
    llama.notes = notes
    return llama


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Raises ConfigError for values outside their range."""

    temperature: float = 1.0  # 0 takes the most likely token
    top_p: float = 1.0  # draw from the fewest tokens whose probabilities reach this (Holtzman et al. 2020)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature={self.temperature} is negative; use 0 for greedy, about 0.8 to sample")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} is not a share; use a value above 0 and at most 1")


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> int:
    """A token id from logits [v]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered, ids = probabilities.sort(descending=True)
        before = ordered.cumsum(0) - ordered  # what the likelier tokens have already
        probabilities = torch.zeros_like(probabilities).scatter(0, ids, ordered.where(before < sampling.top_p, 0.0))
    return int(torch.multinomial(probabilities, 1, generator=generator))


def generate(
    llama: Llama, prompt: Sequence[int], max_tokens: int, sampling: Sampling, *, num_ids: int | None = None
) -> Iterator[int]:
    """New token ids after `prompt`, one by one: at most `max_tokens`, up to `llama.eos` or the context's end.

    num_ids: of the tokenizer; ids from there on pad the model's vocabulary and are never drawn.
    Raises ConfigError if the prompt is empty, holds an id beyond the vocabulary or fills the context.
    """
    vocab, context = llama.model.vocab_size, llama.context
    if not prompt:
        raise ConfigError("the prompt has no tokens; give at least one word")
    if len(prompt) >= context:
        length = counted(len(prompt), "token")
        raise ConfigError(f"the prompt has {length}; this model sees {context}: give at most {context - 1}")
    if min(prompt) < 0 or max(prompt) >= vocab:
        wrong = next(token for token in prompt if not 0 <= token < vocab)
        raise ConfigError(f"the prompt holds token id {wrong}, the model 0..{vocab - 1}: use the model's own tokenizer")
    device = llama.embed.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    count = min(max_tokens, context - len(prompt))
    cache = llama.cache(len(prompt) + count)
    tokens = torch.tensor(prompt, device=device)
    for _ in range(count):
        token = draw(llama.forward(tokens, cache, last_only=True)[0, :num_ids], sampling, generator)
        if token in llama.eos:
            return
        yield token
        tokens = torch.tensor([token], device=device)


def stream_text(tokens: Iterator[int], decode: Callable[[list[int]], str], prompt: Sequence[int]) -> Iterator[str]:
    """Pieces of text as tokens arrive; a character of several tokens comes out when it is complete.

    Only a short tail is decoded each time, beginning at the last piece: how a token reads depends on
    the one before it (a leading space, half a character), never on earlier ones.
    """
    tail, pending = list(prompt[-8:]), 0
    done = decode(tail).rstrip(_PARTIAL)
    for token in tokens:
        tail.append(token)
        pending += 1
        text = decode(tail)
        if text.endswith(_PARTIAL) and pending < 4:  # UTF-8 characters have at most 4 bytes
            continue
        yield text[len(done) :]
        tail, pending = tail[-8:], 0
        done = decode(tail)
    if pending:
        yield decode(tail)[len(done) :]


def encode_prompt(folder: Path, tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a prompt as Hugging Face's tokenizer of the same folder would give them: with bos or without.

    An empty text stands for the start of a document: bos, or eos where documents were joined by it.
    """
    ids = tokenizer.encode(text) if text else []
    if tokenizer.bos_id is not None and adds_bos(folder, tokenizer.path):
        return [tokenizer.bos_id, *ids]
    return ids or [i for i in (tokenizer.eos_id,) if i is not None]


def adds_bos(folder: Path, tokenizer: Path) -> bool:
    """What tokenizer_config.json says; where it is silent, what the training or the tokenizer's post-processor does."""
    said = read_settings(folder / "tokenizer_config.json").get("add_bos_token")
    if said is None and step_folder(folder) is not None:
        return False  # of a version that wrote no bos into documents, and did not say so
    if said is not None or tokenizer.suffix != ".json":
        return said is not False
    processor = json.loads(tokenizer.read_bytes()).get("post_processor") or {}
    return any(part.get("special_tokens") for part in [processor, *processor.get("processors", [])])
