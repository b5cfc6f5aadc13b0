"""Meta's .pth files: the one place where a pickle is read, by restricted unpickling, or written."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megallama.checkpoint import disk
from megallama.checkpoint.disk import CheckpointError, DamagedError
from megallama.checkpoint.manifest import DTYPES, TensorPlace

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class PthFile:
    """A .pth file that holds tensors by name and nothing else; they stay on disk until they are read.

    Raises: CheckpointError for anything else, which is not executed; DamagedError for a truncated or damaged file.
    """

    def __init__(self, path: Path) -> None:
        fd, size = disk.open_file(path)
        os.close(fd)
        try:
            found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # noqa: BLE001 - torch raises many types for damaged and for hostile files
            first = str(error).strip().split("\n")[0]
            if type(error).__name__ == "UnpicklingError":
                raise CheckpointError(
                    f"{path} is refused: its pickle asks for more than tensors, and loading it could run any program "
                    f"({first}); get the file from a source you trust as safetensors"
                ) from None
            raise DamagedError(f"{path} cannot be read as a .pth file of tensors: {first}") from error
        values = found.values() if isinstance(found, dict) else [None]
        plain = (t for t in values if isinstance(t, Tensor) and t.layout == torch.strided and t.device.type == "cpu")
        if sum(tensor.nbytes <= size for tensor in plain) < len(values):  # each must be in the file
            raise CheckpointError(f"{path} is not a file of tensors by name, as Meta's consolidated.NN.pth is")
        self._tensors: dict[str, Tensor] = found
        dtypes = {key: _NAMES.get(tensor.dtype, str(tensor.dtype)) for key, tensor in found.items()}
        self.places = {key: TensorPlace("", 0, tuple(t.shape), dtypes[key]) for key, t in found.items()}

    def read_rows(self, key: str, row: int, out: Tensor) -> None:
        """Fill `out` [n, ...] with rows `row` .. `row` + n - 1."""
        out.copy_(self._tensors[key][row : row + len(out)])

    def close(self) -> None:
        """Forget the file."""
        self._tensors = {}


def pack(raw: Path, places: Mapping[str, TensorPlace], path: Path) -> None:
    """Write the tensors of the safetensors file `raw` as a .pth file, one by one from its mapped pages.

    Raises: CheckpointError if it cannot be written, as on a full disk.
    """
    with raw.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as data:
        tensors = {
            key: torch.frombuffer(data, dtype=DTYPES[p.dtype], count=prod(p.shape), offset=p.offset).view(p.shape)
            for key, p in places.items()
        }
        try:
            torch.save(tensors, path)
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            raise CheckpointError(f"{path} cannot be written, is the disk full? {why}") from error
        finally:
            tensors.clear()
