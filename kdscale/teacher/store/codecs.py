"""What a codec of a store does: the rows of the table are config.target_store.CODECS, each with a file here.

N rows, one a position with a target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pkgutil import resolve_name
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kdscale.config.target_store import CodecConfig
from kdscale.errors import FileError
from kdscale.teacher.source import MicroBatch, SourceRequest
from kdscale.teacher.store.bits import Bytes
from kdscale.teacher.targets import Targets

Assemble = Callable[[Mapping[str, torch.Tensor], MicroBatch], Targets]


class Codec(Protocol):
    """Between the targets of rows and bytes."""

    row_bytes: float  # of a row, in the middle: for the disk check

    def encode(self, targets: Targets) -> Bytes:
        """The bytes of all rows."""

    def decode(self, packed: Bytes, rows: int) -> dict[str, NDArray[Any]]:
        """Arrays with a row for each of the `rows`. Raises FileError for bytes that are no such rows."""

    def assembler(self, request: SourceRequest, vocab_size: int) -> Assemble:
        """What makes targets from the arrays of `decode`, as tensors on the batch's device."""


def make_codec(settings: CodecConfig, vocab_size: int, hidden_size: int) -> Codec:
    """The codec of these settings for a teacher with so many rows in its head, of so many channels."""
    codec: Codec = resolve_name(settings.implementation)(settings, vocab_size, hidden_size)
    return codec


def to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """A tensor of any device, in its dtype."""
    array: NDArray[Any] = tensor.detach().cpu().contiguous().numpy()
    return array


def as_bytes(array: NDArray[Any]) -> Bytes:
    """The bytes of an array, in the order of its values, little-endian."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)


class Cursor:
    """Takes arrays off the front of a block's bytes."""

    def __init__(self, packed: Bytes):
        self._packed, self._at = packed, 0

    def bytes(self, count: int) -> Bytes:
        """The next `count` bytes. Raises FileError when there are fewer."""
        begin, self._at = self._at, self._at + count
        if self._at > self._packed.size:
            raise FileError("a block of stored targets", expected=f"{self._at:,} bytes", got=f"{self._packed.size:,}")
        return self._packed[begin : self._at]

    def array(self, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """The next array of this shape and little-endian dtype; a copy, as the bytes may not be aligned for it."""
        count = math.prod(shape) * np.dtype(dtype).itemsize
        return self.bytes(count).copy().view(dtype).reshape(shape)

    def end(self) -> None:
        """Raises FileError unless everything was taken."""
        if self._at != self._packed.size:
            raise FileError("a block of stored targets", expected=f"{self._at:,} bytes", got=f"{self._packed.size:,}")
