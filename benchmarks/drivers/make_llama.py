"""Write a Hugging Face folder of random bf16 weights: `make_llama.py FOLDER HIDDEN LAYERS HEADS KV_HEADS FFN VOCAB`.

Files of 1 GB, a few bytes of memory per tensor; the benchmarks of conversion read it.
"""

from __future__ import annotations

import json
import sys
from math import prod
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megallama.checkpoint.huggingface import model_files
from megallama.checkpoint.manifest import file_set
from megallama.config.schema import BatchConfig, Config, ModelConfig, PrecisionConfig
from megallama.plan.params import global_shapes


def main() -> None:
    """Write it."""
    folder, (h, layers, n, k, f, v) = Path(sys.argv[1]), map(int, sys.argv[2:])
    model = ModelConfig(
        hidden_size=h, num_layers=layers, num_heads=n, num_kv_heads=k, head_dim=h // n, ffn_hidden_size=f, vocab_size=v
    )
    config = Config(model=model, precision=PrecisionConfig(dtype="bf16"), batch=BatchConfig(seq_length=2048))
    files = file_set("model", global_shapes(model), "BF16", 1_000_000_000)
    folder.mkdir(parents=True)
    for name, data in (model_files(config, None) | {"model.safetensors.index.json": files.index()}).items():
        (folder / name).write_bytes(data)
    for name, header in files.headers.items():
        (folder / name).write_bytes(header)
    generator = torch.Generator().manual_seed(1)
    for name, place in files.places.items():
        values = torch.randn(place.shape, generator=generator) * 0.02 + ("norm" in name)
        with (folder / place.file).open("r+b") as out:
            out.seek(place.offset)
            out.write(values.bfloat16().view(torch.uint8).numpy().data)
    print(json.dumps({"largest": max(prod(p.shape) * p.item_bytes for p in files.places.values())}))


if __name__ == "__main__":
    main()
