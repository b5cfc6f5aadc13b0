"""Whether copies that must be equal are: what ranks hold of the weights, against the masters that decide.

Over dp and cp a rank owns a shard of every bucket, and everybody's weights there are the cast of its masters.  Norm
weights have a master on every rank of tp, key/value heads that ranks share on each of kv, a tied embedding two.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from megallama.comm.group import Groups
from megallama.layers.param import digest
from megallama.optim.update import Update


def wrong_copies(update: Update, groups: Groups) -> list[tuple[str, list[int]]]:
    """Tensors that differ from their copies, and the global ranks that are wrong, or of which one is.

    All ranks of the job call it between two updates, and get the same.  Where no master decides (weights that are
    their own masters; masters that are copies) the majority does, and where there is none all are named.
    """
    update.wait()
    pieces: dict[str, list[tuple[str, Tensor]]] = {"dp_cp": [], "tp": [], "kv": [], "embedding": []}
    dp, owners, masters, tied, own, found = groups.dp_cp, list[int](), list[Tensor](), 0, False, []
    for sync, bucket, master in update.masters():
        weights, (start, _), tied = sync.buffers.weights, sync.range_of(bucket), tied + bucket.tied
        own = master.dtype == weights.dtype
        for owner in range(dp.size):
            for segment in sync.buffers.layout.segments(*bucket.shard(dp.size, owner)):
                key, a, b = segment.part.box.key, segment.offset, segment.offset + segment.count
                mine = master[a - start : b - start] if owner == dp.rank else master[:0]  # then the digest is 0
                pieces["dp_cp"].append((key, digest(weights[a:b])))
                masters.append(digest(mine, weights.dtype))
                owners.append(owner)
                over = "embedding" if bucket.tied else "tp" if not bucket.decay else segment.part.sum_over
                if owner == dp.rank and over != "none":
                    pieces[over].append((key, digest(mine)))
    truth = torch.stack(masters) if masters else torch.zeros(1)
    dp.all_reduce(truth).wait()
    for axis, held in ((axis, held) for axis, held in pieces.items() if held):
        group, here, decides = getattr(groups, axis), tied if axis == "embedding" else 1, axis == "dp_cp" and not own
        digests = torch.stack([one for _, one in held])
        everyone = digests.new_empty(group.size * len(held))
        group.all_gather(everyone, digests).wait()
        columns = everyone.view(group.size * here, -1).T.tolist()  # a row per rank, `here` copies each
        for number, ((key, _), column) in enumerate(zip(held, columns, strict=False)):
            column += decides * (group.size + 1) * [int(truth[number])]
            right, count = Counter(column).most_common(1)[0]  # right: what more than half are
            wrong = [at for at, digested in enumerate(column) if digested != right or 2 * count <= len(column)]
            everybody = decides and len(wrong) == group.size  # all hold the same: it is the master
            ranks = {group.ranks[at // here] for at in ([owners[number]] if everybody else wrong)}
            found += [(key, sorted(ranks))] * (len(ranks) > 0)
    return list({str(one): (one[0], one[1]) for told in groups.world.gather_values(found) for one in told}.values())
