"""Where documents lie in a micro-batch, for attention that does not cross them.

A sample of s tokens may hold several documents, the first of them cut at its front. Everything follows
from one number per token: the position in the sample at which the token's document begins there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """The documents of b samples of s tokens. Make one with `of`, on the host: how many there are decides a shape.

    starts: int64 [b, s], never descending along s, at most its own index.
    cu_seqlens: int32 [documents + 1], where each document begins among the b * s tokens, and b * s at the end.
    """

    starts: Tensor
    cu_seqlens: Tensor

    @classmethod
    def of(cls, starts: Tensor) -> Documents:
        """The documents that begin where `starts` [b, s] says."""
        first = (starts == torch.arange(starts.shape[1], device=starts.device)).reshape(-1).nonzero().reshape(-1)
        return cls(starts, torch.cat([first, first.new_tensor([starts.numel()])]).to(torch.int32))

    @cached_property
    def positions(self) -> Tensor:
        """[b, s]: the position of each token within its document, or within what the sample holds of it."""
        return torch.arange(self.starts.shape[1], device=self.starts.device) - self.starts

    @cached_property
    def visible(self) -> Tensor:
        """bool [b, 1, s, s]: True where the query of the row may attend to the key of the column."""
        at = torch.arange(self.starts.shape[1], device=self.starts.device)
        return ((at[None, :] <= at[:, None]) & (at >= self.starts[:, :, None]))[:, None]

    def each(self, change: Callable[[Tensor], Tensor]) -> Documents:
        """The same with both tensors changed: moved, pinned."""
        return Documents(change(self.starts), change(self.cu_seqlens))
