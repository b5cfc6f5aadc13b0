"""Any checkpoint format to any other, tensor by tensor: in memory is one tensor and a few megabytes.

The result is written beside TARGET, made durable, checked, and renamed; a failure leaves nothing behind.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megallama.convert.foreign as foreign
from megallama.checkpoint import manifest, reader
from megallama.checkpoint.disk import CheckpointError, sync, write_at
from megallama.checkpoint.folder import step_folder, unfinished
from megallama.checkpoint.huggingface import TORCH_NAMES
from megallama.checkpoint.manager import CheckpointManager
from megallama.checkpoint.manifest import DTYPES, SHARD_BYTES, STATE, WEIGHTS, FileSet, TensorPlace, file_set, lay_out
from megallama.checkpoint.writer import Content, Flusher, as_bytes, create_files, explained, open_files
from megallama.comm.group import Solo
from megallama.config.schema import CheckpointConfig, Config, PrecisionConfig
from megallama.convert.foreign import Format
from megallama.convert.pth import pack
from megallama.convert.source import PRECISION, Source, config_of, open_source
from megallama.layers.param import Shard
from megallama.plan.box import Box

_START: dict[str, Any] = {  # counters of a run that has only its weights
    **{"step": 0, "updates": 0, "samples": 0, "tokens": 0, "scaler": {}},
    "bad_steps": {"skipped": 0, "in_a_row": 0, "last_good": None},
}


class UnverifiedError(CheckpointError):
    """A conversion whose result does not compute what its source computes."""


@dataclass(frozen=True)
class ConvertOptions:
    """What `convert` is to write; None where the source decides."""

    to: str  # "step", "hf", "meta" or "megatron"
    tp: int = 1
    pp: int = 1
    dtype: str | None = None  # as in precision.dtype
    shard_bytes: int = SHARD_BYTES
    vocab_multiple: int = 128  # Megatron pads the vocabulary to a multiple of this times tp
    head: str = "auto"  # or "tied", as in `reader.head_of`


Check = Callable[[Source, Path, str], None]


def convert(folder: Path, target: Path, options: ConvertOptions, context: int | None, check: Check) -> None:
    """Write the checkpoint `folder` to `target` in another format.

    `check` is called with the source, the finished result's folder and its number format before it gets its name.
    Raises: CheckpointError, also for a `target` that exists; UnverifiedError from `check`: the result is then kept
    as TARGET.unverified.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists; give a new folder, or delete it first")
    temporary = unfinished(target)
    step = step_folder(folder)
    stored = manifest.read_manifest(step).precision if step else None
    masters = step is not None and (options.to == "step" or options.dtype not in (None, stored))
    with open_source(folder, "master" if masters else "model", context, options.head) as source:
        if options.head == "tied" and not source.model.tie_embeddings:
            raise CheckpointError(f"--head tied: {folder} does not say that its head is tied; leave the option out")
        if stored is None and len(source.number_formats) > 1 and options.dtype is None:
            raise CheckpointError(f"{folder} mixes the number formats {source.number_formats}; choose one with --dtype")
        dtype = options.dtype or stored or PRECISION[source.number_formats[0]]
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            if options.to == "step":
                _write_step(source, temporary, options.shard_bytes, dtype)
            else:
                _write_files(source, target, options, WEIGHTS[dtype])
            check(source, temporary, dtype)
            temporary.rename(target)
            sync(target.parent)
        except UnverifiedError:
            kept = target.with_name(target.name + ".unverified")
            shutil.rmtree(kept, ignore_errors=True)
            temporary.rename(kept)
            raise
        except OSError as error:
            raise CheckpointError(f"{error.filename or target}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _plan(source: Source, options: ConvertOptions, dtype: str) -> tuple[Format, dict[str, FileSet], dict[str, bytes]]:
    """(where the tensors go, their files, small files by name) of another program's target."""
    model, small = source.model, dict(source.small)
    if options.to == "meta":
        rows = model.rope_theta == 500000 or model.rope_scaling is not None  # LLaMA 3
        format = foreign.meta_format(model, options.tp, rows)
        small = {name: data for name, data in small.items() if name.startswith("tokenizer")}
        sets = {file: lay_out({file + ".raw": shapes}, dtype) for file, shapes in format.files.items()}
        return format, sets, small | {"params.json": (json.dumps(foreign.meta_params(model)) + "\n").encode()}
    small = _small(source, PRECISION[dtype])
    if options.to == "megatron":
        multiple = options.vocab_multiple * options.tp
        format = foreign.megatron_format(model, options.tp, options.pp, -(-model.vocab_size // multiple) * multiple)
        return format, {file: lay_out({file: shapes}, dtype) for file, shapes in format.files.items()}, small
    format = foreign.whole_format(model)
    sets = {"": file_set("model", format.shapes, dtype, options.shard_bytes)}
    return format, sets, small | {"model.safetensors.index.json": sets[""].index()}


def _small(source: Source, dtype: str) -> dict[str, bytes]:
    """config.json and the tokenizer's files, as the source has them but for the number format and the head."""
    settings, tied = json.loads(source.small["config.json"]), source.model.tie_embeddings
    settings |= dict.fromkeys(("torch_dtype", "dtype"), TORCH_NAMES[dtype])
    if settings.get("tie_word_embeddings", False) != tied:
        settings["tie_word_embeddings"] = tied
    return {**source.small, "config.json": (json.dumps(settings, indent=2) + "\n").encode()}


def _write_files(source: Source, target: Path, options: ConvertOptions, dtype: str) -> None:
    """Write a target of other programs, under its unfinished name, and make it durable."""
    format, sets, small = _plan(source, options, dtype)
    content = Content(target, sets, small, {}, 0)
    with explained(content):
        create_files(content)
        paths = [content.temporary / name for name in content.sizes]
        with open_files(content.temporary) as fd_of, Flusher(paths) as flusher:
            for name, shape in format.shapes.items():
                tensor, turn = source.tensor(name), format.pairs.get(name)
                tensor = foreign.paired(tensor, *turn) if turn else tensor
                for piece in format.pieces[name]:
                    place = sets[piece.file].places[piece.key]
                    part = tensor[tuple(map(slice, piece.box.start, piece.box.stop))]
                    _write_rows(name, part, place, piece.row, fd_of(place.file))
                flusher.wrote(prod(shape) * DTYPES[dtype].itemsize)
            flusher.begin()
            flusher.finish()
        if options.to == "meta":
            for file, one in sets.items():
                raw = content.temporary / next(iter(one.sizes))
                pack(raw, one.places, content.temporary / file)
                raw.unlink()
                sync(content.temporary / file)
        for folder in {(content.temporary / name).parent for name in ("", *content.sizes)}:
            sync(folder)


def _write_rows(name: str, part: Tensor, place: TensorPlace, first: int, fd: int) -> None:
    """Write a part of a tensor in the target's number format, from row `first` on."""
    row = prod(place.shape[1:]) * place.item_bytes
    for a, b in reader.spans(len(part), row):
        data = part[a:b].to(DTYPES[place.dtype])
        if place.dtype == "F16" and not data.isfinite().all():
            raise CheckpointError(f"{name} holds values that fp16 cannot; choose --dtype bf16 or fp32")
        write_at(fd, as_bytes(data), place.offset + (first + a) * row)


def _shards(shapes: Mapping[str, tuple[int, ...]], sources: Sequence[Source]) -> Iterator[Shard]:
    """The state of one tensor after the other, read when asked for; moments nobody has are zero."""
    for name, shape in shapes.items():
        found = [source.tensor(name).reshape(-1) for source in sources]
        zeros = torch.zeros(()).expand(found[0].shape)
        yield Shard(Box.whole(name, shape), dict(zip(STATE, [*found, zeros, zeros], strict=False)))


def _write_step(source: Source, folder: Path, shard_bytes: int, dtype: str) -> None:
    """Write folder/step-N: of a step folder with its moments and counters, else as the start of a run."""
    saved = source.saved
    longest = json.loads(source.small["config.json"]).get("max_position_embeddings", 2048)
    config = config_of(source.model, WEIGHTS[dtype], longest)
    with suppress(ValueError):  # it may have been written by another version
        config = Config.model_validate(saved.config) if saved else config
    now = {"precision": PrecisionConfig(dtype=dtype), "checkpoint": CheckpointConfig(async_save=False)}
    config = config.model_copy(update=now)
    with ExitStack() as stack:
        moments = [stack.enter_context(open_source(source.folder, kind)) for kind in STATE[1:]] if saved else []
        small, log = _small(source, dtype), lambda text: None
        manager = CheckpointManager(config, folder, Solo(), None, log, small=small, shard_bytes=shard_bytes)
        step, counters = (saved.step, saved.counters) if saved else (0, _START)
        manager.save(step, _shards(source.format.shapes, [source, *moments]), counters)
