"""torchtitan with its own tensor and pipeline parallelism: `parallelize_llama`, `pipeline_llm`, its loss and clipping.

As its trainer does it: built without memory, split into stages, sharded, wrapped in FSDP2 (which over one rank only
sets the precision of the products), then initialised; sequence parallelism and 1F1B, its defaults.  Where it finds no
accelerator it takes CUDA to be there: its meshes are told that it is the CPU.  Its trainer hands the schedule a list
of micro-batches, which this torch's does not take: the schedule cuts the batch itself.
"""

from __future__ import annotations

from typing import Any

import run_torchtitan
import torch
import work
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims, parallel_dims, pipeline_parallel
from torchtitan.distributed import utils as dist_utils
from torchtitan.models import llama3
from torchtitan.models.llama3.sharding import set_llama3_sharding_config

parallel_dims.device_type = "cpu"


def build(job: work.Job, dims: ParallelDims, loss_fn: Any, parallelism: ParallelismConfig) -> tuple[Any, list[Any]]:
    """(pipeline schedule or None, the parts of the model that this rank has)."""
    layout, shape = job.layout, job.shape
    config = run_torchtitan.settings(shape)
    set_llama3_sharding_config(config, enable_sp=parallelism.enable_sequence_parallel)
    with torch.device("meta"):
        model = config.build()
    common: dict[str, Any] = {
        "parallel_dims": dims,
        "training": TrainingConfig(
            local_batch_size=shape.micro_batch * layout.microbatches,
            seq_len=shape.seq,
            mixed_precision_param="bfloat16" if job.dtype == "bf16" else "float32",
        ),
        "parallelism": parallelism,
        "compile_config": CompileConfig(),
        "ac_config": None,
        "dump_folder": "",
    }
    schedule = None
    if layout.pp > 1:
        schedule, parts, _, _ = pipeline_parallel.pipeline_llm(
            model,
            device=torch.device("cpu"),
            model_config=config,
            parallelize_fn=llama3.parallelize_llama,
            loss_fn=loss_fn,
            **common,
        )
    else:
        parts = [llama3.parallelize_llama(model, **common)]
    for part in parts:
        part.to_empty(device="cpu")
        with torch.no_grad():
            part.init_weights(buffer_device=None)
        part.train()
    return schedule, parts


def main() -> None:
    job = work.arguments("cde")
    layout = job.layout
    parallelism = ParallelismConfig(
        tensor_parallel_degree=layout.tp,
        pipeline_parallel_degree=layout.pp,
        pipeline_parallel_microbatch_size=job.shape.micro_batch,
        spmd_backend="partial_dtensor",  # "spmd_types", its default, wants an FSDP2 that is newer than this torch's
    )
    dims = ParallelDims.from_config(parallelism, layout.ranks)
    dist_utils.set_spmd_backend(parallelism.spmd_backend)
    loss_fn = CrossEntropyLoss.Config(global_vocab_size=job.shape.vocab).build()
    context = dist_utils.get_spmd_context(parallel_dims=dims)
    schedule, parts = build(job, dims, loss_fn, parallelism)
    parameters = [p for part in parts for p in part.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=work.LR, betas=work.BETAS, eps=work.EPS, weight_decay=work.DECAY, fused=True
    )
    tokens, labels = (x.repeat(layout.microbatches, 1) for x in work.batch(job))  # type: ignore[attr-defined]
    count = torch.tensor(labels.numel())
    pp_mesh = dims.get_optional_mesh("pp")
    stage = pp_mesh.get_local_rank() if pp_mesh is not None else 0

    def in_pipeline() -> float:
        last = stage == layout.pp - 1
        losses: list[torch.Tensor] | None = [] if last else None
        schedule.step(
            *((tokens,) if stage == 0 else ()),
            target=labels if last else None,
            losses=losses,
            loss_kwargs={"global_valid_tokens": count},
            return_outputs=False,
        )
        return sum(loss.item() for loss in losses or ())

    def alone() -> float:
        loss, _ = loss_fn(parts[0](tokens), labels, count)
        loss.backward()
        return float(loss.item())

    def step() -> float:
        with context():
            loss = alone() if schedule is None else in_pipeline()
        dist_utils.clip_grad_norm_(parameters, work.CLIP, foreach=True, pp_mesh=pp_mesh)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    work.run(job, step)


if __name__ == "__main__":
    main()
