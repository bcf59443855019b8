"""A small distillation example, random or matched (the student a hair from its teacher)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kdscale_kernels import reference
from kdscale_kernels.fused import products


class Example(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    ids: Tensor
    logits: Tensor
    lse: Tensor
    labels: Tensor

    def cast(self, dtype: torch.dtype, *, grad: bool = True) -> Example:
        """Fresh leaves: what the student owns in dtype; the teacher's numbers in fp32 (fp64 for an fp64 student)."""
        own = [t.detach().to(dtype).clone().requires_grad_(grad) for t in (self.hidden, self.weight, self.bias)]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return Example(*own, self.ids, self.logits.to(wide), self.lse.to(wide), self.labels)

    @property
    def targets(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.ids, self.logits, self.lse


def _make(
    *,
    rows: int = 11,
    hidden: int = 24,
    vocab: int = 203,
    k: int = 7,
    noise: float | None = None,
    temperature: float = 1.0,
    spread: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **head: Any,
) -> Example:
    """noise None: teacher and student unrelated; else the student's hidden states are the teacher's plus noise."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype).double()

    weight, bias, teacher = normal(vocab, hidden) * spread, normal(vocab), normal(rows, hidden)
    weight, bias = weight.to(dtype).double(), bias.to(dtype).double()
    student = normal(rows, hidden) if noise is None else teacher + noise * normal(rows, hidden)
    student = student.to(dtype).double()
    use_bias = bias if head.pop("with_bias", False) else None
    top = reference.linear_topk_lse(teacher, weight, k, temperature=temperature, bias_V=use_bias, **head)
    labels = torch.randint(0, head.get("vocab_size") or vocab, (rows,), generator=gen)
    if rows > 3:
        labels[0] = top.ids_NK[0, 0]  # label inside the support
        labels[1] = (set(range(vocab)) - set(top.ids_NK[1].tolist())).pop() if k < vocab else 0  # and outside
        labels[3] = -100
    return Example(student, weight, bias, top.ids_NK, top.logits_NK, top.lse_N, labels)


@pytest.fixture(scope="session")
def make_example() -> Callable[..., Example]:
    return _make


def _mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    assert a.dtype == b.dtype == torch.bfloat16
    result = torch.matmul(a.float(), b.float()).to(out_dtype or a.dtype)
    return result if out is None else out.copy_(result)


def _addmm(c: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
    assert out is c
    return out.add_(_mm(a, b, out_dtype=out_dtype))


class _NativeHead(products.HeadProducts):
    def __init__(self, weight_VH: Tensor, bias_V: Tensor | None, operand: Any, accumulate: Any, vocab: int):
        super().__init__(weight_VH, bias_V, operand, accumulate, vocab)
        self.native, self.grad_dtype = True, operand


@pytest.fixture
def cuda_products(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, bool], Any]:
    """Within the block an op's module takes the CUDA route: the products that only CUDA has, by what they compute."""

    @contextmanager
    def replaced(op_module: Any, adds_in_place: bool) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "mm", _mm)
            patch.setattr(torch, "addmm", _addmm)
            patch.setattr(products, "_ADDMM_TAKES_FP32", adds_in_place)
            patch.setattr(op_module, "HeadProducts", _NativeHead)
            yield

    return replaced
