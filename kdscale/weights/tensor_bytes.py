"""Reads the bytes of tensors on disk, each straight into memory of its own.

The safetensors library would map the whole file privately instead, which the system refuses when the file is larger
than memory, and which crashes the process when the file shrinks meanwhile.
"""

from __future__ import annotations

import os
from io import RawIOBase
from typing import TYPE_CHECKING

from kdscale.errors import CheckpointError
from kdscale.weights.header import TensorEntry
from kdscale_launch.watchdog import beat

if TYPE_CHECKING:
    import torch


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that safetensors calls `name`."""
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
        "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    }[name]  # fmt: skip


def read_rows(entry: TensorEntry, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
    """Rows `first` to `last` (of the first dimension) of a tensor on disk, or all of it."""
    if not entry.shape:
        first, last = 0, None
    rows = entry.shape[0] if entry.shape else 1
    last = rows if last is None else last
    row_bytes = entry.nbytes // rows if rows else 0
    begin, end = entry.begin + first * row_bytes, entry.begin + last * row_bytes
    with entry.file.open("rb", buffering=0) as stream:
        values = read_values(stream, entry, name, begin, end)
    return values.reshape((last - first, *entry.shape[1:]) if entry.shape else ())


def read_ahead(stream: RawIOBase, begin: int, size: int) -> None:
    """Let the system fetch these bytes while the caller works on those before them."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(stream.fileno(), begin, size, os.POSIX_FADV_WILLNEED)


def read_values(stream: RawIOBase, entry: TensorEntry, name: str, begin: int, end: int) -> torch.Tensor:
    """Read bytes begin:end of the tensor's file as one flat tensor of its dtype."""
    import torch

    raw = torch.empty(end - begin, dtype=torch.uint8)
    read_into(stream, entry, name, begin, raw)
    return raw.view(torch_dtype(entry.dtype))


def read_into(stream: RawIOBase, entry: TensorEntry, name: str, begin: int, out: torch.Tensor) -> None:
    """Fill the flat, contiguous `out` with the bytes that start at `begin`."""
    import torch

    beat()
    stream.seek(begin)
    view, count = out.view(torch.uint8).numpy().data, 0
    while count < len(view) and (more := stream.readinto(view[count:])):  # one read gives at most 2 GiB
        count += more
        beat()
    if count != len(view):
        raise CheckpointError(
            f"{entry.file} was changed while it was open: tensor {name} is cut short",
            expected=f"{len(view):,} bytes",
            got=f"{count:,} bytes",
        )
