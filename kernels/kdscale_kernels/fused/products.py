"""Matrix products with fp32 results, and the row chunks they are made in.

Legend: N rows, C rows of one chunk, H hidden size, V vocabulary.

A bf16 product on a CPU rounds its result to bf16, which ruins distillation gradients once the student is near its
teacher (figures: docs/explanation/measured-kernels.md). oneDNN can instead take fp32 operands, with leave to multiply
them as bf16, and keep the fp32 sums: on operands that came from bf16 this is exact and never slower than the plain fp32
product. The gradient products round dz to bf16, as any bf16 training step does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from kdscale_kernels.types import integer

# By device type. A CUDA device wants thousands of rows a chunk, since each chunk reads and writes all of an fp32 dW.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}


def chunk_bytes_for(chunk_bytes: int | None, device: torch.device) -> int:
    """The caller's budget for a chunk of logits, or the device's usual one. Raises ValueError for less than a byte."""
    usual = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"])
    return usual if chunk_bytes is None else integer("chunk_bytes", chunk_bytes, 1)


def row_chunks(rows: int, vocab: int, chunk_bytes: int, *, buffers: int = 1, item_bytes: int = 4) -> list[slice]:
    """Slices covering `rows`, nearly equal, each within chunk_bytes for `buffers` arrays [slice, vocab] (>= 1 row)."""
    if rows == 0:
        return []
    most = max(1, chunk_bytes // (vocab * item_bytes * buffers))
    count = -(-rows // most)
    size = -(-rows // count)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def compute_dtypes(*tensors: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """(operand dtype, accumulation dtype). Under autocast the operands take its dtype, as nn.Linear's would."""
    operand = tensors[0].dtype
    for tensor in tensors[1:]:
        operand = torch.promote_types(operand, tensor.dtype)
    device = tensors[0].device.type
    if operand != torch.float64 and torch.is_autocast_enabled(device):
        operand = torch.get_autocast_dtype(device)
    return operand, torch.float64 if operand == torch.float64 else torch.float32


@contextmanager
def _bf16_inside(enabled: bool) -> Iterator[None]:
    """Let oneDNN multiply fp32 operands as bf16 within the block. The setting is process-wide, so it is restored."""
    setting: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if not enabled or not hasattr(setting, "fp32_precision"):  # torch < 2.9: plain fp32, slower and no less exact
        yield
        return
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


