"""Files of safetensors that are never whole in memory, written by one process or by several."""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from lightning_lowrank.models.basis_files import FORMAT

DTYPES = {"F32": torch.float32, "F64": torch.float64}


class Writer:
    """A file of safetensors that is never whole in memory; several processes may write to one.

    Args:
        path: To write to.
        keys: What there will be, as `layout` says.
        metadata: Words about it.
        begin: Make the file; otherwise another process did.

    Raises:
        ValueError: It cannot be written.
    """

    def __init__(
        self, path: Path, keys: Mapping[str, tuple[str, list[int]]], metadata: Mapping[str, str], *, begin: bool = True
    ) -> None:
        header: dict[str, object] = {"__metadata__": {**metadata, "format": FORMAT}}
        self._dtypes = {key: DTYPES[dtype] for key, (dtype, _) in keys.items()}
        ends, end = {}, 0
        for key, (dtype, shape) in keys.items():
            begins, end = end, end + prod(shape) * DTYPES[dtype].itemsize
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begins, end]}
            ends[key] = begins
        words = json.dumps(header).encode()
        words += b" " * (-len(words) % 8)
        self._begins = {key: 8 + len(words) + at for key, at in ends.items()}
        try:
            if begin:
                with path.open("wb") as file:
                    file.write(len(words).to_bytes(8, "little") + words)
                    file.truncate(8 + len(words) + end)
            self._file = path.open("r+b")
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error}") from error

    def write(self, key: str, values: Tensor, offset: int = 0) -> None:
        """Put flat values under a key, from some element on."""
        dtype = self._dtypes[key]
        self._file.seek(self._begins[key] + offset * dtype.itemsize)
        self._file.write(values.to(dtype).contiguous().flatten().view(torch.uint8).numpy().tobytes())

    def close(self) -> None:
        """Nothing more comes."""
        self._file.close()
