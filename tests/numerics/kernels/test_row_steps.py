"""The one place that picks an implementation of the row steps, and that every op takes its steps from there."""

from __future__ import annotations

import inspect

import pytest
import torch

import kdscale_kernels as kk
from kdscale_kernels.c_kernels.steps import CompiledBf16Steps
from kdscale_kernels.row_steps import ROW_STEPS, RowSteps, SliceSteps, row_steps
from kdscale_kernels.rows.bf16_steps import Bf16Steps
from kdscale_kernels.rows.torch_bf16 import TorchBf16Steps
from kdscale_kernels.rows.torch_slices import TorchSlices
from kdscale_kernels.rows.torch_steps import TorchRowSteps


def test_all_backends_have_the_same_steps():
    pytest.importorskip("triton", reason="triton is not installed (the dev extra installs it on Linux)")
    from kdscale_kernels.triton_kernels.slices import TritonSlices

    for protocol, implementations in (
        (RowSteps, [type(row_steps(b)) for b in ROW_STEPS]),
        (SliceSteps, [TorchSlices, TritonSlices]),
        (Bf16Steps, [TorchBf16Steps, CompiledBf16Steps]),
    ):
        names = [name for name, step in vars(protocol).items() if inspect.isfunction(step) and not name.startswith("_")]
        assert names
        for implementation, name in ((i, n) for i in implementations for n in names):
            given = inspect.signature(getattr(implementation, name)).parameters.keys() - {"self"}
            asked = inspect.signature(getattr(protocol, name)).parameters.keys() - {"self"}
            assert asked == given, (implementation, name)


def test_every_op_takes_its_steps_from_the_table(make_example, monkeypatch):
    """An implementation that is put into the table from outside is what the ops run."""
    calls = []

    class Counting(TorchRowSteps):
        def __getattribute__(self, name):
            if name in ("sparse", "full", "topk", "slices"):
                calls.append(name)
            return super().__getattribute__(name)

    monkeypatch.setitem(ROW_STEPS, "torch", Counting)
    p = make_example().cast(torch.float32)
    options = {"labels_N": p.labels}
    kk.linear_sparse_kl(p.hidden, p.weight, *p.targets, mode="row_chunks", **options)
    kk.linear_sparse_kl(p.hidden, p.weight, *p.targets, mode="vocab_slices", **options)
    kk.sparse_kl(p.hidden @ p.weight.T, *p.targets, **options)
    kk.linear_full_kl(p.hidden, p.weight, p.hidden, p.weight, **options)
    kk.linear_topk_lse(p.hidden, p.weight, 3)
    assert calls == ["sparse", "slices", "sparse", "full", "topk"]
