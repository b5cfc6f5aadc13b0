"""Which parameters a rank holds: parts of the whole model, and places in flat buffers.

    local tensor     parts                                  split over tp
    embed_tokens     embed_tokens                           rows (vocabulary, padded to a multiple of tp)
    input_norm       input_layernorm                        replicated
    qkv_proj         q_proj, k_proj, v_proj                 rows (heads; k and v replicated if tp > kv heads)
    o_proj           o_proj                                 columns
    post_attention_norm  post_attention_layernorm           replicated
    gate_up_proj     gate_proj, up_proj                     rows
    down_proj        down_proj                              columns
    norm             norm                                   replicated
    lm_head          lm_head                                rows (vocabulary)

The parameters of one stage lie in one flat buffer, in the order in which the backward pass finishes them, and so do
their gradients.  It is cut into *buckets*: what one reduce-scatter or all-gather moves.  Of the dp_cp ranks with the
same weights, rank r owns the r-th equal range of each, its *shard*: there it holds master weights and AdamW moments
(ZeRO-1, Rajbhandari et al. 2020).  A bucket holds only decayed matrices, norm weights, or the tied embedding.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod, sqrt
from typing import Literal

from megallama.config.schema import ModelConfig
from megallama.plan.box import Box, boxes_of_range

ALIGN = 128  # elements; parameters start at multiples, so rows are aligned for vector loads
SumOver = Literal["none", "tp", "kv"]


@dataclass(frozen=True)
class Part:
    """Rows ``row .. row + box.shape[0]`` of a local tensor are `box` of the global tensor ``box.key``."""

    box: Box
    row: int = 0
    sum_over: SumOver = "none"  # the group over which this part's gradient is summed besides dp
    owner: bool = True  # False on all but one with a copy: counted in norms and saved once


@dataclass(frozen=True)
class ParamSpec:
    """One tensor of one rank; its padding rows belong to no part."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    decay: bool
    tied: bool = False  # copies on the first and the last stage; gradients are summed over both
    uses: int = 1  # contributions to its gradient per micro-batch

    @property
    def numel(self) -> int:
        """Number of local elements, padding included."""
        return prod(self.shape)


