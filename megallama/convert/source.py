"""The tensors of a checkpoint in any format, one by one, under their Hugging Face names.

A step folder's bytes are verified while they are read; files of other programs must hold exactly the
tensors of the model, and where several ranks hold the same tensor it must be the same.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor

import megallama.convert.foreign as foreign
from megallama.checkpoint import disk, manifest, reader
from megallama.checkpoint.disk import CheckpointError, DamagedError
from megallama.checkpoint.folder import step_folder
from megallama.checkpoint.huggingface import META_CONTEXT, model_files, own_tokenizer, read_model_config, special_tokens
from megallama.checkpoint.manifest import DTYPES, WEIGHTS, TensorPlace
from megallama.config.schema import BatchConfig, Config, ModelConfig, PrecisionConfig
from megallama.convert.foreign import EMBEDDING, Format, Piece
from megallama.convert.pth import PthFile
from megallama.plan.box import Box

PRECISION = {name: precision for precision, name in WEIGHTS.items()}
# what is copied into a result: these alone, for a folder from elsewhere may link to anything
_CARRIED = (
    "config.json generation_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt "
    "chat_template.json chat_template.jinja tokenizer.json tokenizer.model tokenizer.vocab tokenizer_config.json"
).split()
_CARRIED_BYTES = 1 << 28


@dataclass
class Source(AbstractContextManager["Source"]):
    """The weights (or one kind of optimizer state) of a checkpoint in any format."""

    kind: str  # "step", "hf", "meta" or "megatron"
    folder: Path
    model: ModelConfig
    format: Format
    files: Mapping[str, reader.TensorFiles | PthFile]
    small: Mapping[str, bytes]  # config.json and the tokenizer's files, as Hugging Face has them
    saved: manifest.Manifest | None = None
    state: str = "model"  # or "master", "exp_avg", "exp_avg_sq" of a step
    notes: list[str] = field(default_factory=list)  # what is not as its files say
    _last: tuple[str, Tensor] | None = None
    _buffer: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    def __exit__(self, *_: object) -> None:
        for file in self.files.values():
            file.close()

    @property
    def head_left_out(self) -> bool:
        """Whether the files have a head of their own that is not used, as --head tied asks."""
        return self.kind in ("hf", "megatron") and self.model.tie_embeddings and bool(self.notes)

    @property
    def number_formats(self) -> list[str]:
        """The number formats of the tensors, in safetensors' names."""
        return sorted({self._dtype(name) for name in self.format.shapes})

    @property
    def places(self) -> dict[str, TensorPlace]:
        """The tensors as of one file, for those who compare."""
        return {name: TensorPlace("", 0, shape, self._dtype(name)) for name, shape in self.format.shapes.items()}

    def raw(self, file: str, key: str) -> Tensor:
        """A tensor as its file has it."""
        place = self.files[file].places[key]
        out = torch.empty(place.shape, dtype=DTYPES[place.dtype])
        self.files[file].read_rows(key, 0, out)
        return out

    def tensor(self, name: str) -> Tensor:
        """A whole tensor in its stored format; it lies in a buffer that the next call uses again.

        Raises: DamagedError if ranks that should hold the same hold something else.
        """
        self._last = None
        shape, dtype = self.format.shapes[name], DTYPES[self._dtype(name)]
        if not self._buffer.numel():  # touched once: fresh memory costs as much as the copy
            most = max(prod(p.shape) * p.item_bytes for p in self.places.values())
            self._buffer = torch.empty(most, dtype=torch.uint8)
        out = self._buffer[: prod(shape) * dtype.itemsize].view(dtype).view(shape)
        filled, pieces = 0, self.format.pieces[name]
        for piece in pieces:
            part = out[tuple(map(slice, piece.box.start, piece.box.stop))]
            if filled < out.numel() and part.is_contiguous():
                self.files[piece.file].read_rows(piece.key, piece.row, part)
            else:
                self._copy(piece, part, pieces[0] if filled >= out.numel() else None)
            filled += part.numel()
        turn = self.format.pairs.get(name)
        return foreign.halved(out, *turn) if turn else out

    def read_into(self, box: Box, out: Tensor) -> None:
        """Fill `out` (1-D, any dtype) with the elements of `box`, of a tensor kept until the next."""
        if self._last is None or self._last[0] != box.key:
            self._last = box.key, self.tensor(box.key)
        out.copy_(self._last[1][tuple(map(slice, box.start, box.stop))].reshape(-1))

    def _dtype(self, name: str) -> str:
        found = {self.files[p.file].places[p.key].dtype for p in self.format.pieces[name]}
        if len(found) > 1:
            raise CheckpointError(f"{self.folder}: parts of {name} have different number formats: {sorted(found)}")
        return found.pop()

    def _copy(self, piece: Piece, part: Tensor, like: Piece | None) -> None:
        """Read a piece into the rectangle `part`, or compare it, another copy of `like`, with `part`."""
        for a, b in reader.spans(len(part), prod(part.shape[1:]) * part.element_size()):
            rows = torch.empty(part[a:b].shape, dtype=part.dtype)
            self.files[piece.file].read_rows(piece.key, piece.row + a, rows)
            if like is None:
                part[a:b] = rows
            elif not torch.equal(rows.view(torch.uint8), part[a:b].view(torch.uint8)):
                raise DamagedError(
                    f"{self.folder}: {piece.key} of {piece.file} differs from {like.key} of {like.file}; both are "
                    f"{piece.box.key}, which must be the same on both: these files are of different checkpoints"
                )


