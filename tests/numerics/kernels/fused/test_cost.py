"""What the ops cost on a CPU with bf16 instructions, counted instead of timed: products, and passes over the logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kdscale_kernels as kk
from kdscale_kernels.c_kernels.steps import CompiledBf16Steps

ROWS, HIDDEN, VOCAB, ENTRIES = 256, 64, 16_400, 16
PRODUCT = 2 * ROWS * HIDDEN * VOCAB
LOGITS = 2 * ROWS * VOCAB  # bytes, in bf16
PRODUCTS = ("mm", "addmm", "addmm_")


class Model(NamedTuple):
    hidden_NH: Tensor
    weight_VH: Tensor
    targets: tuple[Tensor, Tensor, Tensor]
    labels_N: Tensor


@pytest.fixture(scope="module")
def model() -> Model:
    gen = torch.Generator().manual_seed(0)
    weight_VH = (torch.randn(VOCAB, HIDDEN, generator=gen) * 0.5).bfloat16()
    teacher_NH = torch.randn(ROWS, HIDDEN, generator=gen)
    student_NH = (teacher_NH + 0.3 * torch.randn(ROWS, HIDDEN, generator=gen)).bfloat16()
    targets = kk.linear_topk_lse(teacher_NH.bfloat16(), weight_VH, ENTRIES, backend="torch")
    labels_N = torch.randint(0, VOCAB, (ROWS,), generator=gen)
    return Model(student_NH.requires_grad_(), weight_VH.requires_grad_(), targets, labels_N)


def student(model: Model, **options: Any) -> None:
    out = kk.linear_sparse_kl(
        model.hidden_NH, model.weight_VH, *model.targets, labels_N=model.labels_N, mode="vocab_slices", **options
    )
    out.loss_sum.backward()


def teacher(model: Model) -> None:
    kk.linear_topk_lse(model.hidden_NH, model.weight_VH, ENTRIES)


def scarce(model: Model) -> None:
    student(model, workspace_bytes=1 << 20)


class Traffic(TorchDispatchMode):
    """Bytes of logits, or of arrays as wide, that torch's operators read and write beside products and look-ups."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        free = (
            function.is_view or name in (*PRODUCTS, "gather", "index_put_") or name.startswith(("empty", "new_empty"))
        )
        arrays = {id(a): a for a in (*args, *(kwargs or {}).values(), out) if isinstance(a, Tensor)}
        wide = [] if free else [a for a in arrays.values() if a.dim() > 1 and a.shape[-1] >= 1000]
        self.bytes[name] += sum(a.numel() * a.element_size() for a in wide)
        return out


@contextmanager
def passes_in_c() -> Iterator[Counter[str]]:
    """Elements that each step in C was given, in multiples of the logits."""
    seen: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("exponentials", "scale", "candidates"):
            step = getattr(CompiledBf16Steps, name)

            def counted(self: Any, z_CV: Tensor, *args: Any, name: str = name, step: Any = step) -> Any:
                seen[name] += z_CV.numel() / (ROWS * VOCAB)
                return step(self, z_CV, *args)

            patch.setattr(CompiledBf16Steps, name, counted)
        yield seen


@pytest.mark.usefixtures("on_bf16_cpu")
@pytest.mark.parametrize(("call", "products"), [(teacher, 1), (student, 3), (scarce, 4)])
def test_products(model: Model, call: Callable[[Model], None], products: int) -> None:
    """One for the teacher, and three for the student's gradients: four where the slices cannot be kept."""
    with FlopCounterMode(display=False) as counter:
        call(model)
    assert products <= counter.get_total_flops() / PRODUCT < products + 0.1


# In multiples of bf16 logits, of which an fp32 copy is two.
@pytest.mark.parametrize(("call", "in_torch"), [(teacher, 6.5), (student, 21.0)])
def test_passes_over_the_logits(on_bf16_cpu: str, model: Model, call: Callable[[Model], None], in_torch: float) -> None:
    with Traffic() as traffic, passes_in_c() as in_c:
        call(model)
    limit = in_torch if on_bf16_cpu == "torch" else 0.1
    assert sum(traffic.bytes.values()) / LOGITS < limit, traffic.bytes.most_common(5)
    if on_bf16_cpu == "compiled":
        assert all(1.0 <= passes < 1.1 for passes in in_c.values()), in_c
        assert set(in_c) == ({"candidates"} if call is teacher else {"exponentials", "scale"})
