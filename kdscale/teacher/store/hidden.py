"""The codec `hidden`: what enters the teacher's head, from which the head rebuilds every logit at any temperature.

int8 and float8 (e4m3) are scaled by each row's largest value.

N rows, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdscale.config.target_store import HiddenConfig
from kdscale.models.skeleton import load_head
from kdscale.teacher.head_targets import TargetsFromHead
from kdscale.teacher.source import MicroBatch, SourceRequest
from kdscale.teacher.store.bits import Bytes
from kdscale.teacher.store.codecs import Assemble, Cursor, as_bytes, to_numpy
from kdscale.teacher.targets import Targets

# the dtype on disk, and the largest value that a row is scaled to; None: no scale
_TYPES: dict[str, tuple[torch.dtype, float | None]] = {
    "int8": (torch.int8, 127.0),
    "float8": (torch.float8_e4m3fn, 448.0),
    "bfloat16": (torch.bfloat16, None),
    "float32": (torch.float32, None),
}


class HiddenCodec:
    """Rows of H values, and their scales."""

    def __init__(self, settings: HiddenConfig, vocab_size: int, hidden_size: int):
        self._hidden = hidden_size
        self._dtype, self._largest = _TYPES[settings.dtype]
        self.row_bytes = hidden_size * self._dtype.itemsize + (4 if self._largest else 0)

    def encode(self, targets: Targets) -> Bytes:
        """The scales first."""
        assert targets.full is not None
        hidden_NH = targets.full.hidden_NG.float()
        scales = []
        if self._largest is not None:
            scale_N1 = hidden_NH.abs().amax(1, keepdim=True).clamp_min(1e-30) / self._largest
            hidden_NH = hidden_NH / scale_N1
            hidden_NH = hidden_NH.round() if self._dtype == torch.int8 else hidden_NH
            scales = [as_bytes(to_numpy(scale_N1))]
        stored = hidden_NH.to(self._dtype).contiguous().view(torch.uint8)
        return np.concatenate([*scales, to_numpy(stored).reshape(-1)])

    def decode(self, packed: Bytes, rows: int) -> dict[str, NDArray[Any]]:
        """`hidden`, as bytes [N, H · itemsize], and `scale`, which is one where nothing was scaled."""
        take = Cursor(packed)
        scale_N1 = take.array((rows, 1), "<f4") if self._largest is not None else np.ones((rows, 1), np.float32)
        stored = take.array((rows, self._hidden * self._dtype.itemsize), "<u1")
        take.end()
        return {"hidden": stored, "scale": scale_N1}

    def assembler(self, request: SourceRequest, vocab_size: int) -> Assemble:
        """Everything that the head gives; of the teacher, the head alone is loaded."""
        trust = request.cfg.teacher.trust_remote_code
        head = load_head(request.teacher_dir, dtype=request.dtype, device=request.device, trust_remote_code=trust)
        from_head = TargetsFromHead(request.needs, vocab_size, request.cfg.seed)

        @torch.no_grad()
        def assemble(arrays: Mapping[str, torch.Tensor], batch: MicroBatch) -> Targets:
            hidden_NH = arrays["hidden"].view(self._dtype)
            if self._largest is not None:
                hidden_NH = hidden_NH.float() * arrays["scale"]
            return from_head(hidden_NH.to(request.dtype), head, batch)

        return assemble
