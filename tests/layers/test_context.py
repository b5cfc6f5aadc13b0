"""What a rank has of a sequence, and the two exchanges alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megallama.comm.group import Group
from megallama.config.schema import Config
from megallama.layers.batch import MicroBatch
from megallama.layers.context import ContextParallel
from megallama.plan.exchange import Share, exchange, kv_copies
from tests.small import small_config
from tests.threads import run_threads


def spread(found: Tensor, share: Share) -> Tensor:
    """Of this rank's tokens [.., b, s/cp] -> [.., b, s], with zeros where others have theirs."""
    out = found.new_zeros(*found.shape[:-1], found.shape[-1] * share.size)
    chunks = share.chunks(out.shape[-1])
    for (a, b), part in zip(chunks, found.chunk(len(chunks), -1), strict=True):
        out[..., a:b] = part
    return out


@pytest.mark.parametrize("cp", [1, 2, 3, 4, 8])
def test_ranks_have_every_token_once_and_equal_work(cp: int) -> None:
    length = 48
    owned = [[t for a, b in Share(r, cp).chunks(length) for t in range(a, b)] for r in range(cp)]
    assert sorted(t for rows in owned for t in rows) == [*range(length)]
    assert len({len(rows) for rows in owned}) == 1
    assert len({sum(t + 1 for t in rows) for rows in owned}) == 1  # keys that its queries see


def test_a_length_that_cannot_be_cut_is_named() -> None:
    with pytest.raises(ValueError, match="samples of 10 tokens: give a multiple of 2 x parallel.cp=2"):
        MicroBatch(torch.zeros(1, 10).long(), torch.zeros(1, 10).long()).part(Share(1, 2))


def test_parts_of_a_micro_batch_are_put_together_again() -> None:
    batch = MicroBatch(torch.arange(24).view(2, 12), torch.arange(24).view(2, 12) + 1, torch.rand(2, 12) < 0.5)
    parts = [batch.part(Share(rank, 3)) for rank in range(3)]
    assert parts[1].tokens.tolist() == [[2, 3, 8, 9], [14, 15, 20, 21]]
    assert sum(spread(p.labels, Share(r, 3)) for r, p in enumerate(parts)).equal(batch.labels)  # type: ignore[union-attr]
    assert sum(part.num_counted for part in parts) == batch.num_counted


def echo(q: Tensor, k: Tensor, v: Tensor, documents: Any = None) -> Tensor:
    """In place of attention, something linear that keeps rows apart: 2 q + 3 k + 5 v, of the last rows."""
    group, rows = q.shape[2] // k.shape[2], q.shape[1]
    last = (x[:, -rows:].repeat_interleave(group, 2) for x in (k, v))
    return 2 * q + 3 * next(last) + 5 * next(last)


@pytest.mark.parametrize("kv", [1, 2, 4], ids="kv {}".format)
@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("gathers", [True, False], ids=["gather", "heads"])
def test_exchanges_bring_every_row_home_and_gradients_are_their_adjoint(gathers: bool, cp: int, kv: int) -> None:
    b, s, n, d = 2, 16, 4, 3
    generator = torch.Generator().manual_seed(1)
    q, k, v, dout = (torch.randn(b, s, h, d, generator=generator, dtype=torch.float64) for h in (n, kv, kv, n))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = echo(q, k, v)
    want = out, *torch.autograd.grad(out, (q, k, v), dout)

    def body(group: Group) -> list[Tensor]:
        own = Share(group.rank, cp, gathers)
        rows = torch.cat([torch.arange(a, e) for a, e in own.chunks(s)])
        here = (n, kv, d) if gathers else (n // cp, max(kv // cp, 1), d)  # kv divides cp, or cp kv

        def make(*heads: int) -> Any:
            assert heads == here
            return echo

        attend = ContextParallel(group, own, keep=False).over(make, n, kv, d)
        mine = [x.detach()[:, rows].requires_grad_() for x in (q, k, v)]
        found = attend(*mine, None)
        grads = torch.autograd.grad(found, mine, dout[:, rows])
        return [spread(x.movedim(1, -1), own).movedim(-1, 1) for x in (found.detach(), *grads)]

    for number, parts in enumerate(zip(*run_threads(cp, body), strict=True)):
        assert torch.allclose(torch.stack(parts).sum(0), want[number].detach(), rtol=0, atol=1e-12)


def config(cp: int, heads: int, kv: int, tp: int = 1, **memory: Any) -> Config:
    model = {"hidden_size": 8 * heads, "num_heads": heads, "num_kv_heads": kv, "ffn_hidden_size": 48}
    sections = {"model": model, "parallel": {"cp": cp, "tp": tp}, "batch": {"seq_length": 96}}
    return small_config(**sections, memory={"recompute": "selective", **memory})


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"cp": 2, "heads": 4, "kv": 4}, ("heads", "cp=2 is above 2/3 x (1 + 4 / 4) = 1.33")),
        ({"cp": 2, "heads": 4, "kv": 4, "cp_keep_kv": True}, ("gather", "cp=2 is not above 1 x (1 + 4 / 4) = 2")),
        ({"cp": 4, "heads": 4, "kv": 1}, ("gather", "cp=4 is not above 2/3 x (4 + 4 / 1) = 5.33")),
        ({"cp": 4, "heads": 4, "kv": 4, "recompute": "full"}, ("heads", "cp=4 is above 3/4 x (1 + 4 / 4) = 1.5")),
        ({"cp": 2, "heads": 8, "kv": 1, "tp": 2}, ("gather", "cp=2 is not above 2/3 x (2 + 4 / 1) = 4")),
        ({"cp": 3, "heads": 4, "kv": 4}, ("gather", "cp=3 does not divide the 4 heads of a rank")),
    ],
    ids=lambda x: " ".join(map(str, x.values())) if isinstance(x, dict) else "",
)
def test_the_exchange_is_chosen_by_bytes(settings: dict[str, Any], want: tuple[str, str]) -> None:
    assert exchange(config(**settings)) == want


def test_key_value_heads_are_copied_as_often_as_it_takes() -> None:
    assert [kv_copies(k, cp) for k, cp in ((8, 2), (1, 4), (2, 4), (3, 2))] == [1, 4, 2, 2]
