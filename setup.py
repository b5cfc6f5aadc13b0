"""Package metadata. `pip install .` is enough to train; the extras add what is not always wanted."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    # Fused kernels for NVIDIA GPUs, used where they are found. NVIDIA's apex is used too where it is found, but it is
    # not on the package index (the `apex` there is an unrelated web toolkit): build it from its source, or use a
    # container that has it.
    "gpu": ["transformer-engine[pytorch]==2.12.0"],
    # Preprocessing a corpus on many nodes. Training under mpirun needs neither.
    "mpi": ["mpi4py>=4", "mpich>=4"],
    # Preprocessing: .zst and Parquet inputs, and an encoder several times as fast as the reference ones.
    "data": ["zstandard>=0.23", "pyarrow>=17", "gigatoken>=0.10", "orjson>=3.10"],
    "plots": ["matplotlib>=3.9"],
    "test": [
        *("pytest>=8", "hypothesis>=6.100", "transformers>=4.50", "psutil", "ruff", "mypy"),
        *("matplotlib>=3.9", "mpi4py>=4", "mpich>=4", "zstandard>=0.23", "pyarrow>=17", "gigatoken>=0.10"),
        "orjson>=3.10",
    ],
}

setup(
    name="megallama",
    version="0.1.0",
    description="Pre-train LLaMA models from scratch in 3D parallel, on a laptop or on a cluster",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megallama", "megallama.*"]),
    package_data={"megallama.forecast": ["hardware.toml"]},
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "pydantic>=2.7",
        "rich>=13",
        "sentencepiece>=0.2",
        "protobuf>=4.25",
        "tokenizers>=0.19",
        "regex",
        "safetensors>=0.4",
        "tensorboard>=2.16",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megallama-pretrain = megallama.pretrain:main"]},
)