@cache
def _cpu_has_bf16() -> bool:
    """Whether oneDNN multiplies bf16 on this CPU; elsewhere torch's own bf16 product is far slower than fp32."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _is_native(device: torch.device, operand: torch.dtype) -> bool:
    """Whether the library gives fp32 results for operands of two bytes."""
    half = operand in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and half and gives_fp32_results()


def gives_fp32_results() -> bool:
    """Whether this torch has products of bf16 with fp32 results on a GPU (2.8); without, both factors become fp32."""
    return hasattr(torch.ops.aten.mm, "dtype_out")


def bf16_logits_are_fast(device: torch.device, operand: torch.dtype) -> bool:
    """Whether bf16 products with bf16 results take half the time here of those with fp32 results."""
    return device.type == "cpu" and operand == torch.bfloat16 and _cpu_has_bf16()


def grad_dtype_for(device: torch.device, operand: torch.dtype, accumulate: torch.dtype) -> torch.dtype:
    """The dtype in which the gradient products take dz."""
    return operand if _is_native(device, operand) or bf16_logits_are_fast(device, operand) else accumulate


# Before, addmm(out_dtype=fp32) wanted its addend in the operands' dtype (pytorch pull request 167931).
_ADDMM_TAKES_FP32 = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)


class HeadProducts:
    """A language-model head, or some of its rows, ready for chunked products.

    On CUDA the operands stay as they are and the library is asked for fp32 results. On a CPU the logits need a bf16 or
    fp16 weight as fp32 (4·V·H bytes, from the first `logits` on); the gradient products take bf16 as it is where
    oneDNN multiplies it, at twice the speed: what they round is the result.
    """

    def __init__(
        self, weight_VH: Tensor, bias_V: Tensor | None, operand: torch.dtype, accumulate: torch.dtype, vocab: int
    ):
        self.operand, self.accumulate = operand, accumulate
        self.native = _is_native(weight_VH.device, operand)
        self.bf16_inside = operand == torch.bfloat16 and weight_VH.device.type == "cpu"
        self.grad_dtype = grad_dtype_for(weight_VH.device, operand, accumulate)
        self.given_VH = weight_VH.detach()[:vocab]
        self.bias_V = None if bias_V is None else bias_V.detach()[:vocab].to(accumulate)

    @cached_property
    def weight_VH(self) -> Tensor:  # noqa: N802
        """The head as an operand of `logits`."""
        return self.cast(self.given_VH)

    def cast(self, tensor: Tensor) -> Tensor:
        """A tensor as an operand. On a CPU fp32 -> bf16 is left to the product, which rounds alike without a copy."""
        if self.native:
            return tensor.to(self.operand)
        if self.operand == torch.float16 and tensor.dtype == torch.float32:
            tensor = tensor.to(torch.float16)
        return tensor.to(self.accumulate)

    def logits(self, hidden_CH: Tensor, out_CV: Tensor) -> Tensor:
        """hidden · weightᵀ + bias with fp32 sums, in out_CV; hidden_CH is what `cast` gives."""
        if self.native:
            torch.mm(hidden_CH, self.weight_VH.T, out_dtype=self.accumulate, out=out_CV)
        else:
            with _bf16_inside(self.bf16_inside):
                torch.mm(hidden_CH, self.weight_VH.T, out=out_CV)
        return out_CV if self.bias_V is None else out_CV.add_(self.bias_V)

    def grad_hidden(self, dz_CV: Tensor) -> Tensor:
        """dz · weight [C,H], in grad_dtype or the accumulation dtype."""
        dz_CV = dz_CV.to(self.grad_dtype)
        if self.native:
            return torch.mm(dz_CV, self.weight_VH, out_dtype=self.accumulate)
        if self.grad_dtype == self.operand:
            return torch.mm(dz_CV, self.given_VH.to(self.operand))
        with _bf16_inside(self.bf16_inside):
            return torch.mm(dz_CV, self.weight_VH)

    def add_grad_hidden(self, dz_CV: Tensor, into_CH: Tensor) -> None:
        """into += dz · weight, in the accumulation dtype; on CUDA without an array of the product."""
        if self.native and _ADDMM_TAKES_FP32:
            dz_CV = dz_CV.to(self.operand)
            torch.addmm(into_CH, dz_CV, self.weight_VH, out_dtype=self.accumulate, out=into_CH)
        else:
            into_CH.add_(self.grad_hidden(dz_CV))

    def grad_weight(self, dz_CV: Tensor, hidden_CH: Tensor, out_VH: Tensor, *, first: bool) -> None:
        """out = dzᵀ · hidden (out += for later blocks of rows), rounded to out's dtype each time."""
        if dz_CV.dtype == self.grad_dtype == self.operand == out_VH.dtype:
            hidden_CH = hidden_CH.to(self.operand)
            if first:
                torch.mm(dz_CV.T, hidden_CH, out=out_VH)
            else:
                out_VH.addmm_(dz_CV.T, hidden_CH)
            return
        if self.native:
            product_VH = torch.mm(dz_CV.T.to(self.operand), hidden_CH.to(self.operand), out_dtype=self.accumulate)
        else:
            with _bf16_inside(self.bf16_inside):
                product_VH = torch.mm(dz_CV.T.to(self.accumulate), self.cast(hidden_CH))
        out_VH.copy_(product_VH if first else product_VH.add_(out_VH))

    def add_grad_weight(self, dz_CV: Tensor, hidden_CH: Tensor, into_VH: Tensor, *, first: bool) -> None:
        """into += dzᵀ · hidden (into = for the first chunk), summed in the accumulation dtype."""
        if self.native:
            dz_VC = dz_CV.T.to(self.operand)
            if first:
                torch.mm(dz_VC, hidden_CH, out_dtype=self.accumulate, out=into_VH)
            elif _ADDMM_TAKES_FP32:
                torch.addmm(into_VH, dz_VC, hidden_CH, out_dtype=self.accumulate, out=into_VH)
            else:
                into_VH.add_(torch.mm(dz_VC, hidden_CH, out_dtype=self.accumulate))
            return
        with _bf16_inside(self.bf16_inside):
            if first:
                torch.mm(dz_CV.T, hidden_CH, out=into_VH)
            else:
                into_VH.addmm_(dz_CV.T, hidden_CH)


class GradientSums:
    """The sums of a loss's gradients over chunks of rows, in the accumulation dtype, for the inputs that want one."""

    def __init__(
        self, hidden_NH: Tensor, weight_VH: Tensor, wants_grad: tuple[bool, ...], head: HeadProducts, rows: int
    ):
        """wants_grad: of hidden, weight, bias; rows: how many will be added in all."""
        dtype, vocab = head.accumulate, head.given_VH.shape[0]
        self.head, self.first = head, True
        self.hidden_NH = hidden_NH.new_zeros(hidden_NH.shape, dtype=dtype) if wants_grad[0] else None
        self.weight_VH: Tensor | None = None
        if wants_grad[1] and rows:  # the first chunk writes, later ones add: no pass over V·H to clear it
            self.weight_VH = hidden_NH.new_empty(weight_VH.shape, dtype=dtype)
            self.weight_VH[vocab:] = 0.0
        elif wants_grad[1]:
            self.weight_VH = hidden_NH.new_zeros(weight_VH.shape, dtype=dtype)
        self.bias_V = hidden_NH.new_zeros(weight_VH.shape[:1], dtype=dtype) if wants_grad[2] else None

    def add(self, dz_CV: Tensor, hidden_CH: Tensor, rows_C: Tensor) -> None:
        """Add a chunk's gradients, given dz and the hidden states as an operand."""
        if self.hidden_NH is not None:
            self._place_hidden(self.head.grad_hidden(dz_CV).to(self.hidden_NH.dtype), rows_C)
        self._add_head(dz_CV, hidden_CH)

    def _place_hidden(self, grad_CH: Tensor, rows_C: Tensor) -> None:
        """Store a chunk's dX."""
        if self.hidden_NH is not None:
            self.hidden_NH[rows_C] = grad_CH

    def _add_head(self, dz_CV: Tensor, hidden_CH: Tensor) -> None:
        vocab = self.head.given_VH.shape[0]
        if self.weight_VH is not None:
            self.head.add_grad_weight(dz_CV, hidden_CH, self.weight_VH[:vocab], first=self.first)
            self.first = False
        if self.bias_V is not None:
            self.bias_V[:vocab] += dz_CV.sum(0, dtype=self.bias_V.dtype)
