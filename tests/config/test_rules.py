"""Every cross-field rule: the message in full, and that what it says to write is accepted."""

from __future__ import annotations

import pytest

from megallama.config.errors import ConfigError
from megallama.config.load import load
from megallama.config.rules import check, legal_tp
from megallama.config.schema import Config

# overrides, ranks, the message, overrides that put it right
CASES: list[tuple[str, int | None, str, str]] = [
    (
        "model.num_heads=8 model.num_kv_heads=3", None,
        "model.num_kv_heads=3 does not divide model.num_heads=8; use 1, 2, 4 or 8",
        "model.num_kv_heads=4",
    ),
    (
        "model.num_heads=5", None,
        "model.num_heads=5 does not divide model.hidden_size=256; use 4 or 8 heads, or set model.head_dim",
        "model.num_heads=8",
    ),
    (
        "model.head_dim=33", None,
        "model.head_dim=33 is odd, but rotary embeddings turn pairs of elements; use 32 or 34",
        "model.head_dim=34",
    ),
    ("model.vocab_size=1", None, "model.vocab_size=1 leaves nothing to predict; use at least 2", "model.vocab_size=2"),
    (
        "model.rope_scaling.low_freq_factor=4", None,
        "model.rope_scaling.low_freq_factor=4.0 is not below model.rope_scaling.high_freq_factor=4.0; "
        "LLaMA 3.1 uses 1.0 and 4.0",
        "model.rope_scaling.low_freq_factor=1",
    ),
    (
        "parallel.tp=3 model.num_heads=24 model.num_kv_heads=8 model.head_dim=16 model.ffn_hidden_size=696 "
        "batch.micro_batch_size=3 batch.global_batch_size=30", None,
        "parallel.tp=3 does not divide model.num_kv_heads=8; use 1, 2, 4, 8 or 24",
        "parallel.tp=4 batch.micro_batch_size=2",
    ),
    (
        "parallel.tp=6 model.num_heads=12 model.num_kv_heads=4 model.head_dim=16 model.ffn_hidden_size=696 "
        "batch.micro_batch_size=3 batch.global_batch_size=30", None,
        "parallel.tp=6 is not a multiple of model.num_kv_heads=4; use 1, 2, 4 or 12",
        "parallel.tp=4 batch.micro_batch_size=2",
    ),
    (
        "parallel.tp=8 model.num_kv_heads=2", None,
        "parallel.tp=8 does not divide model.num_heads=4; use 1, 2 or 4",
        "parallel.tp=4",
    ),
    (
        "parallel.tp=4 model.ffn_hidden_size=690", None,
        "parallel.tp=4 does not divide model.ffn_hidden_size=690; use 1 or 2",
        "parallel.tp=2",
    ),
    (
        "parallel.tp=2 overlap.tensor_parallel_chunks=7", None,
        "overlap.tensor_parallel_chunks=7 does not divide the 512 rows of a micro-batch on a rank "
        "(batch.micro_batch_size x batch.seq_length / parallel.tp); use 4 or 8",
        "overlap.tensor_parallel_chunks=8",
    ),
    (
        "parallel.tp=2 parallel.sequence_parallel=false overlap.tensor_parallel_chunks=3", None,
        "overlap.tensor_parallel_chunks=3 does not divide the 1024 rows of a micro-batch on a rank "
        "(batch.micro_batch_size x batch.seq_length); use 2 or 4",
        "overlap.tensor_parallel_chunks=4",
    ),
    (
        "parallel.tp=4 batch.micro_batch_size=2 batch.seq_length=33", None,
        "parallel.tp=4 does not divide batch.micro_batch_size=2 x batch.seq_length=33 = 66 tokens, which sequence "
        "parallelism cuts; use batch.seq_length=32 or 34, or parallel.sequence_parallel=false",
        "batch.seq_length=34",
    ),
    (
        "parallel.chunks=2", None,
        "parallel.chunks=2 needs more than parallel.pp=1; use parallel.chunks=1 or parallel.pp=2",
        "parallel.pp=2",
    ),
    (
        "parallel.pp=2 parallel.chunks=2 parallel.schedule=zb-h1", None,
        'parallel.schedule="zb-h1" has one chunk per rank, but parallel.chunks=2; '
        'use parallel.chunks=1 or parallel.schedule="1f1b"',
        "parallel.schedule=1f1b",
    ),
    (
        "parallel.pp=2 parallel.chunks=2 parallel.schedule=zb-h2", None,
        'parallel.schedule="zb-h2" has one chunk per rank, but parallel.chunks=2; '
        'use parallel.chunks=1 or parallel.schedule="1f1b"',
        "parallel.chunks=1",
    ),
    (
        "parallel.pp=4 parallel.schedule=zb-v", None,
        'parallel.schedule="zb-v" has two chunks on each of several ranks, but parallel.pp=4 and parallel.chunks=1; '
        "use parallel.pp=4 and parallel.chunks=2",
        "parallel.chunks=2",
    ),
    (
        "parallel.schedule=v-half parallel.chunks=3", None,
        'parallel.schedule="v-half" has two chunks on each of several ranks, but parallel.pp=1 and parallel.chunks=3; '
        "use parallel.pp=2 and parallel.chunks=2",
        "parallel.pp=2 parallel.chunks=2",
    ),
    (
        "parallel.pp=2 parallel.chunks=2 parallel.schedule=dualpipe-v batch.global_batch_size=24", 4,
        "batch.global_batch_size=24 is below batch.micro_batch_size=4 x dp=2 (ranks / (tp x pp)) = 8 times 2 x "
        'parallel.pp=2 = 32, the least for parallel.schedule="dualpipe-v"; use 32, or parallel.schedule="zb-v"',
        "batch.global_batch_size=32",
    ),
    (
        "parallel.pp=2 parallel.chunks=2 parallel.schedule=dualpipe-v batch.ramp_start=8 batch.ramp_increment=8 "
        "batch.ramp_samples=100", 2,
        "batch.ramp_start=8 is below batch.micro_batch_size=4 x dp=1 (ranks / (tp x pp)) = 4 times 2 x parallel.pp=2 "
        '= 16, the least for parallel.schedule="dualpipe-v"; use 16, or parallel.schedule="zb-v"',
        "batch.ramp_start=16",
    ),
    (
        "parallel.pp=2 parallel.schedule=csv", None,
        'parallel.schedule="csv" has no parallel.schedule_file; write parallel.schedule_file=FILE.csv',
        "parallel.schedule_file=my.csv",
    ),
    (
        "parallel.schedule_file=my.csv", None,
        'parallel.schedule_file="my.csv" is not read with parallel.schedule="1f1b"; write parallel.schedule="csv", '
        "or leave the file out",
        "parallel.schedule=csv",
    ),
    (
        "parallel.pp=2 parallel.schedule=csv parallel.schedule_file=my.csv batch.ramp_start=8 batch.ramp_increment=8 "
        "batch.ramp_samples=100", None,
        'batch.ramp_start=8 changes the number of micro-batches, which is fixed with parallel.schedule="csv"; '
        "leave the ramp-up out, or use another schedule",
        "parallel.schedule=1f1b parallel.schedule_file=none",
    ),
    (
        "log.trace_steps=[9,3]", None,
        "log.trace_steps=[9, 3] ends before it begins; write log.trace_steps=[3, 9]",
        "log.trace_steps=[3,9]",
    ),
    (
        "parallel.pp=2 parallel.stage_layers=[1,1,2]", None,
        "parallel.stage_layers=[1, 1, 2] has 3 numbers, but parallel.pp=2 x parallel.chunks=1 = 2 stages; "
        "write 2 numbers, for example [2, 2]",
        "parallel.stage_layers=[2,2]",
    ),
    (
        "parallel.pp=2 parallel.stage_layers=[3,4] model.num_layers=9", None,
        "parallel.stage_layers=[3, 4] adds up to 7, but model.num_layers=9; "
        "write numbers that add up to it, for example [4, 5]",
        "parallel.stage_layers=[9,0]",
    ),
    (
        "parallel.cp=4 batch.seq_length=100", None,
        "parallel.cp=4 cuts a sequence into 2 x 4 = 8 chunks, of which batch.seq_length=100 is no multiple; "
        "use batch.seq_length=96 or 104",
        "batch.seq_length=104",
    ),
    (
        "parallel.cp=3 batch.seq_length=96 parallel.cp_exchange=heads", None,
        "parallel.cp=3 does not divide the 4 heads of a rank (model.num_heads / parallel.tp), which "
        'parallel.cp_exchange="heads" deals out; use parallel.cp=2 or 4, or parallel.cp_exchange="gather"',
        "parallel.cp_exchange=gather",
    ),
    (
        "parallel.cp=2 model.num_kv_heads=2 overlap.context_parallel_heads=3", None,
        "overlap.context_parallel_heads=3 does not divide the 2 key/value heads of a rank (model.num_kv_heads / "
        "parallel.tp); use 2",
        "overlap.context_parallel_heads=2",
    ),
    (
        "parallel.tp=4 parallel.cp=2 batch.seq_length=20 batch.micro_batch_size=1", None,
        "parallel.tp=4 does not divide batch.micro_batch_size=1 x batch.seq_length=20 / parallel.cp=2 = 10 tokens, "
        "which sequence parallelism cuts; use batch.seq_length=16 or 24, or parallel.sequence_parallel=false",
        "batch.seq_length=24",
    ),
    (
        "parallel.tp=2 parallel.cp=2 batch.seq_length=24 batch.micro_batch_size=1 overlap.tensor_parallel_chunks=4",
        None,
        "overlap.tensor_parallel_chunks=4 does not divide the 6 rows of a micro-batch on a rank "
        "(batch.micro_batch_size x batch.seq_length / parallel.cp / parallel.tp); use 3 or 6",
        "overlap.tensor_parallel_chunks=3",
    ),
    (
        "parallel.cp=2 parallel.tp=2 batch.seq_length=252", 6,
        "ranks=6 cannot be cut into parallel.tp=2 x parallel.pp=1 x parallel.cp=2 = 4; use 4 or 8 ranks, or sizes "
        "whose product is 3 or 6",
        "parallel.cp=3",
    ),
    (
        "parallel.cp=2 batch.global_batch_size=30", 4,
        "batch.global_batch_size=30 is not a multiple of batch.micro_batch_size=4 x dp=2 (ranks / (tp x pp x cp)) = 8; "
        "use 24 or 32",
        "batch.global_batch_size=32",
    ),
    (
        "parallel.cp=2 run.max_replacements=1 run.min_replicas=3", 4,
        "run.min_replicas=3, but 4 ranks are dp=2 replicas (ranks / (tp x pp x cp)); write run.min_replicas=1 to go on "
        "without one of them",
        "run.min_replicas=1",
    ),
    (
        "parallel.rank_order=pp-tp", None,
        'parallel.rank_order="pp-tp" must name each of tp, cp, dp, pp once; for example "pp-tp-cp-dp"',
        "parallel.rank_order=pp-tp-cp-dp",
    ),
    (
        "parallel.tp=4 parallel.pp=2", 12,
        "ranks=12 cannot be cut into parallel.tp=4 x parallel.pp=2 = 8; use 8 or 16 ranks, "
        "or sizes whose product is 6 or 12",
        "parallel.tp=2 parallel.pp=3 batch.global_batch_size=8",
    ),
    (
        "parallel.tp=4", 2,
        "ranks=2 cannot be cut into parallel.tp=4 x parallel.pp=1 = 4; use 4 ranks, or sizes whose product is 2",
        "parallel.tp=2",
    ),
    (
        "parallel.tp=2", 1,
        "ranks=1 cannot be cut into parallel.tp=2 x parallel.pp=1 = 2; use 2 ranks, or sizes whose product is 1; "
        "torchrun --nproc-per-node 2 -m megallama.pretrain ... starts 2",
        "parallel.tp=1",
    ),
    (
        "run.timeout_seconds=30", None,
        "run.timeout_seconds=30 ends a run whose other ranks still wait for a batch, which may take "
        "data.timeout_seconds=60; use run.timeout_seconds=60 or more, or data.timeout_seconds=30",
        "run.timeout_seconds=60",
    ),
    (
        "batch.global_batch_size=30", 2,
        "batch.global_batch_size=30 is not a multiple of batch.micro_batch_size=4 x dp=2 (ranks / (tp x pp)) = 8; "
        "use 24 or 32",
        "batch.global_batch_size=24",
    ),
    (
        "batch.global_batch_size=28", 2,
        "batch.global_batch_size=28 is not a multiple of batch.micro_batch_size=4 x dp=2 (ranks / (tp x pp)) = 8; "
        "use 24 or 32, or batch.uneven=true",
        "batch.uneven=true",
    ),
    (
        "batch.global_batch_size=30 batch.uneven=true", 2,
        "batch.global_batch_size=30 is not a multiple of batch.micro_batch_size=4; use 28 or 32",
        "batch.global_batch_size=28",
    ),
    (
        "batch.global_batch_size=28 batch.uneven=true", 8,
        "batch.global_batch_size=28, which deals 1 or 0 micro-batches of batch.micro_batch_size=4 to each of dp=8 "
        "replicas, but each needs at least 1; use 32 or more, or fewer ranks",
        "batch.global_batch_size=32",
    ),
    (
        "batch.global_batch_size=20 batch.uneven=true parallel.pp=2 parallel.chunks=2", 4,
        "batch.global_batch_size=20, which deals 3 or 2 micro-batches of batch.micro_batch_size=4 to each of dp=2 "
        "replicas, but each needs a multiple of parallel.pp=2 to interleave parallel.chunks=2; use 16 or 32, or "
        "parallel.chunks=1",
        "parallel.chunks=1",
    ),
    (
        "batch.global_batch_size=24 batch.uneven=true parallel.pp=2 parallel.chunks=2", 4,
        "batch.global_batch_size=24, which deals 3 micro-batches of batch.micro_batch_size=4 to each of dp=2 "
        "replicas, but each needs a multiple of parallel.pp=2 to interleave parallel.chunks=2; use 16 or 32, or "
        "parallel.chunks=1",
        "batch.global_batch_size=16",
    ),
    (
        "batch.global_batch_size=28 batch.uneven=true parallel.pp=2 parallel.chunks=2 parallel.schedule=dualpipe-v", 4,
        "batch.global_batch_size=28, which deals 4 or 3 micro-batches of batch.micro_batch_size=4 to each of dp=2 "
        'replicas, but each needs at least 4 for parallel.schedule="dualpipe-v"; use 32 or more, or fewer ranks',
        "batch.global_batch_size=36",
    ),
    (
        "batch.global_batch_size=28 batch.uneven=true parallel.pp=2 parallel.schedule=csv parallel.schedule_file=a", 4,
        "batch.global_batch_size=28, which deals 4 or 3 micro-batches of batch.micro_batch_size=4 to each of dp=2 "
        "replicas, but parallel.schedule_file has one number for all; use 24 or 32, or another schedule",
        "batch.global_batch_size=24",
    ),
    (
        "batch.global_batch_size=28 parallel.pp=2 parallel.schedule=csv parallel.schedule_file=a", 4,  # no way out
        "batch.global_batch_size=28 is not a multiple of batch.micro_batch_size=4 x dp=2 (ranks / (tp x pp)) = 8; "
        "use 24 or 32",
        "batch.global_batch_size=24",
    ),
    (
        "batch.uneven=true batch.ramp_start=4 batch.ramp_increment=4 batch.ramp_samples=9", 3,
        "batch.ramp_start=4, which deals 1 or 0 micro-batches of batch.micro_batch_size=4 to each of dp=3 replicas, "
        "but each needs at least 1; use 12 or more, or fewer ranks",
        "batch.ramp_start=12",
    ),
    (
        "batch.uneven=true batch.ramp_start=8 batch.ramp_increment=4 batch.ramp_samples=9 batch.global_batch_size=16 "
        "parallel.pp=2 parallel.chunks=2", 2,
        "batch.ramp_increment=4 makes a batch of 12, which deals 3 micro-batches of batch.micro_batch_size=4 to each "
        "of dp=1 replicas, but each needs a multiple of parallel.pp=2 to interleave parallel.chunks=2; use 8 or 16, or "
        "parallel.chunks=1",
        "batch.ramp_increment=8",
    ),
    (
        "batch.global_batch_size=3", None,
        "batch.global_batch_size=3 is not a multiple of batch.micro_batch_size=4; use 4",
        "batch.global_batch_size=4",
    ),
    (
        "parallel.pp=2 parallel.chunks=2 batch.global_batch_size=24", 4,
        "batch.global_batch_size=24 is not a multiple of batch.micro_batch_size=4 x dp=2 (ranks / (tp x pp)) = 8 "
        "times parallel.pp=2 (needed to interleave parallel.chunks=2); use 16 or 32",
        "batch.global_batch_size=16",
    ),
    (
        "batch.ramp_start=8 batch.ramp_samples=100", None,
        "batch.ramp_start=8 and batch.ramp_samples=100 without batch.ramp_increment; set all three or none",
        "batch.ramp_increment=8",
    ),
    (
        "batch.ramp_start=64 batch.ramp_increment=8 batch.ramp_samples=100", None,
        "batch.ramp_start=64 is above batch.global_batch_size=32; use at most 32",
        "batch.ramp_start=32",
    ),
    (
        "batch.ramp_start=8 batch.ramp_increment=16 batch.ramp_samples=100", None,
        "batch.ramp_increment=16 does not divide batch.global_batch_size=32 - batch.ramp_start=8 = 24; use 12 or 24",
        "batch.ramp_increment=12",
    ),
    (
        "batch.ramp_start=8 batch.ramp_increment=6 batch.ramp_samples=100", None,
        "batch.ramp_increment=6 is not a multiple of batch.micro_batch_size=4; use 4 or 8",
        "batch.ramp_increment=8",
    ),
    (
        "lr_schedule.warmup_steps=100", None,
        "lr_schedule.warmup_steps=100 is not below lr_schedule.decay_steps=100; use at most 99, more steps, "
        'or lr_schedule.kind="constant"',
        "lr_schedule.warmup_steps=99",
    ),
    (
        "lr_schedule.decay_from_step=100", None,
        "lr_schedule.decay_from_step=100 is not below lr_schedule.decay_until_step=100 (or train.steps)",
        "lr_schedule.decay_from_step=99",
    ),
    (
        "lr_schedule.decay_until_step=90", None,
        "lr_schedule.decay_until_step=90 is not read without lr_schedule.decay_from_step; write it too",
        "lr_schedule.decay_from_step=0",
    ),
    (
        "lr_schedule.kind=wsd lr_schedule.warmup_steps=50 lr_schedule.wsd_decay_steps=60", None,
        "lr_schedule.warmup_steps=50 + lr_schedule.wsd_decay_steps=60 = 110 is above lr_schedule.decay_steps=100; "
        "use lr_schedule.wsd_decay_steps=50 or less",
        "lr_schedule.wsd_decay_steps=50",
    ),
    (
        "precision.fp8=tensorwise precision.dtype=fp16", None,
        'precision.fp8="tensorwise" rounds bf16 values, but precision.dtype="fp16"; use precision.dtype="bf16", '
        'or precision.fp8="none"',
        "precision.dtype=bf16",
    ),
    (
        "precision.fp8=tensorwise run.device=cpu", None,
        'precision.fp8="tensorwise" needs a GPU of compute capability 8.9 or above, but run.device="cpu"; use "cuda", '
        'or precision.fp8="none"',
        "run.device=cuda",
    ),
    (
        "precision.fp8=tensorwise parallel.tp=2 overlap.tensor_parallel_chunks=2 model.ffn_hidden_size=704", None,
        'precision.fp8="tensorwise" scales whole products, but overlap.tensor_parallel_chunks=2 cuts them; use 1, '
        'or precision.fp8="none"',
        "parallel.tp=1",  # one rank cuts nothing
    ),
    (
        "precision.fp8=tensorwise model.ffn_hidden_size=680", None,
        'precision.fp8="tensorwise" multiplies only sizes that are multiples of 16, but model.ffn_hidden_size / '
        'parallel.tp = 680; use those, or precision.fp8="none"',
        "model.ffn_hidden_size=672",
    ),
    (
        "precision.fp8=tensorwise parallel.tp=2 model.head_dim=4 batch.micro_batch_size=1 batch.seq_length=24", None,
        'precision.fp8="tensorwise" multiplies only sizes that are multiples of 16, but batch.micro_batch_size x '
        "batch.seq_length = 24, model.ffn_hidden_size / parallel.tp = 344, model.num_heads x model.head_dim / "
        "parallel.tp = 8, the width of queries, keys and values / parallel.tp = 24; use those, "
        'or precision.fp8="none"',
        "precision.fp8=none",
    ),
    (  # each of the four has a copy of a key/value head: (2 + 2 x 1) x 4 is a multiple
        "precision.fp8=tensorwise parallel.tp=4 model.num_heads=8 model.num_kv_heads=2 model.head_dim=4 "
        "model.ffn_hidden_size=704", 4,
        'precision.fp8="tensorwise" multiplies only sizes that are multiples of 16, but model.num_heads x '
        'model.head_dim / parallel.tp = 8; use those, or precision.fp8="none"',
        "precision.fp8=none",
    ),
    (
        "checkpoint.weights_from=/w checkpoint.resume=must", None,
        'checkpoint.weights_from="/w" begins at step 0, but checkpoint.resume="must" wants to go on; remove one, '
        'or use checkpoint.resume="auto" (go on if there is a checkpoint, else start so)',
        "checkpoint.resume=auto",
    ),
    (
        "run.min_replicas=2", None,
        "run.min_replicas=2 does nothing without replacements in place; write run.max_replacements=20, say, or leave "
        "it out",
        "run.max_replacements=20",
    ),
    (
        "run.min_replicas=5 run.max_replacements=20 parallel.tp=2", 8,
        "run.min_replicas=5, but 8 ranks are dp=4 replicas (ranks / (tp x pp)); write run.min_replicas=3 to go on "
        "without one of them",
        "run.min_replicas=4",
    ),
    (
        "run.min_replicas=2 run.max_replacements=20 parallel.tp=2", 2,
        "run.min_replicas=2, but 2 ranks are dp=1 replicas (ranks / (tp x pp)); leave it out",
        "run.min_replicas=0",
    ),
    (
        "checkpoint.keep_every=50", None,
        "checkpoint.keep_every=50 keeps nothing while checkpoint.interval=0 saves only at the end; "
        "use checkpoint.interval=50 or a divisor of it",
        "checkpoint.interval=25",
    ),
    (
        "checkpoint.keep_every=50 checkpoint.interval=20", None,
        "checkpoint.keep_every=50 is not a multiple of checkpoint.interval=20; use 40 or 60",
        "checkpoint.keep_every=60",
    ),
    (
        "data.synthetic=false", None,
        "data.train is empty; write data.train=PREFIX (of PREFIX.bin and PREFIX.idx), or data.synthetic=true",
        "data.train=corpus",
    ),
    (
        "eval.tasks=['a.jsonl']", None,
        'eval.tasks=["a.jsonl"] are texts, and data.tokenizer is none; write data.tokenizer=FILE',
        "data.tokenizer=t.model",
    ),
    (
        "eval.tasks_interval=5", None,
        'eval.tasks_interval=5 but eval.tasks is empty; write eval.tasks=["FILE.jsonl"], or leave it out',
        "eval.tasks_interval=0",
    ),
    (
        "data.synthetic=false data.train=a eval.interval=10", None,
        "eval.interval=10 but data.valid is empty; write data.valid=PREFIX, or eval.interval=0",
        "data.valid=b",
    ),
    (
        "data.mixture_schedule=[{step=5,weights={a=1}}]", None,
        "data.synthetic=true leaves data.mixture_schedule=[{step = 5, weights = {a = 1.0}}] unread; leave one of them "
        "out",
        "data.mixture_schedule=[]",
    ),
    (
        "data.document_mask=true", None,
        "data.synthetic=true leaves data.document_mask=true unread; leave one of them out",
        "data.document_mask=false",
    ),
    (
        "data.synthetic=false data.train=['x/a','y/a']", None,
        'data.train[1] is the second source called "a"; give it another name: {path = "y/a", name = "a-2"}',
        "data.train=['x/a',{path='y/a',name='a-2'}]",
    ),
    (
        "data.synthetic=false data.train=a data.valid=['v','v.bin']", None,
        'data.valid[1] is the second source called "v"; give it another name: {path = "v.bin", name = "v-2"}',
        "data.valid=v",
    ),
    (
        "data.synthetic=false data.train=[{path='a',documents=[0.9,0.1]}]", None,
        "data.train[0].documents=[0.9, 0.1] is no part of 0 to 1; write for example [0.0, 0.98]",
        "data.train=[{path='a',documents=[0.1,0.9]}]",
    ),
    (
        "data.synthetic=false data.train=a data.test=[{path='a',documents=[0,1.5]}]", None,
        "data.test[0].documents=[0.0, 1.5] is no part of 0 to 1; write for example [0.0, 0.98]",
        "data.test=[{path='a',documents=[0,1]}]",
    ),
    (
        "data.synthetic=false data.train=a data.test=[{path='b',weight=2}]", None,
        "data.test[0] has a weight or max_epochs, but is read alone and once; leave them out",
        "data.test=b",
    ),
    (
        "data.synthetic=false data.train=a data.on_exhausted=stop", None,
        'data.on_exhausted="stop" without any max_epochs; write train = [{path = "...", max_epochs = 2.0}]',
        "data.train={path='a',max_epochs=2}",
    ),
    (
        "data.synthetic=false data.train={path='a',weight=0}", None,
        "data.train has only weights of 0; write a weight above 0 for at least one source",
        "data.train=a",
    ),
    (
        "data.synthetic=false data.train=['a',{path='b',weight=0}]", None,
        'data.train gives "b" the weight 0, and no data.mixture_schedule raises it; leave it out, or write '
        "data.mixture_schedule=[{step = 1000, weights = {b = 1.0}}]",
        "data.mixture_schedule=[{step=9,weights={b=1}}]",
    ),
    (
        "data.synthetic=false data.train=['books','code'] data.mixture_schedule=[{step=9,weights={boks=1}}]", None,
        'data.mixture_schedule[0] gives a weight to "boks", which data.train does not have; did you mean "books"?',
        "data.mixture_schedule=[{step=9,weights={books=1}}]",
    ),
    (
        "data.synthetic=false data.train=['books','code'] data.mixture_schedule=[{step=9,weights={xyz=1}}]", None,
        'data.mixture_schedule[0] gives a weight to "xyz", which data.train does not have; its sources are "books" or '
        '"code"',
        "data.mixture_schedule=[]",
    ),
    (
        "data.synthetic=false data.train=a data.mixture_schedule=[{step=1,weights={a=2}}]", None,
        "data.mixture_schedule[0].step=1 is too early; use at least 2, as step 1 has the weights of data.train",
        "data.mixture_schedule=[{step=2,weights={a=2}}]",
    ),
    (
        "data.synthetic=false data.train=a data.mixture_schedule=[{step=9,weights={a=2}},{step=9,weights={a=3}}]", None,
        "data.mixture_schedule[1].step=9 is too early; use at least 10, later than the one before",
        "data.mixture_schedule=[{step=9,weights={a=2}},{step=10,weights={a=3}}]",
    ),
    (
        "data.synthetic=false data.train=a data.mixture_schedule=[{step=9,weights={a=0}}]", None,
        "data.mixture_schedule[0] leaves no source a weight above 0; give one to at least one source",
        "data.mixture_schedule=[]",
    ),
]  # fmt: skip