def global_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> global shape of every tensor, in file order."""
    specs = ParamBuilder(model).stage(range(model.num_layers), True, True)
    return {part.box.key: part.box.stop for spec in specs for part in spec.parts}


def heads(model: ModelConfig) -> tuple[int, int, int]:
    """(query heads n, key/value heads k, head size d)."""
    k = model.num_kv_heads or model.num_heads
    return model.num_heads, k, model.head_dim or model.hidden_size // model.num_heads


def num_parameters(model: ModelConfig) -> int:
    """Parameters of the whole model, tied matrices once, no padding."""
    return sum(prod(shape) for shape in global_shapes(model).values())


def init_std(model: ModelConfig, name: str) -> float | None:
    """Standard deviation of the initial values of a Hugging Face tensor; None means ones."""
    if name.endswith("norm.weight"):
        return None
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return model.init_std / sqrt(2 * model.num_layers)
    return model.init_std


@dataclass(frozen=True)
class ParamBuilder:
    """Builds the specs of one tensor-parallel rank."""

    model: ModelConfig
    tp: int = 1
    tp_rank: int = 0
    sequence_parallel: bool = False

    def stage(self, layers: Sequence[int], first: bool, last: bool) -> tuple[ParamSpec, ...]:
        """The parameters of one stage in forward order; a tied matrix once."""
        embedding, tie = "model.embed_tokens.weight", self.model.tie_embeddings
        specs: list[ParamSpec] = []
        if first:
            matrix = self._vocab("embed_tokens", embedding, tied=tie and not last)
            specs.append(replace(matrix, uses=2 if tie and last else 1))
        for i in layers:
            specs += self._layer(f"layers.{i}.", f"model.layers.{i}.")
        if last:
            specs.append(self._norm("norm", "model.norm.weight"))
        if last and not tie:
            specs.append(self._vocab("lm_head", "lm_head.weight"))
        elif last and not first:
            specs.append(self._vocab("lm_head", embedding, tied=True, owner=False))
        return tuple(specs)

    def _layer(self, name: str, key: str) -> list[ParamSpec]:
        n, k, _ = heads(self.model)
        attention, mlp = f"{key}self_attn.", f"{key}mlp."
        hidden = self._even(self.model.ffn_hidden_size)
        rows = {f"{attention}q_proj.weight": self._heads(n)}
        rows |= {f"{attention}{x}_proj.weight": self._heads(k) for x in "kv"}
        qkv, copies = self._rows(f"{name}qkv_proj", rows), max(1, self.tp // k)
        over: SumOver = "kv" if copies > 1 else "none"
        owner = self.tp_rank % copies == 0
        shared = (replace(part, sum_over=over, owner=owner) for part in qkv.parts[1:])
        return [
            self._norm(f"{name}input_norm", f"{key}input_layernorm.weight"),
            replace(qkv, parts=(qkv.parts[0], *shared)),
            self._columns(f"{name}o_proj", f"{attention}o_proj.weight", self._heads(n)),
            self._norm(f"{name}post_attention_norm", f"{key}post_attention_layernorm.weight"),
            self._rows(f"{name}gate_up_proj", {f"{mlp}{x}_proj.weight": hidden for x in ("gate", "up")}),
            self._columns(f"{name}down_proj", f"{mlp}down_proj.weight", hidden),
        ]

    def _even(self, size: int) -> tuple[int, int]:
        """This rank's range of `size` rows or columns cut evenly over tp."""
        assert size % self.tp == 0, (size, self.tp)
        per = size // self.tp
        return self.tp_rank * per, (self.tp_rank + 1) * per

    def _heads(self, count: int) -> tuple[int, int]:
        """This rank's range of rows of `count` heads; ranks share a head when tp > count."""
        d, shared = heads(self.model)[2], self.tp_rank // max(1, self.tp // count)
        a, b = self._even(count) if self.tp <= count else (shared, shared + 1)
        return a * d, b * d

    def _norm(self, name: str, key: str) -> ParamSpec:
        shape = (self.model.hidden_size,)
        over: SumOver = "tp" if self.sequence_parallel and self.tp > 1 else "none"
        part = Part(Box.whole(key, shape), 0, over, owner=self.tp_rank == 0)
        return ParamSpec(name, shape, (part,), decay=False)

    def _rows(self, name: str, rows: Mapping[str, tuple[int, int]]) -> ParamSpec:
        """Row ranges of several [size, h] tensors under one another."""
        h, at, parts = self.model.hidden_size, 0, []
        for key, (a, b) in rows.items():
            parts.append(Part(Box(key, (a, 0), (b, h)), at))
            at += b - a
        return ParamSpec(name, (at, h), tuple(parts), decay=True)

    def _columns(self, name: str, key: str, columns: tuple[int, int]) -> ParamSpec:
        h, (a, b) = self.model.hidden_size, columns
        return ParamSpec(name, (h, b - a), (Part(Box(key, (0, a), (h, b))),), decay=True)

    def _vocab(self, name: str, key: str, tied: bool = False, owner: bool = True) -> ParamSpec:
        v, h = self.model.vocab_size, self.model.hidden_size
        per = -(-v // self.tp)
        a, b = min(v, self.tp_rank * per), min(v, (self.tp_rank + 1) * per)
        parts = (Part(Box(key, (a, 0), (b, h)), owner=owner),) if a < b else ()
        return ParamSpec(name, (per, h), parts, decay=True, tied=tied)


@dataclass(frozen=True)
class Placement:
    """A parameter and its first element in the flat buffer."""

    spec: ParamSpec
    offset: int


@dataclass(frozen=True)
class Bucket:
    """Elements start..stop-1 of the flat buffer; stop - start is a multiple of dp_cp."""

    index: int
    start: int
    stop: int
    params: tuple[Placement, ...]
    decay: bool
    tied: bool

    def shard(self, dp_cp: int, rank: int) -> tuple[int, int]:
        """The range of the flat buffer that rank `rank` of dp_cp optimizes."""
        per = (self.stop - self.start) // dp_cp
        return self.start + rank * per, self.start + (rank + 1) * per


@dataclass(frozen=True)
class Segment:
    """`count` elements at `offset` of the buffer: the flat range from `first` of `part.box`."""

    offset: int
    count: int
    part: Part
    first: int

    def boxes(self) -> Iterator[Box]:
        """The same elements as rectangles of the global tensor, in order."""
        return boxes_of_range(self.part.box, self.first, self.first + self.count)


@dataclass(frozen=True)
class BufferLayout:
    """The flat buffer of one stage."""

    buckets: tuple[Bucket, ...]
    numel: int

    def segments(self, start: int, stop: int) -> Iterator[Segment]:
        """What lies in elements start..stop-1 of the buffer; padding lies in no segment."""
        for bucket in self.buckets:
            for placement in bucket.params if start < bucket.stop and bucket.start < stop else ():
                row = placement.spec.numel // placement.spec.shape[0]
                for part in placement.spec.parts:
                    first = placement.offset + part.row * row
                    a, b = max(first, start), min(first + part.box.numel, stop)
                    if a < b:
                        yield Segment(a, b - a, part, a - first)


def build_layout(specs: Sequence[ParamSpec], dp_cp: int, bucket_elements: int) -> BufferLayout:
    """Place `specs`, in forward order; a bucket ends once it holds `bucket_elements`."""
    backward = list(reversed(specs))
    groups: list[list[ParamSpec]] = [[]]
    for spec in (s for s in backward if s.decay and not s.tied):
        groups[-1].append(spec)
        if sum(s.numel for s in groups[-1]) >= bucket_elements:
            groups.append([])
    groups += [[s for s in backward if s.tied], [s for s in backward if not s.decay]]
    buckets, at = list[Bucket](), 0
    for group in filter(None, groups):
        start, placed = at, []
        for spec in group:
            placed.append(Placement(spec, at))
            at += -(-spec.numel // ALIGN) * ALIGN
        at += (start - at) % (dp_cp * ALIGN)
        buckets.append(Bucket(len(buckets), start, at, tuple(placed), group[0].decay, group[0].tied))
    return BufferLayout(tuple(buckets), at)