def open_source(folder: Path, state: str = "model", context: int | None = None, head: str = "auto") -> Source:
    """Open a checkpoint of any format; of a step folder the weights, or `state` ("master", ...).

    `context` is the longest sequence, which Meta's release does not say; `head` is as in `reader.head_of`.
    Raises: CheckpointError naming every tensor that is missing, unknown or misshapen; DamagedError naming the file.
    """
    if (step := step_folder(folder)) is not None:
        saved = manifest.read_manifest(step)
        small = [name for name in saved.files if name.startswith("model/") and "safetensors" not in name]
        if problems := reader.verify_blocks(step, saved, [b for name in small for b in saved.blocks(name)]):
            raise DamagedError("; ".join(problems))
        format, files = foreign.whole_format(saved.model), {"": reader.open_state(step, saved, state)}
        carried, notes = _step_small(step / "model", saved.model)
        return Source("step", step, saved.model, format, files, carried, saved, state, notes=notes)
    if (kind := foreign_kind(folder)) == "meta":
        return _open_meta(folder, context)
    model = read_model_config(folder)
    if kind == "megatron":
        return _open_megatron(folder, model, head)
    found = reader.open_folder(folder)
    model, notes = reader.head_of(folder, found, model, head)
    reader.check_tensors(folder, found, model)
    return Source("hf", folder, model, foreign.whole_format(model), {"": found}, _carried(folder), notes=notes)


def _step_small(folder: Path, model: ModelConfig) -> tuple[dict[str, bytes], list[str]]:
    """The small files of a step, and what there is to say of them.

    Earlier versions exported a SentencePiece model alone, whose ids transformers makes otherwise: it gets its
    tokenizer.json here.
    """
    small, notes = _carried(folder), list[str]()
    if "tokenizer.json" in small or not small.get("tokenizer.model", b"").startswith(b"\n"):
        return small, notes
    begun = json.loads(small.get("tokenizer_config.json", b"{}")).get("add_bos_token", False)
    longest = json.loads(small["config.json"])["max_position_embeddings"]
    tokenizer = folder / "tokenizer.model"
    _, bos = special_tokens(tokenizer).get("bos", ("", None)) if begun else ("", None)
    made = model_files(config_of(model, "F32", longest), tokenizer, {"bos_id": bos}, longest, notes.append)
    return small | {name: data for name, data in made.items() if name.startswith("tokenizer")}, notes


def foreign_kind(folder: Path) -> str | None:
    """ "meta" or "megatron", if the folder has their files."""
    if any(folder.glob("mp_rank_*/")):
        return "megatron"
    alone = (folder / "params.json").is_file() and not (folder / "config.json").is_file()
    return "meta" if alone or any(folder.glob("consolidated.*.pth")) else None


def _carried(folder: Path, names: Sequence[str] = _CARRIED) -> dict[str, bytes]:
    """The files of these names that a folder has. Raises: CheckpointError for a link that leads out of it."""
    root = folder.resolve()  # a cache has models--NAME/snapshots/REVISION, with links to blobs
    blobs = [p.parent / "blobs" for p in root.parents if p.name == "snapshots" and p.parent.name.startswith("models--")]
    found = {}
    for name in filter(lambda name: disk.exists(root / name), names):
        path = Path(os.path.realpath(root / name))
        if not any(path.is_relative_to(inside) for inside in (root, *blobs)):
            raise CheckpointError(f"{folder / name} is a link to {path}; put the file itself into the folder")
        found[name] = disk.read_file(path, _CARRIED_BYTES)
    return found


def _checked(source: Source, ignored: tuple[str, ...]) -> Source:
    problems = []
    for file, want in source.format.files.items():
        found = {k: p for k, p in source.files[file].places.items() if not k.endswith(ignored)}
        problems += [f"{file}: {problem}" for problem in reader.tensor_problems(want, found)]
    reader.refuse(source.folder, problems)
    return source


