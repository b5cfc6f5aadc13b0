"""What settings must be to one another, with the nearest values that work; what is unusual.

A rule makes messages of a configuration, derived values filled in, and of the number of ranks, if known.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import isqrt, lcm
from operator import attrgetter

from megallama.config.describe import literal
from megallama.config.errors import counted
from megallama.config.schema import ROPE, BatchConfig, Config, ModelConfig, ParallelConfig

Rule = Callable[[Config, int | None], Iterator[str]]
AXES = ("tp", "cp", "dp", "pp")
LARGEST_TRIED = 1 << 20  # divisors of a number; a message about 10**18 heads needs no more
V_SCHEDULES = ("zb-v", "v-half", "dualpipe-v")  # stage r and its mirror image on one rank
USUAL = {  # far below or above which a setting is named, and what is usual
    "optimizer.lr": (1e-6, 1e-2, "1e-5 to 3e-3"),
    "optimizer.beta1": (0.5, 0.99, "0.9"),
    "optimizer.beta2": (0.8, 0.9999, "0.95 to 0.999"),
    "optimizer.eps": (1e-12, 1e-4, "1e-8 to 1e-5"),
    "optimizer.weight_decay": (0.0, 0.5, "0 to 0.1"),
    "optimizer.clip_grad": (0.05, 10.0, "1.0"),
    "model.init_std": (1e-3, 0.1, "0.006 to 0.02"),
}
MOST_BATCH_TOKENS = 1 << 26
_TOKENS = "batch.micro_batch_size x batch.seq_length"


def check(config: Config, ranks: int | None = None, *, need_data: bool = True) -> list[str]:
    """What cannot work together, in words; need_data=False leaves the sources out."""
    rules = RULES + (DATA_RULES if need_data else ())
    return [problem for rule in rules for problem in rule(config, ranks)]


def check_phases(config: Config, ranks: int | None, *, need_data: bool, tokens: int) -> list[str]:
    """`check` in every phase that lies ahead where so many tokens are read."""
    first, found = config.train.phase_after(tokens), list[str]()
    for number in range(first, max(1, len(config.train.phases))):
        problems = check(config.at(number), ranks, need_data=need_data)
        where = f"train.phases[{number}]: " if number > first else ""
        found += [where + problem for problem in problems if problem not in found]
    return found


def legal_tp(model: ModelConfig) -> list[int]:
    """The tensor-parallel sizes that the architecture can be cut into."""
    sizes, kv = _divisors(model.num_heads), model.num_kv_heads or model.num_heads
    return [t for t in sizes if model.ffn_hidden_size % t == 0 and (kv % t == 0 or t % kv == 0)]


def _architecture(config: Config, ranks: int | None) -> Iterator[str]:
    m = config.model
    kv = m.num_kv_heads or m.num_heads
    if m.num_heads % kv:
        use = _any(_divisors(m.num_heads))
        yield f"model.num_kv_heads={kv} does not divide model.num_heads={m.num_heads}; use {use}"
    if m.head_dim is None:
        use = f"use {_near(_divisors(m.hidden_size), m.num_heads)} heads, or set model.head_dim"
        yield f"model.num_heads={m.num_heads} does not divide model.hidden_size={m.hidden_size}; {use}"
    elif (d := m.head_dim) % 2:
        use = _any([n for n in (d - 1, d + 1) if n])
        yield f"model.head_dim={d} is odd, but rotary embeddings turn pairs of elements; use {use}"
    if m.vocab_size < 2:
        yield f"model.vocab_size={m.vocab_size} leaves nothing to predict; use at least 2"
    if (s := m.rope_scaling) is None:
        return
    for name in sorted({*type(s).model_fields} - {"factor", "kind", *ROPE[s.kind]}):
        if (value := getattr(s, name)) != type(s).model_fields[name].default:
            yield f'model.rope_scaling.{name}={value} is not read with kind="{s.kind}"; leave it out'
    if s.kind == "llama3" and s.low_freq_factor >= s.high_freq_factor:
        high = f"model.rope_scaling.high_freq_factor={s.high_freq_factor}"
        yield f"model.rope_scaling.low_freq_factor={s.low_freq_factor} is not below {high}; LLaMA 3.1 uses 1.0 and 4.0"
    if s.kind == "yarn" and s.beta_slow >= s.beta_fast:
        fast = f"model.rope_scaling.beta_fast={s.beta_fast}"
        yield f"model.rope_scaling.beta_slow={s.beta_slow} is not below {fast}; YaRN uses 1.0 and 32.0"
    if s.kind == "yarn" and m.rope_theta <= 1:
        yield f"model.rope_theta={m.rope_theta} is not above 1, as YaRN needs; LLaMA uses 10000.0 and more"


def _tensor_parallel(config: Config, ranks: int | None) -> Iterator[str]:
    m, b, tp = config.model, config.batch, config.parallel.tp
    kv, use = m.num_kv_heads or m.num_heads, f"use {_any(legal_tp(m))}"
    if kv % tp and tp % kv:
        verb = "does not divide" if tp < kv else "is not a multiple of"
        yield f"parallel.tp={tp} {verb} model.num_kv_heads={kv}; {use}"
    for key in ("num_heads", "ffn_hidden_size"):
        if (size := getattr(m, key)) % tp:
            yield f"parallel.tp={tp} does not divide model.{key}={size}; {use}"
    cp = config.parallel.cp
    tokens, cut_by = b.micro_batch_size * b.seq_length // cp, f" / parallel.cp={cp}" * (cp > 1)
    if config.parallel.sequence_parallel and tokens % tp:
        unit = lcm(tp * cp, b.micro_batch_size) // b.micro_batch_size
        near = _multiples(b.seq_length, unit if cp == 1 else lcm(unit, 2 * cp))
        cut = f"batch.micro_batch_size={b.micro_batch_size} x batch.seq_length={b.seq_length}{cut_by}"
        instead = f"use batch.seq_length={near}, or parallel.sequence_parallel=false"
        words = f"{cut} = {counted(tokens, 'token')}, which sequence parallelism cuts"
        yield f"parallel.tp={tp} does not divide {words}; {instead}"
    rows, chunks = tokens // (tp if config.parallel.sequence_parallel else 1), config.overlap.tensor_parallel_chunks
    if tp > 1 and rows % chunks:
        cut = _TOKENS + " / parallel.cp" * (cp > 1) + " / parallel.tp" * (rows < tokens)
        words = f"the {counted(rows, 'row')} of a micro-batch on a rank ({cut})"
        yield f"overlap.tensor_parallel_chunks={chunks} does not divide {words}; use {_near(_divisors(rows), chunks)}"


def _context_parallel(config: Config, ranks: int | None) -> Iterator[str]:
    p, s = config.parallel, config.batch.seq_length
    if p.cp > 1 and s % (2 * p.cp):
        chunks, use = f"cuts a sequence into 2 x {p.cp} = {2 * p.cp} chunks", _multiples(s, 2 * p.cp)
        yield f"parallel.cp={p.cp} {chunks}, of which batch.seq_length={s} is no multiple; use batch.seq_length={use}"
    kv = max(1, (config.model.num_kv_heads or config.model.num_heads) // p.tp)
    if kv % (pieces := config.overlap.context_parallel_heads):
        words = f"the {counted(kv, 'key/value head')} of a rank (model.num_kv_heads / parallel.tp)"
        yield f"overlap.context_parallel_heads={pieces} does not divide {words}; use {_near(_divisors(kv), pieces)}"
    if p.cp_exchange == "heads" and (local := config.model.num_heads // p.tp) % p.cp:
        words = f"the {counted(local, 'head')} of a rank (model.num_heads / parallel.tp)"
        use = f'use parallel.cp={_near(_divisors(local), p.cp)}, or parallel.cp_exchange="gather"'
        yield f'parallel.cp={p.cp} does not divide {words}, which parallel.cp_exchange="heads" deals out; {use}'


def _pipeline(config: Config, ranks: int | None) -> Iterator[str]:
    p, layers = config.parallel, config.model.num_layers
    stages, schedule, chunks = p.pp * p.chunks, f'parallel.schedule="{p.schedule}"', f"parallel.chunks={p.chunks}"
    if p.schedule in V_SCHEDULES and (p.chunks != 2 or p.pp == 1):
        use = f"use parallel.pp={max(2, p.pp)} and parallel.chunks=2"
        yield f"{schedule} has two chunks on each of several ranks, but parallel.pp={p.pp} and {chunks}; {use}"
    elif p.chunks > 1 and p.pp == 1:
        yield f"{chunks} needs more than parallel.pp=1; use parallel.chunks=1 or parallel.pp=2"
    if p.chunks > 1 and p.schedule in ("zb-h1", "zb-h2"):
        use = 'use parallel.chunks=1 or parallel.schedule="1f1b"'
        yield f"{schedule} has one chunk per rank, but {chunks}; {use}"
    if p.schedule == "csv" and p.schedule_file is None:
        yield 'parallel.schedule="csv" has no parallel.schedule_file; write parallel.schedule_file=FILE.csv'
    elif p.schedule != "csv" and p.schedule_file is not None:
        instead = 'write parallel.schedule="csv", or leave the file out'
        yield f"parallel.schedule_file={literal(p.schedule_file)} is not read with {schedule}; {instead}"
    if p.stage_layers is not None:
        counts, numbers = list(p.stage_layers), "numbers that add up to it"
        have = f"adds up to {sum(counts)}, but model.num_layers={layers}"
        if len(counts) != stages:
            numbers, product = counted(stages, "number"), f"parallel.pp={p.pp} x parallel.chunks={p.chunks}"
            have = f"has {counted(len(counts), 'number')}, but {product} = {counted(stages, 'stage')}"
        if len(counts) != stages or sum(counts) != layers:
            even = literal([layers * (s + 1) // stages - layers * s // stages for s in range(stages)])
            yield f"parallel.stage_layers={counts} {have}; write {numbers}, for example {even}"
    axes = p.rank_order.split("-")
    if sorted(axes) != sorted(AXES):
        known = list(dict.fromkeys(a for a in axes if a in AXES))
        whole = "-".join(known + [a for a in AXES if a not in known])
        yield f'parallel.rank_order="{p.rank_order}" must name each of tp, cp, dp, pp once; for example "{whole}"'


def _batch(config: Config, ranks: int | None) -> Iterator[str]:
    b, p, uneven = config.batch, config.parallel, config.batch.uneven and ranks is not None
    unit, words = b.micro_batch_size, f"batch.micro_batch_size={b.micro_batch_size}"
    if ranks is not None:
        (dp, rest), cp = divmod(ranks, size := p.unit), f" x parallel.cp={p.cp}" * (p.cp > 1)
        if rest:
            use = f"{_multiples(ranks, size)} ranks, or sizes whose product is {_near(_divisors(ranks), size)}"
            use += f"; torchrun --nproc-per-node {size} -m megallama.pretrain ... starts {size}" * (ranks == 1)
            yield f"ranks={ranks} cannot be cut into parallel.tp={p.tp} x parallel.pp={p.pp}{cp} = {size}; use {use}"
            return  # dp is not known
        if not uneven:
            unit, words = unit * dp, f"{words} x dp={dp} (ranks / ({_unit(p)})) = {unit * dp}"
    if p.schedule == "1f1b" and p.chunks > 1 and not uneven:
        unit, words = unit * p.pp, f"{words} times parallel.pp={p.pp} (needed to interleave parallel.chunks={p.chunks})"
    for key in ("global_batch_size", "ramp_start", "ramp_increment"):
        if (value := getattr(b, key) or 0) % unit:
            fits = not b.uneven and not [*_batch(config.changed(batch={"uneven": True}), ranks)]
            way_out = ", or batch.uneven=true" if fits else ""
            yield f"batch.{key}={value} is not a multiple of {words}; use {_multiples(value, unit)}{way_out}"
    if uneven and all(size % unit == 0 for size in b.sizes):
        yield from _uneven(b, p, dp)
    least = unit * 2 * p.pp
    if p.schedule == "dualpipe-v" and (size := b.sizes[0]) < least and ranks is not None and not uneven:
        key = "global_batch_size" if b.ramp_start is None else "ramp_start"
        need = f'{words} times 2 x parallel.pp={p.pp} = {least}, the least for parallel.schedule="dualpipe-v"'
        yield f'batch.{key}={size} is below {need}; use {least}, or parallel.schedule="zb-v"'


def _uneven(b: BatchConfig, p: ParallelConfig, dp: int) -> Iterator[str]:
    """The first size that deals some replicas none, or what their schedule cannot run."""
    micro, turns = b.micro_batch_size, p.pp if p.schedule == "1f1b" and p.chunks > 1 else 1
    needed, name = (2 * p.pp, f' for parallel.schedule="{p.schedule}"') if p.schedule == "dualpipe-v" else (1, "")
    for size in b.sizes:
        least, rest = divmod(size // micro, dp)
        if least < needed:
            problem = f"each needs at least {needed}{name}; use {needed * micro * dp} or more, or fewer ranks"
        elif turns > 1 and (rest or least % turns):
            use = f"{_multiples(size, micro * dp * turns)}, or parallel.chunks=1"
            problem = f"each needs a multiple of parallel.pp={p.pp} to interleave parallel.chunks={p.chunks}; use {use}"
        elif p.schedule == "csv" and rest:
            use = f"{_multiples(size, micro * dp)}, or another schedule"
            problem = f"parallel.schedule_file has one number for all; use {use}"
        else:
            continue
        known = {b.ramp_start: "batch.ramp_start=", b.global_batch_size: "batch.global_batch_size="}
        what = known.get(size, f"batch.ramp_increment={b.ramp_increment} makes a batch of ")
        counts = f"{least + 1} or " * (rest > 0) + counted(least, "micro-batch")
        deals = f"{counts} of batch.micro_batch_size={micro} to each of dp={dp} replicas"
        yield f"{what}{size}, which deals {deals}, but {problem}"
        return


def _ramp(config: Config, ranks: int | None) -> Iterator[str]:
    b = config.batch
    ramp = {k: getattr(b, k) for k in ("ramp_start", "ramp_increment", "ramp_samples")}
    have = [f"batch.{k}={v}" for k, v in ramp.items() if v is not None]
    lack = [f"batch.{k}" for k, v in ramp.items() if v is None]
    if have and lack:
        yield f"{' and '.join(have)} without {' and '.join(lack)}; set all three or none"
    if b.ramp_start is None:
        return
    start, size, rise = f"batch.ramp_start={b.ramp_start}", b.global_batch_size, b.global_batch_size - b.ramp_start
    if config.parallel.schedule == "csv":
        fixed = 'which is fixed with parallel.schedule="csv"; leave the ramp-up out, or use another schedule'
        yield f"{start} changes the number of micro-batches, {fixed}"
    if rise < 0:
        yield f"{start} is above batch.global_batch_size={size}; use at most {size}"
    elif b.ramp_increment is not None and rise % b.ramp_increment:
        words = f"batch.global_batch_size={size} - {start} = {rise}; use {_near(_divisors(rise), b.ramp_increment)}"
        yield f"batch.ramp_increment={b.ramp_increment} does not divide {words}"


def _lr_schedule(config: Config, ranks: int | None) -> Iterator[str]:
    s = config.lr_schedule
    end = s.decay_steps or config.train.steps
    first, until = s.decay_from_step, s.decay_until_step or config.train.steps
    if first is None and s.decay_until_step is not None:
        yield f"lr_schedule.decay_until_step={until} is not read without lr_schedule.decay_from_step; write it too"
    elif first is not None and until <= first:
        yield f"lr_schedule.decay_from_step={first} is not below lr_schedule.decay_until_step={until} (or train.steps)"
    if s.kind == "constant":
        return
    warmup, last = f"lr_schedule.warmup_steps={s.warmup_steps}", f"lr_schedule.decay_steps={end}"
    if s.warmup_steps >= end:
        yield f'{warmup} is not below {last}; use at most {end - 1}, more steps, or lr_schedule.kind="constant"'
    elif s.kind == "wsd" and (decay := s.wsd_decay_steps or 1) + s.warmup_steps > end:
        both = f"{warmup} + lr_schedule.wsd_decay_steps={decay} = {s.warmup_steps + decay}"
        yield f"{both} is above {last}; use lr_schedule.wsd_decay_steps={end - s.warmup_steps} or less"


def _fp8(config: Config, ranks: int | None) -> Iterator[str]:
    m, b, tp, cp, p = config.model, config.batch, config.parallel.tp, config.parallel.cp, config.precision
    if p.fp8 == "none":
        return
    start, instead = f'precision.fp8="{p.fp8}"', 'or precision.fp8="none"'
    if p.dtype != "bf16":
        yield f'{start} rounds bf16 values, but precision.dtype="{p.dtype}"; use precision.dtype="bf16", {instead}'
    if config.run.device == "cpu":
        yield f'{start} needs a GPU of compute capability 8.9 or above, but run.device="cpu"; use "cuda", {instead}'
    if tp > 1 and (chunks := config.overlap.tensor_parallel_chunks) > 1:
        yield f"{start} scales whole products, but overlap.tensor_parallel_chunks={chunks} cuts them; use 1, {instead}"
    n, k, d = m.num_heads // tp, max(1, (m.num_kv_heads or m.num_heads) // tp), m.head_dim or 1
    tokens = _TOKENS + " / parallel.cp" * (cp > 1)
    sizes = {
        tokens: b.micro_batch_size * b.seq_length // cp,
        "model.hidden_size": m.hidden_size,
        "model.ffn_hidden_size / parallel.tp": m.ffn_hidden_size // tp,
        "model.num_heads x model.head_dim / parallel.tp": n * d,
        "the width of queries, keys and values / parallel.tp": (n + 2 * k) * d,
    }
    if odd := [f"{what} = {size}" for what, size in sizes.items() if size % 16]:
        yield f"{start} multiplies only sizes that are multiples of 16, but {', '.join(odd)}; use those, {instead}"


def _running(config: Config, ranks: int | None) -> Iterator[str]:
    c = config.checkpoint
    for key, begins in (("weights_from", "begins at step 0"), ("continue_from", "begins a run")):
        if (value := getattr(c, key)) is not None and c.resume in ("must", "previous"):
            use = 'remove one, or use checkpoint.resume="auto" (go on if there is a checkpoint, else start so)'
            setting = f"checkpoint.{key}={literal(value)} {begins}"
            yield f'{setting}, but checkpoint.resume="{c.resume}" wants to go on; {use}'
    if c.weights_from is not None and c.continue_from is not None:
        yield "checkpoint.weights_from and checkpoint.continue_from are two beginnings of one run; leave one out"
    if c.continue_reset and c.continue_from is None:
        reset = f"checkpoint.continue_reset={literal(c.continue_reset)}"
        yield f"{reset} begins nothing anew without checkpoint.continue_from=STEP; write that, or leave it out"
    kept = f"checkpoint.keep_every={c.keep_every}"
    if c.keep_every and not c.interval:
        use = f"use checkpoint.interval={c.keep_every} or a divisor of it"
        yield f"{kept} keeps nothing while checkpoint.interval=0 saves only at the end; {use}"
    elif c.keep_every and c.keep_every % c.interval:
        use = _multiples(c.keep_every, c.interval)
        yield f"{kept} is not a multiple of checkpoint.interval={c.interval}; use {use}"
    if (steps := config.log.trace_steps) is not None and steps[0] > steps[1]:
        yield f"log.trace_steps={literal(steps)} ends before it begins; write log.trace_steps={literal(sorted(steps))}"
    if (least := config.run.min_replicas) and not config.run.max_replacements:
        use = "write run.max_replacements=20, say, or leave it out"
        yield f"run.min_replicas={least} does nothing without replacements in place; {use}"
    if ranks and 0 < (dp := ranks // config.parallel.unit) < least:
        use = f"write run.min_replicas={dp - 1} to go on without one of them" if dp > 1 else "leave it out"
        replicas = f"dp={dp} replicas (ranks / ({_unit(config.parallel)}))"
        yield f"run.min_replicas={least}, but {counted(ranks, 'rank')} are {replicas}; {use}"
    step, data = (f"timeout_seconds={section.timeout_seconds:g}" for section in (config.run, config.data))
    if config.run.timeout_seconds < config.data.timeout_seconds:
        waits = "ends a run whose other ranks still wait for a batch, which may take"
        yield f"run.{step} {waits} data.{data}; use run.{data} or more, or data.{step}"


def _data(config: Config, ranks: int | None) -> Iterator[str]:
    d = config.data
    if d.synthetic and d.train:
        yield "data.synthetic=true leaves data.train unread; write data.synthetic=false, or leave data.train out"
    for key in ("mixture_schedule", "document_mask"):
        if d.synthetic and (value := getattr(d, key)):
            yield f"data.synthetic=true leaves data.{key}={literal(value)} unread; leave one of them out"
    if not d.train and not d.synthetic:
        yield "data.train is empty; write data.train=PREFIX (of PREFIX.bin and PREFIX.idx), or data.synthetic=true"
    if (every := config.eval.interval) and not d.valid and not d.synthetic:
        yield f"eval.interval={every} but data.valid is empty; write data.valid=PREFIX, or eval.interval=0"
    if (tasks := config.eval.tasks) and d.tokenizer is None:
        yield f"eval.tasks={literal(tasks)} are texts, and data.tokenizer is none; write data.tokenizer=FILE"
    if (every := config.eval.tasks_interval) and not tasks:
        yield f'eval.tasks_interval={every} but eval.tasks is empty; write eval.tasks=["FILE.jsonl"], or leave it out'
    for key, sources in (("train", d.train), ("valid", d.valid), ("test", d.test)):
        seen: set[str] = set()
        for i, s in enumerate(sources):
            where, (first, last) = f"data.{key}[{i}]", s.documents
            if s.label in seen:
                other = literal({"path": s.path, "name": f"{s.label}-2"})
                yield f"{where} is the second source called {literal(s.label)}; give it another name: {other}"
            seen.add(s.label)
            if not 0 <= first < last <= 1:
                yield f"{where}.documents={literal(s.documents)} is no part of 0 to 1; write for example [0.0, 0.98]"
            if key != "train" and (s.weight != 1 or s.max_epochs is not None):
                yield f"{where} has a weight or max_epochs, but is read alone and once; leave them out"
    if d.on_exhausted == "stop" and all(s.max_epochs is None for s in d.train):
        yield 'data.on_exhausted="stop" without any max_epochs; write train = [{path = "...", max_epochs = 2.0}]'


def _mixture(config: Config, ranks: int | None) -> Iterator[str]:
    d = config.data
    weights = {s.label: s.weight for s in d.train}
    ever, last = {s.label for s in d.train if s.weight}, 1
    if d.train and not ever:
        yield "data.train has only weights of 0; write a weight above 0 for at least one source"
    for i, change in enumerate(d.mixture_schedule):
        where = f"data.mixture_schedule[{i}]"
        if change.step <= last:
            then = "2, as step 1 has the weights of data.train" if not i else f"{last + 1}, later than the one before"
            yield f"{where}.step={change.step} is too early; use at least {then}"
        last = max(last, change.step)
        yield from _unknown(where, change.weights, [s.label for s in d.train])
        weights |= change.weights
        ever |= {name for name, weight in weights.items() if weight}
        if not any(weights.values()):
            yield f"{where} leaves no source a weight above 0; give one to at least one source"
    ever |= {name for phase in config.train.phases for name, weight in phase.weights.items() if weight}
    for name in [s.label for s in d.train if ever and s.label not in ever]:
        never = f"data.train gives {literal(name)} the weight 0, and no data.mixture_schedule raises it"
        later = literal([{"step": 1000, "weights": {name: 1.0}}])
        yield f"{never}; leave it out, or write data.mixture_schedule={later}"


def _phases(config: Config, ranks: int | None) -> Iterator[str]:
    train, ends, before = config.train, [0, *config.train.phase_ends()], 0
    for key in ("train.tokens", "batch.ramp_start", "data.mixture_schedule") if train.phases else ():
        if value := attrgetter(key)(config):
            use = "leave it out, and write until_tokens, global_batch_size and weights in the phases"
            yield f"{key}={literal(value)} and train.phases exclude one another; {use}"
    if train.phases and train.on_spike == "rollback":
        yield 'train.on_spike="rollback" and train.phases exclude one another; use train.on_spike="skip"'
    for i, phase in enumerate(train.phases):
        where, until = f"train.phases[{i}]", f"train.phases[{i}].until_tokens={phase.until_tokens}"
        if phase.until_tokens <= before:
            yield f"{until} is not above {before}, where the phase before it ends"
        elif ends[i + 1] == ends[i]:
            least = before + train.phases[i - 1].step_tokens
            yield f"{until} lies in the last step of the phase before it; use at least {least}"
        before = max(before, phase.until_tokens)
        yield from _unknown(f"{where}.weights", phase.weights, [s.label for s in config.data.train])


def _unknown(where: str, weights: Iterable[str], known: Sequence[str]) -> Iterator[str]:
    for name in sorted({*weights} - {*known}) if known else ():
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {literal(near[0])}?" if near else f"its sources are {_any(map(literal, known))}"
        yield f"{where} gives a weight to {literal(name)}, which data.train does not have; {hint}"


RULES: tuple[Rule, ...] = (
    *(_architecture, _tensor_parallel, _context_parallel, _pipeline, _batch, _ramp, _lr_schedule, _fp8, _running),
    _phases,
)  # fmt: skip
DATA_RULES: tuple[Rule, ...] = (_data, _mixture)


def unusual(config: Config) -> Iterator[str]:
    """A line for each such setting, with the usual range."""
    for key, (low, high, usual) in USUAL.items():
        if not low <= (value := attrgetter(key)(config)) <= high:
            yield f"{key}={value:g} is far from what LLaMA-like models were trained with, usually {usual}"
    warmup, end = config.lr_schedule.warmup_steps, config.lr_schedule.decay_steps or config.train.steps
    if warmup > end / 2:
        yield f"lr_schedule.warmup_steps={warmup} is most of {end} steps; usually it is 0.1 to 10 %"
    if (tokens := config.batch.global_batch_size * config.batch.seq_length) > MOST_BATCH_TOKENS:
        yield f"batch.global_batch_size x batch.seq_length is {tokens:,} tokens; usually a step takes 0.5 to 16 million"


def _unit(p: ParallelConfig) -> str:
    return "tp x pp" + " x cp" * (p.cp > 1)


def _divisors(n: int) -> list[int]:
    low = [i for i in range(1, min(isqrt(n), LARGEST_TRIED) + 1) if n % i == 0]
    return sorted({*low, *(n // i for i in low)})


def _any(values: Iterable[object]) -> str:
    """1, 2 or 4"""
    words = [str(v) for v in values]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _near(values: list[int], at: int) -> str:
    """The nearest of the sorted `values` below and above `at`."""
    return _any([*[v for v in values if v < at][-1:], *[v for v in values if v > at][:1]])


def _multiples(value: int, unit: int) -> str:
    """The nearest multiples of `unit`, at least one of them, around `value`."""
    below = value // unit * unit
    return _any([v for v in (below, below + unit) if v])
