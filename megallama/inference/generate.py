"""Text from a checkpoint: one process, a KV cache, greedy or sampled.

Any ``model/`` folder of a checkpoint is a Hugging Face folder and any LLaMA of Hugging Face's form can
be read here.  The prompt is run once; then each new token costs one row: its keys and values join
the cache of all earlier positions, which never run again.  Many prompts run as the rows of batches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megallama.checkpoint import disk, manifest, reader
from megallama.checkpoint.disk import CheckpointError, DamagedError
from megallama.checkpoint.folder import find_checkpoint, step_folder
from megallama.checkpoint.huggingface import read_model_config
from megallama.config.errors import ConfigError, counted
from megallama.config.special_tokens import read_settings
from megallama.data.tokenizer import Tokenizer
from megallama.inference.llama import Cache, Llama
from megallama.plan.params import global_shapes

Decode = Callable[[list[int]], str]
_PARTIAL = "\N{REPLACEMENT CHARACTER}"  # how a decoder shows the bytes of half a character
_BEFORE = 8  # tokens that a new one is decoded with
CACHE_BYTES = 1 << 30
MAX_ROWS = 32  # a product of so many rows waits for its weights no longer
MAX_CONTEXT = 1 << 24  # a model that claims more would fill the memory with tables of angles


def find_model(path: Path, tell: Callable[[str], None] = lambda text: None) -> Path:
    """The Hugging Face folder that `path` means, or model/ of its step. Raises: CheckpointError if there is none."""
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
        dtype = dtype or files.tensor("model.norm.weight").dtype  # of files that mix formats, that of the norms
        weights = {name: files.tensor(name, dtype).to(device or "cpu") for name in global_shapes(model)}
    path = folder / "config.json"
    raw = disk.read_json(path)
    longest = raw.get("max_position_embeddings")
    if type(longest) is not int or not 0 < longest <= MAX_CONTEXT:
        raise CheckpointError(f"{path} has max_position_embeddings={longest}; write the longest sequence [tokens]")
    eos = read_settings(folder / "generation_config.json").get("eos_token_id", raw.get("eos_token_id"))
    ends = frozenset(i for i in (eos if isinstance(eos, list) else [eos]) if isinstance(i, int))
    llama = Llama(model, longest, weights)
    llama.eos, llama.notes = ends, notes
    return llama


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Raises ConfigError for values outside their range."""

    temperature: float = 1.0  # 0 takes the most likely token
    top_p: float = 1.0  # draw from the fewest tokens whose probabilities reach this (Holtzman et al. 2020)
    seed: int = 0
    top_k: int = 0  # draw from this many likeliest tokens (Fan et al. 2018), before `top_p`; 0: from all

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature={self.temperature} is negative; use 0 for greedy, about 0.8 to sample")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} is not a share; use a value above 0 and at most 1")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k} is negative; use 0 for all tokens, about 40 for the likeliest")


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What each token is drawn with, fp64 [rows, v], from logits [rows, v]; the temperature is not 0."""
    scaled = logits.double() / max(sampling.temperature, 1e-6)  # by less they would be infinite
    if 0 < sampling.top_k < scaled.shape[-1]:
        least = scaled.topk(sampling.top_k).values[:, -1:]  # those equal to the last one stay, as in transformers
        scaled = scaled.where(scaled >= least, -torch.inf)
    shares = torch.softmax(scaled, dim=-1)
    if sampling.top_p < 1:
        ordered, ids = shares.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # what the likelier tokens have already
        shares = torch.zeros_like(shares).scatter(-1, ids, ordered.where(before < sampling.top_p, 0.0))
    return shares


def draw(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> list[int]:
    """A token id for each row of logits [rows, v]; each row draws from its own generator."""
    if not logits.isfinite().all():
        raise CheckpointError("logits are not finite: weights are damaged, or too large for this --dtype; use fp32")
    if sampling.temperature == 0:
        return [int(token) for token in logits.argmax(-1).tolist()]
    rows = probabilities(logits, sampling)
    return [int(torch.multinomial(row, 1, generator=own)) for row, own in zip(rows, generators, strict=True)]


class Transcript:
    """The text after a prompt, token by token.

    Only a short tail is decoded each time, beginning at the last piece: how a token reads depends on
    the one before it (a leading space, half a character), never on earlier ones.
    """

    def __init__(self, decode: Decode | None, prompt: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        if "" in stop:
            raise ConfigError("a stop string is empty and would end every text before it begins; leave it out")
        self._decode = decode or (lambda ids: "")  # there is no text then
        self._tail, self._pending = list(prompt[-_BEFORE:]), 0
        self._done = self._decode(self._tail).rstrip(_PARTIAL)
        self._stop, self._shown = stop, 0
        self._held = max(0, max(map(len, stop), default=0) - 1)  # characters that may begin a stop string
        self.text = ""  # ends before a stop string
        self.stopped = False  # by a stop string

    def push(self, token: int) -> str:
        """What is certain now and was not before: no half character, nothing that may begin a stop string."""
        self._tail.append(token)
        self._pending += 1
        text = self._decode(self._tail)
        if text.endswith(_PARTIAL) and self._pending < 4:  # UTF-8 characters have at most 4 bytes
            return ""
        return self._add(text)

    def end(self) -> str:
        """What was held back when the last token has come."""
        piece = self._add(self._decode(self._tail)) if self._pending and not self.stopped else ""
        return piece + self._show(0)

    def _add(self, text: str) -> str:
        seen = max(0, len(self.text) - self._held)  # a stop string may begin here and not before
        self.text += text[len(self._done) :]
        self._tail, self._pending = self._tail[-_BEFORE:], 0
        self._done = self._decode(self._tail)
        if found := [at for at in (self.text.find(stop, seen) for stop in self._stop) if at >= 0]:
            self.text, self.stopped = self.text[: min(found)], True
        return self._show(0 if self.stopped else self._held)

    def _show(self, held: int) -> str:
        upto = max(self._shown, len(self.text) - held)
        piece, self._shown = self.text[self._shown : upto], upto
        return piece


@dataclass
class Continuation:
    """A prompt and what has come after it."""

    prompt: Sequence[int]
    room: int  # most tokens that can come
    cut: bool  # by the context: more were asked for
    generator: torch.Generator
    transcript: Transcript
    tokens: list[int] = field(default_factory=list)  # with those that spell a stop string, without an `eos`
    ended: str = ""  # "eos", "stop", "length" (as many tokens as were asked for) or "context" (which is full)

    @property
    def text(self) -> str:
        """Up to the first stop string."""
        return self.transcript.text

    def push(self, token: int, eos: frozenset[int]) -> bool:
        """Take a token; whether another one may come."""
        if token in eos:
            self.ended = "eos"
        else:
            self.tokens.append(token)
            self.transcript.push(token)
        if len(self.tokens) == self.room:
            self.ended = "context" if self.cut else "length"
        if self.ended:
            self.transcript.end()
        if self.transcript.stopped:
            self.ended = "stop"
        return not self.ended


def generate(
    llama: Llama, prompt: Sequence[int], max_tokens: int, sampling: Sampling, *, num_ids: int | None = None
) -> Iterator[int]:
    """New token ids after `prompt`, one by one: at most `max_tokens`, up to `llama.eos` or the context's end.

    num_ids: of the tokenizer; ids from there on pad the model's vocabulary and are never drawn.
    Raises ConfigError if the prompt is empty, holds an id beyond the vocabulary or fills the context.
    """
    row = _begin(llama, prompt, "the prompt", max_tokens, sampling.seed, Transcript(None))
    for _ in _run(llama, [row], sampling, num_ids):
        yield from row.tokens[-1:] if row.ended != "eos" else ()


def generate_batch(
    llama: Llama,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling,
    *,
    tokenizer: Tokenizer | None = None,
    stop: Sequence[str] = (),
    cache_bytes: int = CACHE_BYTES,
    max_rows: int = MAX_ROWS,
) -> list[Continuation]:
    """What follows each of `prompts` (token ids), in their order: at most `max_tokens` tokens of each.

    A text ends at the first of `llama.eos`, a string of `stop` and the context's end.  Its result is
    that of the prompt alone (see `llama.py`): prompt i draws as `generate` does with seed + i.  Prompts
    of similar length run together: `max_rows` at most, and no more than have their keys and values
    in `cache_bytes`, but always one.  Without a tokenizer there is no text.

    Raises: ConfigError for a prompt that cannot be run, by its number from 1, before any is run.
    """
    for name, value in (("max_tokens", max_tokens), ("max_rows", max_rows)):
        if value < 1:
            raise ConfigError(f"{name}={value} makes no text; use 1 or more")
    if stop and all(stop) and tokenizer is None:
        raise ConfigError(f"stop={list(stop)} is looked for in the text: hand over the tokenizer, too")
    decode, num_ids = (tokenizer.decode, tokenizer.vocab_size) if tokenizer else (None, None)
    rows = []
    for i, prompt in enumerate(prompts):
        name, transcript = f"prompt {i + 1} of {len(prompts)}", Transcript(decode, prompt, stop)
        rows.append(_begin(llama, prompt, name, max_tokens, sampling.seed + i, transcript))
    for batch in _batches(rows, cache_bytes // llama.bytes_per_position(), max_rows):
        for _ in _run(llama, batch, sampling, num_ids):
            pass
    return rows


def _begin(
    llama: Llama, prompt: Sequence[int], name: str, max_tokens: int, seed: int, transcript: Transcript
) -> Continuation:
    """Nothing has come after the prompt, called `name`, yet. Raises ConfigError if it cannot be run."""
    vocab, context = llama.model.vocab_size, llama.context
    if not prompt:
        raise ConfigError(f"{name} has no tokens; give at least one word")
    if len(prompt) >= context:
        length = counted(len(prompt), "token")
        raise ConfigError(f"{name} has {length}; this model sees {context}: give at most {context - 1}")
    if min(prompt) < 0 or max(prompt) >= vocab:
        wrong = next(token for token in prompt if not 0 <= token < vocab)
        raise ConfigError(f"{name} holds token id {wrong}, the model 0..{vocab - 1}: use the model's own tokenizer")
    room = min(max_tokens, context - len(prompt))
    seed = seed if abs(seed) < 1 << 63 else seed % (1 << 64)  # as much as it takes
    draw = torch.Generator(llama.embed.device).manual_seed(seed)
    return Continuation(prompt, room, room < max_tokens, draw, transcript)


def _batches(rows: Sequence[Continuation], positions: int, max_rows: int) -> list[list[Continuation]]:
    """The longest prompts first, as many together as have room in a cache of `positions`; at least one."""
    batches: list[list[Continuation]] = []
    for row in sorted(rows, key=lambda row: -len(row.prompt)):
        more = [*batches[-1], row] if batches else []
        needed = len(more) * (len(more[0].prompt) + max(r.room for r in more)) if more else 0
        if not more or len(more) > max_rows or needed > positions:
            batches.append([row])
        else:
            batches[-1] = more
    return batches


def _run(llama: Llama, rows: list[Continuation], sampling: Sampling, num_ids: int | None) -> Iterator[None]:
    """One batch, token by token, to its end; the last row takes an ended one's place."""
    cache = Cache(llama, [row.prompt for row in rows], max(row.room for row in rows))
    logits = cache.prefill()
    while True:
        picked = draw(logits[:, :num_ids], sampling, [row.generator for row in rows])
        going = [row.push(token, llama.eos) for row, token in zip(rows, picked, strict=True)]
        yield
        slots = [*range(len(rows))]
        for slot in reversed(range(len(rows))):
            if not going[slot]:
                slots[slot] = slots[-1]
                slots.pop()
        if not slots:
            return
        if len(slots) < len(rows):
            cache.keep(slots)
            rows, picked = [rows[slot] for slot in slots], [picked[slot] for slot in slots]
        logits = cache.step(picked)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line. Raises: ConfigError."""
    try:
        lines = path.read_text("utf-8-sig").removesuffix("\n").split("\n")  # not at every sign that ends a line
        if lines == [""]:
            raise ValueError("it is empty")
        return [json.loads(line)["prompt"] for line in lines] if path.suffix == ".jsonl" else lines
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        form = 'one prompt a line, {"prompt": "text"} in a .jsonl'
        raise ConfigError(f"--prompts={path} cannot be read: {error!r}; write {form}") from error


def encode_prompt(folder: Path, tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a prompt as Hugging Face's tokenizer of the same folder would give them: with bos or without.

    An empty text stands for the start of a document: bos, or eos where documents were joined by it.
    """
    ids = tokenizer.encode(text) if text else []
    if tokenizer.bos_id is not None and adds_bos(folder, tokenizer.path):
        return [tokenizer.bos_id, *ids]
    return ids or [i for i in (tokenizer.eos_id,) if i is not None]


def adds_bos(folder: Path, tokenizer: Path) -> bool:
    """What tokenizer_config.json says, else what the training or the post-processor does."""
    said = read_settings(folder / "tokenizer_config.json").get("add_bos_token")
    if said is None and step_folder(folder) is not None:
        return False  # of a version that wrote no bos into documents, and did not say so
    if said is not None or tokenizer.suffix != ".json":
        return said is not False
    processor = json.loads(tokenizer.read_bytes()).get("post_processor") or {}
    return any(part.get("special_tokens") for part in [processor, *processor.get("processors", [])])
