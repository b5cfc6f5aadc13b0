"""A micro-batch: what one forward pass of one model replica consumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megallama.config.schema import Config
from megallama.kernels.attention import Documents
from megallama.plan.exchange import Share


@dataclass(frozen=True)
class MicroBatch:
    """Tokens and what they should predict.

    tokens, labels: int64 [b, s]; labels[i, t] is the token after tokens[i, t].
    mask: bool [b, s], True where the loss counts; None: everywhere.  Never from token values.
    documents: where documents begin, and with them attention and positions (the last token of each
        predicts nothing); None where samples run across them.
    num_counted: how many tokens the loss counts; known before anything is on a device.
    grad_scale: the backward pass yields the gradient of grad_scale * sum of losses.
    tell: is called with the losses of some of its tokens, one call after the other.
    """

    tokens: Tensor
    labels: Tensor
    mask: Tensor | None = None
    documents: Documents | None = None
    num_counted: int = -1
    grad_scale: float = 1.0
    tell: Callable[[MicroBatch, slice, Tensor], None] | None = None

    def __post_init__(self) -> None:
        if self.num_counted < 0:
            counted = self.labels.numel() if self.mask is None else int(self.mask.sum())
            object.__setattr__(self, "num_counted", counted)

    @classmethod
    def of(cls, ids: np.ndarray, starts: np.ndarray | None, real: Sequence[bool] | None = None) -> MicroBatch:
        """Of b samples of s + 1 ids; rows that are not `real` are padding and count nothing."""
        tokens, labels = (torch.from_numpy(x.astype(np.int64)) for x in (ids[:, :-1], ids[:, 1:]))
        mask = documents = None
        if real is not None and not all(real):
            mask = torch.tensor(real)[:, None].expand(labels.shape).contiguous()
        if starts is not None:
            begins = torch.from_numpy(starts)
            goes_on = begins[:, 1:] != torch.arange(1, begins.shape[1])
            mask = goes_on if mask is None else mask & goes_on
            documents = Documents.of(begins[:, :-1].contiguous())
        return cls(tokens, labels, mask, documents)

    @classmethod
    def zeros(cls, config: Config) -> MicroBatch:
        """Of the form that training data have, for a rank that has none."""
        zeros = np.zeros((config.batch.micro_batch_size, config.batch.seq_length + 1), np.int64)
        return cls.of(zeros, zeros if config.data.document_mask else None)

    def part(self, share: Share) -> MicroBatch:
        """What a rank of context parallelism has of each sample. Raises: ValueError."""
        if share.size == 1:
            return self
        chunks = share.chunks(self.tokens.shape[1])

        def cut(x: Tensor) -> Tensor:
            return torch.cat([x[:, a:b] for a, b in chunks], 1)

        mask = None if self.mask is None else cut(self.mask)
        documents = self.documents and self.documents.part(chunks)
        return MicroBatch(cut(self.tokens), cut(self.labels), mask, documents, grad_scale=self.grad_scale)

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device; does not wait for the copy if the source is pinned."""
        return self.each(lambda t: t.to(device, non_blocking=True))

    def each(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        mask = None if self.mask is None else change(self.mask)
        documents = None if self.documents is None else self.documents.each(change)
        return replace(self, tokens=change(self.tokens), labels=change(self.labels), mask=mask, documents=documents)
