"""A small run: detect, start, sum the ranks, print what happened as one line of JSON."""

from __future__ import annotations

import json
import sys

import torch

from megallama.comm.launch import detect_launch, start
from megallama.config.errors import MegallamaError
from megallama.config.schema import RunConfig


def main(arguments: list[str]) -> int:
    settings = dict(item.split("=", 1) for item in arguments)
    bad, config = int(settings.pop("bad", -1)), settings.pop("config", "")
    try:
        launch = detect_launch()
        with start(launch, RunConfig.model_validate({"device": "cpu", **settings}), config) as world:
            x = torch.tensor([float(world.rank)])
            world.group.all_reduce(x).wait()
            if world.rank == bad:
                raise ValueError("disk full")
            first = None
            if bad >= 0:
                try:
                    world.group.barrier()
                except RuntimeError as error:
                    first = (world.failed(error) or [None])[0]
            facts = {"rank": world.rank, "size": world.world_size, "local": [launch.local_rank, launch.one_node]}
            facts |= {"launcher": launch.launcher, "sum": x.item(), "notes": world.notes, "first": first}
            facts |= {"threads": torch.get_num_threads(), "port": launch.master_port, "hosts": world.hosts}
            print(json.dumps(facts), flush=True)
    except MegallamaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ValueError:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