def _open_meta(folder: Path, context: int | None) -> Source:
    names = sorted(p.name for p in folder.glob("consolidated.*.pth"))
    want = [foreign.META_FILE.format(r) for r in range(max(1, len(names)))]
    if names != want:
        raise CheckpointError(f"{folder} holds {names or 'no consolidated.NN.pth'}; it must hold {want}")
    files = {name: PthFile(folder / name) for name in names}
    shapes = {key: p.shape for key, p in files[names[0]].places.items()}

    def source(tied: bool) -> Source:
        try:
            model = foreign.meta_model(disk.read_json(folder / "params.json"), shapes, len(names), tied)
        except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
            raise CheckpointError(f"{folder / 'params.json'} cannot be used: {error}") from error
        manifest.check_layers(folder / "params.json", model, len(shapes))
        by_rows = shapes.get("tok_embeddings.weight", (0, 0))[1:] == (model.hidden_size,)
        format = foreign.meta_format(model, len(names), by_rows)
        return _checked(Source("meta", folder, model, format, files, {}), ("rope.freqs",))

    found = source(tied=True)
    try:
        found.tensor(EMBEDDING)  # the format has no word for it: tied is a head that equals the embedding
    except DamagedError:
        found = source(tied=False)
    found.small = _meta_small(found, context)
    return found


def _meta_small(source: Source, context: int | None) -> dict[str, bytes]:
    """config.json and the tokenizer's files."""
    model = source.model
    longest = context or (META_CONTEXT if model.rope_scaling else 8192 if model.rope_theta == 500000 else 2048)
    config = config_of(model, source.number_formats[0], longest)
    near = (source.folder, source.folder.parent)  # LLaMA 1 has it above
    path = next((f / "tokenizer.model" for f in near if disk.exists(f / "tokenizer.model")), None)
    kept = _carried(path.parent, [path.name]) if path else {}
    usable = path if own_tokenizer(kept) else None
    _, bos = special_tokens(usable).get("bos", ("", None)) if usable else ("", None)  # Meta trained with it
    return model_files(config, usable, {"bos_id": bos}, longest, source.notes.append) | kept


def _open_megatron(folder: Path, model: ModelConfig, head: str) -> Source:
    ranks = sorted(p.name for p in folder.glob("mp_rank_*/"))
    numbers = [[int(x) for x in re.findall(r"_(\d{1,6})", name)] or [0] for name in ranks]
    tp, pp = (1 + max(sum(n[i : i + 1]) for n in numbers) for i in (0, 1))  # PPP only where there are several
    want = [foreign.megatron_file(i // pp, i % pp, pp) for i in range(min(tp * pp, len(ranks) + 8))]
    if sorted(name + "/model.safetensors" for name in ranks) != sorted(want):
        raise CheckpointError(f"{folder} holds {', '.join(ranks)}; it must hold {', '.join(want)}")
    files = {name: reader.open_files(folder, [name]) for name in want}
    first = files[want[0]].places
    word = first.get(foreign.MEGATRON_EMBEDDING)
    rows = word.shape[0] * tp if word and word.shape else model.vocab_size
    if rows < model.vocab_size:
        raise CheckpointError(f"{folder}: the embedding has {rows} rows in all, the vocabulary {model.vocab_size}")
    manifest.check_layers(folder / "config.json", model, sum(len(file.places) for file in files.values()))
    local = "decoder.layers.0." + foreign.LOCAL_NORMS[0] in first
    norms = foreign.LOCAL_NORMS if local else foreign.FUSED_NORMS
    notes, own = list[str](), False
    for t in range(tp if model.tie_embeddings else 0):
        one, other = (files[foreign.megatron_file(t, stage, pp)] for stage in (0, pp - 1))
        if foreign.MEGATRON_EMBEDDING in one.places and foreign.MEGATRON_HEAD in other.places:
            held = (one.places[foreign.MEGATRON_EMBEDDING].shape or (0,))[0]
            held = min(held, max(0, model.vocab_size - t * rows // tp))  # below them is padding
            own = own or not reader.equal_rows(one, foreign.MEGATRON_EMBEDDING, other, foreign.MEGATRON_HEAD, held)
    if own:
        model, notes = reader.own_head(f"{folder}: {foreign.MEGATRON_HEAD}", model, head)
    format = foreign.megatron_format(model, tp, pp, rows, norms, copy=False)
    ignored = ("_extra_state", ".inv_freq", *([foreign.MEGATRON_HEAD] if model.tie_embeddings else []))
    return _checked(Source("megatron", folder, model, format, files, _carried(folder), notes=notes), ignored)


def config_of(model: ModelConfig, kind: str, longest: int) -> Config:
    """A configuration of which model, number format and longest sequence matter."""
    return Config(model=model, precision=PrecisionConfig(dtype=PRECISION[kind]), batch=BatchConfig(seq_length=longest))
