"""How many kernels a GPU is asked to launch, and the bytes that those read and write that only pass over memory.

Every launch counts: copies, casts, fills, the second stage of a reduction.  Matrix products and attention are
launches too, but their bytes are not counted.  Bytes: each operand that is read and each that is written, once.
What a kernel really moves can be more (a tensor read twice) or less (it is still in the cache).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 1 << 20
NO_LAUNCH = {"is_same_size", "_local_scalar_dense", "lift_fresh", "lift", "_has_compatible_shallow_copy_type"}
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "_scaled_mm", "addmv_", "mv"}
ATTENTION = ("attention", "varlen_attn")
BY_ROWS = {
    "index",
    "index_select",
    "gather",
    "index_put_",
    "_index_put_impl_",
    "index_add_",
    "scatter_",
    "scatter_add_",
}
STAGES = {  # kernels behind one operation
    "dot": 2,  # products of blocks, their sum
    "_fused_rms_norm_backward": 3,  # of x; of the weight by blocks of rows, their sum
    "_scaled_dot_product_flash_attention_backward": 3,  # rows of dout * out; dk, dv and dq in fp32; dq rounded
    "_scaled_dot_product_efficient_attention_backward": 2,
    "_flash_attention_backward": 3,
    "_varlen_attn_backward": 3,
    "_varlen_attn": 2,  # and the state of a random generator that is not used
}
REDUCTIONS = {"sum", "amax", "linalg_vector_norm", "mean", "max"}


class Launches(TorchDispatchMode):
    """Counts within its ``with`` block, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.bytes = Counter[str](), Counter[str]()
        self.largest = 0  # elements of an operand

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would import its compiler, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = launches_of(func, args, out)
        if count:
            name, tensors = func._schema.name.partition("::")[2], operands((args, kwargs, out))
            self.launches[name] += count
            self.largest = max([self.largest, *(t.numel() for t in tensors)])
            if name not in PRODUCTS and not any(word in name for word in ATTENTION):
                self.bytes[name] += bytes_of(func, name, args, kwargs or {}, out)
        return out

    def launched(self, name: str, reads: list[Tensor], writes: list[Tensor]) -> None:
        """A kernel that torch knows nothing of."""
        self.launches[name] += 1
        self.bytes[name] += sum(map(_touched, reads)) + sum(map(_touched, writes))
        self.largest = max([self.largest, *(t.numel() for t in (*reads, *writes))])

    @property
    def total(self) -> int:
        return self.launches.total()

    @property
    def mib(self) -> float:
        """Of operations that only pass over memory."""
        return self.bytes.total() / MIB


def operands(values: Any) -> list[Tensor]:
    """Every tensor in `values`, once."""
    found = {id(t): t for t in tree_leaves(values) if isinstance(t, Tensor)}
    return list(found.values())


def launches_of(func: Any, args: Any, out: Any) -> int:
    """0 for a view, an allocation, and what has no elements."""
    schema = func._schema
    name = schema.name.partition("::")[2]
    written = [a for a in (*schema.arguments, *schema.returns) if a.alias_info is not None]
    view = bool(written) and not any(a.alias_info.is_write for a in written)
    allocation = name.startswith(("empty", "new_empty"))
    outputs = operands(out) or operands(args)
    if view or allocation or name in NO_LAUNCH or not any(t.numel() for t in outputs):
        return 0
    if name == "_foreach_norm":
        return 2 * len(out)
    if name in REDUCTIONS:  # few results of many rows: blocks share one and need a zeroed counter
        first, named = args[0], dict(zip((a.name for a in schema.arguments), args, strict=False))
        last = named.get("dim") in (-1, first.dim() - 1, [-1], [first.dim() - 1])
        return 1 if last and operands(out)[0].numel() >= 128 else 2
    return STAGES.get(name, 1)


def bytes_of(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> int:
    """Read and written by one operation."""
    schema, writes = func._schema, list[Tensor]()
    reads: list[Tensor] = []
    for argument, value in (*zip(schema.arguments, args, strict=False), *_named(schema, kwargs)):
        found = operands(value)
        written = argument.alias_info is not None and argument.alias_info.is_write
        writes += found if written else []
        reads += [] if written and _only_written(name, argument.name) else found
    if name in BY_ROWS:  # of a table only the rows that are named
        picked = min((t for t in operands((args, kwargs, out)) if t.is_floating_point()), key=Tensor.numel)
        tables = 3 if name.endswith("_") else 2  # read, added to, written
        return tables * picked.nbytes + sum(t.nbytes for t in reads if not t.is_floating_point())
    if name.startswith("new_") or name.endswith("_like"):  # the argument is but a pattern
        reads.clear()
    writes += [t for t in operands(out) if not any(t is w for w in writes)]
    return sum(map(_touched, reads)) + sum(map(_touched, writes))


def _named(schema: Any, kwargs: Any) -> list[tuple[Any, Any]]:
    return [(a, kwargs[a.name]) for a in schema.arguments if a.name in kwargs]


def _only_written(name: str, argument: str) -> bool:
    return argument == "out" or name in ("copy_", "zero_", "fill_")


def _touched(t: Tensor) -> int:
    """Bytes of the elements that differ: a dimension of stride 0 is one element."""
    count = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        count *= size if stride else 1
    return count * t.element_size()