@pytest.mark.parametrize("overrides,ranks,message,remedy", CASES, ids=[c[0] for c in CASES])
def test_rule(overrides: str, ranks: int | None, message: str, remedy: str) -> None:
    wrong = ["data.synthetic=true", *overrides.split()]
    with pytest.raises(ConfigError) as caught:
        load(None, wrong, ranks=ranks)
    assert str(caught.value).removeprefix("command line: ") == message
    load(None, [*wrong, *remedy.split()], ranks=ranks)


def test_ramp_start_of_another_size() -> None:
    wrong = ["data.synthetic=true", "batch.ramp_start=10", "batch.ramp_increment=22", "batch.ramp_samples=100"]
    with pytest.raises(ConfigError) as caught:
        load(None, [*wrong, "batch.micro_batch_size=2"], ranks=2)
    unit = "batch.micro_batch_size=2 x dp=2 (ranks / (tp x pp)) = 4"
    assert str(caught.value).split("\n") == [
        "2 problems in the configuration:",
        f"  - command line: batch.ramp_start=10 is not a multiple of {unit}; use 8 or 12, or batch.uneven=true",
        f"  - command line: batch.ramp_increment=22 is not a multiple of {unit}; use 20 or 24, or batch.uneven=true",
    ]


def test_what_is_legal() -> None:
    for overrides in (
        "model.vocab_size=61 parallel.tp=4",  # padded in memory
        "model.vocab_size=3 parallel.tp=4",
        "model.num_kv_heads=1 parallel.tp=4",  # replicated
        "parallel.pp=8 batch.global_batch_size=4",  # stages without layers, one micro-batch
        "parallel.pp=2 parallel.stage_layers=[4,0]",
        "parallel.pp=3 parallel.chunks=2 parallel.schedule=gpipe batch.global_batch_size=8",
        "model.head_dim=128",  # heads need not add up to the hidden size
        "lr_schedule.kind=constant lr_schedule.warmup_steps=500",
        "lr_schedule.decay_steps=50",
        "optimizer.beta1=0.96",  # above beta2: a choice
        "batch.seq_length=33 batch.micro_batch_size=1 parallel.tp=4 parallel.sequence_parallel=false",
        "checkpoint.weights_from=/w checkpoint.resume=fresh",
    ):
        load(None, ["data.synthetic=true", *overrides.split()])


def test_defaults_need_only_data() -> None:
    assert [m.split(";")[0] for m in check(load(None, [], need_data=False))] == ["data.train is empty"]
    assert check(load(None, [], need_data=False), 4, need_data=False) == []


def test_helpers() -> None:
    config = load(None, ["model.preset=llama3-8b", "parallel.tp=2", "parallel.pp=2"], need_data=False)
    assert legal_tp(config.model) == [1, 2, 4, 8, 16, 32]
    ramp = Config.model_validate({"batch": {"ramp_start": 8, "ramp_increment": 12, "ramp_samples": 9}}).batch
    assert ramp.sizes == (8, 20, 32)
    assert Config().batch.sizes == (32,)
