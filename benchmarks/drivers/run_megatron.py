"""megatron-core (the package): `GPTModel` from its local layer spec, its DDP, optimizer and schedules, on CPU.

megatron-core expects CUDA; `pretend_cuda` points the few `torch.cuda` calls it makes at the CPU.  The
fused kernels and sequence parallelism need Transformer Engine or apex and are off.  bf16 keeps fp32
master weights and fp32 main gradients, as its own training script does.
"""

from __future__ import annotations

import contextlib
import functools
import types
import warnings
from typing import Any

import torch
import torch._dynamo  # before the patches: it makes a table of torch.cuda's functions
import work


class Nothing:
    """A stream, event or timer range that does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *error: object) -> None:
        return None


def on_cpu(factory: Any) -> Any:
    """`factory`, with a CUDA device replaced by the CPU."""

    @functools.wraps(factory)
    def made(*args: Any, **kwargs: Any) -> Any:
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return made


def answer(value: Any) -> Any:
    """A new function that returns `value` whatever it is asked."""
    return lambda *args, **kwargs: value


def pretend_cuda() -> None:
    """Let code that asks for CUDA run on the CPU."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, answer(None))
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        setattr(cuda, name, answer(0))
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, answer(Nothing()))
    cuda.Stream, cuda.Event = Nothing, Nothing
    cuda.stream = lambda *a, **k: contextlib.nullcontext()
    cuda.nvtx = types.SimpleNamespace(range_push=lambda *a: None, range_pop=lambda *a: None)
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *a, **k: torch.get_rng_state()
    cuda._lazy_call = lambda work, **k: None  # only sets the state of CUDA's generator
    cuda.set_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.get_device_capability = lambda *a, **k: (8, 0)
    cuda.get_device_properties = lambda *a, **k: types.SimpleNamespace(multi_processor_count=1, total_memory=2**34)
    for name in ("FloatTensor", "ByteTensor", "LongTensor", "IntTensor", "BFloat16Tensor", "HalfTensor"):
        setattr(cuda, name, getattr(torch, name))
    tensor: Any = torch.Tensor
    kind = tensor.type
    tensor.cuda = lambda self, *a, **k: self

    def named(self: Any, dtype: Any = None, **kwargs: Any) -> Any:
        return kind(self).replace("torch.", "torch.cuda.") if dtype is None else kind(self, dtype, **kwargs)

    tensor.type = named
    torch.nn.Module.cuda = lambda self, *a, **k: self  # type: ignore[method-assign,assignment,return-value]
    for name in ("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "empty_like", "zeros_like"):
        setattr(torch, name, on_cpu(getattr(torch, name)))


def build(job: work.Job) -> tuple[Any, Any, Any]:
    """(model in DDP, optimizer, transformer config)."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_config import TransformerConfig

    s, bf16 = job.shape, job.dtype == "bf16"
    parallel_state.initialize_model_parallel(job.layout.tp, job.layout.pp)
    model_parallel_cuda_manual_seed(0)
    config = TransformerConfig(
        num_layers=s.layers,
        hidden_size=s.hidden,
        ffn_hidden_size=s.ffn,
        num_attention_heads=s.heads,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=job.layout.tp,
        pipeline_model_parallel_size=job.layout.pp,
        pipeline_dtype=torch.bfloat16 if bf16 else torch.float32,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        bf16=bf16,
        batch_p2p_comm=False,
        deallocate_pipeline_outputs=True,
    )
    model: Any = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=s.vocab,
        max_sequence_length=s.seq,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
    if bf16:
        model = Float16Module(config, model)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
    model = DistributedDataParallel(config, ddp, model)
    settings = OptimizerConfig(
        optimizer="adam",
        lr=work.LR,
        min_lr=work.LR,
        weight_decay=work.DECAY,
        adam_beta1=work.BETAS[0],
        adam_beta2=work.BETAS[1],
        adam_eps=work.EPS,
        clip_grad=work.CLIP,
        bf16=bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=False,
    )
    optimizer = get_megatron_optimizer(settings, [model])
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    return model, optimizer, config


def main() -> None:
    warnings.filterwarnings("ignore")
    pretend_cuda()
    job = work.arguments("abcde")
    model, optimizer, _ = build(job)
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    s = job.shape
    tokens, labels = work.batch(job, parallel_state.get_data_parallel_rank())
    positions = torch.arange(s.seq).expand(s.micro_batch, s.seq)
    mask = torch.ones(1, 1, s.seq, s.seq, dtype=torch.bool).triu(1)
    schedule = get_forward_backward_func()

    def loss_of(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        loss = output.float().mean()
        return loss, {"loss": loss.item()}

    def forward(_: Any, model: Any) -> Any:
        return model(tokens, positions, mask, labels=labels), loss_of

    def step() -> float:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = schedule(
            forward_step_func=forward,
            data_iterator=None,
            model=[model],
            num_microbatches=job.layout.microbatches,
            seq_length=s.seq,
            micro_batch_size=s.micro_batch,
        )
        optimizer.step()
        return sum(x["loss"] for x in losses) / len(losses) if losses else 0.0

    work.run(job, step)


if __name__ == "__main__":
    main()
