"""From the configuration to open data: training sources mixed by weight, validation, test."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from megallama.config.describe import literal
from megallama.config.errors import DataError, counted
from megallama.config.schema import BatchConfig, Config, DataConfig, SourceConfig
from megallama.data.indexed import IndexedDataset
from megallama.data.mixture import Mixture, Phase, phases_of
from megallama.data.samples import Samples, Source, Synthetic
from megallama.data.tokenizer import Tokenizer, load_tokenizer, sha256_of

ANEW = "begin another run from these weights with checkpoint.weights_from and a new run.folder"
LOOK = 16  # documents looked at where nothing is recorded
SpecialIds = dict[str, int | None]  # "bos_id", "eos_id" of documents, if any


class TrainDataset:
    """The training sources, in their mixture's order, and what was consumed of them."""

    def __init__(self, config: DataConfig, sources: Sequence[Source], batch: BatchConfig) -> None:
        self.sources, self._config, self._batch = sources, config, batch
        self._identities = {source.name: source.identity() for source in sources}
        self._order = {"batch.seq_length": sources[0].seq_length, "train.seed": sources[0].seed}
        self._done = self._consumed = 0
        self.mixture = Mixture([source.name for source in sources], phases_of(config, batch.samples_after))

    def read(self, ids: Sequence[int]) -> Samples:
        located, indices = self.mixture.locate(np.asarray(ids, np.int64))
        parts = [self.sources[number].read(indices[located == number]) for number in sorted(set(located.tolist()))]
        row = np.argsort(np.argsort(located, kind="stable"))  # of each sample in the parts
        starts = [part.starts for part in parts if part.starts is not None]
        tokens = np.concatenate([part.tokens for part in parts])
        return Samples(tokens[row], np.concatenate(starts)[row] if starts else None)

    def places(self, ids: Sequence[int]) -> Iterator[tuple[Source, int, int]]:
        """Of each sample: source, index there, and where it begins in the stream [tokens]."""
        for number, index in zip(*self.mixture.locate(np.asarray(ids, np.int64)).tolist(), strict=True):
            source = self.sources[number]
            yield source, index, source.offset + int(source.sequences(np.array([index]))[0]) * source.seq_length

    def documents(self, ids: Sequence[int]) -> list[str]:
        """Source, first and last document of each of these samples."""
        ends = ((source, (at, at + source.seq_length)) for source, _, at in self.places(ids))
        return [f"{s.name} {'-'.join(str(s.dataset.document_at(i)) for i in both)}" for s, both in ends]

    def consumption(self, samples: int) -> dict[str, dict[str, float]]:
        """What the first `samples` took: source name -> {"samples", "tokens", "epochs"}."""
        return {
            source.name: {"samples": n, "tokens": n * source.seq_length, "epochs": n / source.num_sequences}
            for source, n in zip(self.sources, self.mixture.counts(samples), strict=True)
        }

    def last_step(self, steps: int) -> tuple[int, str]:
        """(the last of `steps` steps in which no source passes its max_epochs, why it is the last or "").

        Raises: DataError if that is not all of them and data.on_exhausted is "error", or it is none.
        """
        ends = [
            (past, config.label, config.max_epochs)
            for config, source in zip(self._config.train, self.sources, strict=True)
            if (past := self.mixture.step_past(config, source.num_sequences, steps, self._samples_after))
        ]
        if not ends:
            return steps, ""
        past, name, most = min(ends, key=lambda end: end[0])
        epochs, total = (self.consumption(self._samples_after(n))[name]["epochs"] for n in (past, steps))
        taken = f"{literal(name)} to {counted(f'{epochs:.4g}', 'epoch')}"
        why = f"step {past} would take source {taken}, over max_epochs={most:g}"
        if self._config.on_exhausted == "error" or past == 1:
            fewer = f'train.steps={past - 1}, data.on_exhausted="stop", ' if past > 1 else ""
            use = f"use {fewer}a larger max_epochs, or a smaller weight (from some step on: data.mixture_schedule)"
            raise DataError(f"{why} (all of train.steps={steps}: {total:.4g}); {use}")
        return past - 1, why

    def state(self, samples: int) -> dict[str, Any]:
        """What a checkpoint after `samples` samples keeps, for `resume`."""
        used, past = self.consumption(samples), [p for p in self.mixture.phases if p.sample < max(samples, 1)]
        return {
            "sources": [
                {"name": s.name, "path": s.dataset.prefix, **used[s.name], "identity": self._identities[s.name]}
                for s in self.sources
            ],
            "mixture": [{k: v for k, v in asdict(p).items() if v is not None} for p in past],
            "order": self._order,
        }

    def resume(self, saved: Mapping[str, Any], step: int, samples: int, until: int | None = None) -> None:
        """Go on from a checkpoint made after `step` steps and `samples` samples, with sample `until` or the next.

        Raises: DataError if files, seed, sample length or past weights are not those of the checkpoint.
        """
        if not saved.get("mixture"):
            return  # made by an older version, or with synthetic data
        for key, now in self._order.items():
            if (was := saved["order"][key]) != now:
                why = f"{samples} of which were used with {key}={was}; write {key}={was}, or {ANEW}"
                raise DataError(f"{key}={now} would change the order of the samples, {why}")
        old_sources = [old for old in saved["sources"] if old["samples"]]
        for old in old_sources:  # what was used is still there, and the same
            name, was = old["name"], old["identity"]
            source = next((source for source in self.sources if source.name == name), None)
            if source is None:
                change = [{"step": step + 1, "weights": {name: 0.0}}]
                raise DataError(
                    f"data.train has no source {literal(name)} ({old['path']}), of which this run used "
                    f"{old['samples']} samples; keep it, and take no more of it with "
                    f"data.mixture_schedule={literal(change)}"
                )
            items = self._identities[name].items()
            if differing := [f"{key} {was.get(key)}, now {now}" for key, now in items if was.get(key) != now]:
                raise DataError(
                    f"data.train source {literal(name)}: {source.dataset.prefix}.bin/.idx is not what this run was "
                    f"trained on ({'; '.join(differing)}); put the files and their documents range back, or {ANEW}"
                )
        past = [Phase(**phase) for phase in saved["mixture"]]
        self._check_weights(past, step)
        self._done, self._consumed = step, samples if until is None else until
        later = [p for p in phases_of(self._config, self._samples_after) if p.step > step]
        self.mixture = Mixture(self.mixture.names, [*past, *later])
        used = self.consumption(samples)
        for old in old_sources:
            if (gives := used[old["name"]]["samples"]) != old["samples"]:
                raise DataError(
                    f"the checkpoint of step {step} says that source {literal(old['name'])} gave {old['samples']} "
                    f"samples, its weights give {gives}: another version of this program wrote it; {ANEW}"
                )

    def take_over(self, saved: Mapping[str, Any], step: int, samples: int, why: str = "") -> dict[str, str]:
        """Go on from another run's checkpoint, each source after the tokens it gave; which do not, and why.

        With another sample length tokens are counted, not places. why: all begin anew, because of this.
        """
        with suppress(DataError):
            if saved.get("mixture") and not why:
                self.resume(saved, step, samples)
                return {}
        old, seed = {o["name"]: o for o in saved.get("sources", ())}, saved.get("order", {}).get("train.seed")
        why = why or (f"train.seed was {seed}" if old and seed != self._order["train.seed"] else "")
        anew = {name: why or "the other run did not read it" for name in self._identities if why or name not in old}
        for name in self._identities.keys() - anew.keys():
            if old[name]["identity"] != self._identities[name]:
                anew[name] = "its files, or which of their documents are read, are others"
        starts = {s.name: -(-old[s.name]["tokens"] // s.seq_length) for s in self.sources if s.name not in anew}
        self._done, self._consumed = step, samples
        self.mixture = Mixture(self.mixture.names, self._phases(step + 1, samples, starts))
        return anew

    def _phases(self, first: int, sample: int, starts: Mapping[str, int] | None) -> list[Phase]:
        """Those of the configuration from step `first` on."""
        phases = phases_of(self._config, self._samples_after)
        begin = [phase for phase in phases if phase.step <= first][-1]
        return [Phase(first, sample, begin.weights, starts), *(p for p in phases if p.step > first)]

    def _samples_after(self, steps: int) -> int:
        if steps >= self._done:
            return self._batch.samples_after(steps, self._done, self._consumed)
        return min(self._batch.samples_after(steps), self._consumed)

    def _check_weights(self, past: Sequence[Phase], step: int) -> None:
        """That the configuration gives past steps the weights they were made with."""
        begun = past[0].step
        present = [p for p in self._phases(begun, past[0].sample, None) if p.step <= max(step, begun)]
        if [(p.step, _used(p)) for p in present] == [(p.step, _used(p)) for p in past]:
            return
        new = [] if _used(present[-1]) == _used(past[-1]) else [Phase(step + 1, 0, present[-1].weights)]
        phases = [*past, *new, *(p for p in self.mixture.phases if p.step > step)]
        first, *then = ({name: p.weights.get(name, 0.0) for name in self.mixture.names} for p in phases)
        changes = [{"step": p.step, "weights": weights} for p, weights in zip(phases[1:], then, strict=True)]
        were, now = (", ".join(f"{literal(_used(p))} from step {p.step}" for p in made) for made in (past, present))
        raise DataError(
            "the weights of data.train and data.mixture_schedule are not those of "
            f"the {counted(step, 'step')} that were made: they were {were}, now they say {now}. What is past cannot "
            f"change; keep in data.train the weights {literal(first)} and write "
            f"data.mixture_schedule={literal(changes)}"
        )


def _used(phase: Phase) -> dict[str, float]:
    return {name: weight for name, weight in phase.weights.items() if weight}


@dataclass(frozen=True)
class Data:
    """A run's data, open and checked; validation and test sources are in file order."""

    train: TrainDataset | Synthetic
    valid: Sequence[Source]
    test: Sequence[Source]
    tokenizer: Tokenizer | None
    special_ids: SpecialIds
    notes: Sequence[str]  # why blocks of a source are not compared with checksums


def open_sources(config: Config) -> Data:
    """Open what `data` names. Raises: DataError for what is known to be wrong beforehand."""
    data, vocab_size = config.data, config.model.vocab_size
    tokenizer = load_tokenizer(data.tokenizer, eos_token=data.eos_token) if data.tokenizer else None
    if tokenizer and (most := tokenizer.vocab_size) > vocab_size:  # a larger vocabulary is padded
        but = f"but model.vocab_size={vocab_size}; write model.vocab_size={most} or more"
        raise DataError(f"data.tokenizer={tokenizer.path} has {most} ids {but}")
    paths = dict.fromkeys(source.path for source in (*data.train, *data.valid, *data.test))
    opened = {path: _open(path, config, tokenizer) for path in paths}
    special_ids = _common_ids([*opened.values()], tokenizer, data.eos_token)

    seq_length, seed = config.batch.seq_length, config.train.seed
    make = partial(Source, seq_length=seq_length, seed=seed, mark_documents=data.document_mask)

    def source(of: SourceConfig, *, shuffle: bool = False) -> Source:
        corpus = opened[of.path]
        num_ids = corpus.metadata.get("vocab_size", vocab_size)
        return make(corpus, name=of.label, shuffle=shuffle, documents=of.documents, num_ids=num_ids)

    valid, test = ([source(each) for each in held] for held in (data.valid, data.test))
    train: TrainDataset | Synthetic
    if data.synthetic:
        train = Synthetic(vocab_size, seq_length, seed)
    elif data.train:
        train = TrainDataset(data, [source(each, shuffle=True) for each in data.train], config.batch)
    else:
        write = 'write data.train=["path/prefix"] (made with megallama prepare) or data.synthetic=true'
        raise DataError(f"data.train is empty; {write}")
    notes = [dataset.unchecked for dataset in opened.values() if dataset.unchecked]
    return Data(train, valid, test, tokenizer, special_ids, notes)


def _open(path: str, config: Config, tokenizer: Tokenizer | None) -> IndexedDataset:
    dataset, vocab_size = IndexedDataset(path), config.model.vocab_size
    metadata = dataset.metadata
    if config.data.checksums:
        dataset.check_blocks()
    largest = max(dataset.largest_token(), int(metadata.get("vocab_size", 0)) - 1)
    if largest >= vocab_size:
        raise DataError(
            f"{dataset.prefix} was made with a vocabulary of at least {largest + 1} ids but model.vocab_size="
            f"{vocab_size}; write model.vocab_size={metadata.get('vocab_size', largest + 1)} (the size of its "
            "tokenizer) or more, or preprocess the text again"
        )
    made_with = metadata.get("tokenizer_sha256")
    if tokenizer and made_with and made_with != sha256_of(tokenizer.path):
        raise DataError(
            f"{dataset.prefix} was made with another tokenizer ({metadata.get('tokenizer')}, sha256 {made_with[:12]}"
            f"...) than data.tokenizer={tokenizer.path}; name that one, or preprocess the text again"
        )
    return dataset


def _ids_of(dataset: IndexedDataset, tokenizer: Tokenizer | None) -> SpecialIds:
    """Those recorded, or a control token that begins (ends) all of the first documents."""
    metadata = dataset.metadata
    if "eos_id" in metadata:
        return {"bos_id": metadata.get("bos_id"), "eos_id": metadata["eos_id"]}
    if tokenizer is None:
        return {}
    starts = dataset.starts(0, min(LOOK, dataset.num_documents)).tolist()
    spans = [(a, b - 1) for a, b in pairwise(starts) if a < b]
    seen = [{int(dataset.read(span[end], 1)[0]) for span in spans} for end in (0, 1)]
    bos, eos = (ids.pop() if len(ids) == 1 and ids <= {*tokenizer.control_ids} else None for ids in seen)
    return {"bos_id": bos} | ({} if eos is None else {"eos_id": eos})


def _common_ids(datasets: Sequence[IndexedDataset], tokenizer: Tokenizer | None, eos_token: str | None) -> SpecialIds:
    """Those of all corpora; an unknown end is the tokenizer's. Raises: DataError."""
    common: SpecialIds = {"eos_id": tokenizer.eos_id if tokenizer else None}
    for kind, verb in (("eos_id", "end"), ("bos_id", "begin")):
        seen: dict[int | None, str] = {}  # id -> the first corpus with it
        for dataset in datasets:
            if kind in (ids := _ids_of(dataset, tokenizer)):
                seen.setdefault(ids[kind], dataset.prefix)
        names = {i: "no token of their own" if i is None else f"id {i}" for i in seen}
        if len(seen) > 1:
            values = " and ".join(f"those of {prefix} with {names[i]}" for i, prefix in seen.items())
            again = "preprocess the text again with the same --eos-token and --bos"
            raise DataError(f"documents {verb} differently: {values}; {again}")
        if seen and kind == "eos_id" and eos_token and tokenizer and tokenizer.eos_id not in seen:
            raise DataError(
                f"data.eos_token={eos_token!r} is id {tokenizer.eos_id}, but documents of {[*seen.values()][0]} end "
                f"with {[*names.values()][0]}; leave it out, or preprocess the text again with --eos-token"
            )
        common |= dict.fromkeys([kind] if seen else [], next(iter(seen), None))
    return common
