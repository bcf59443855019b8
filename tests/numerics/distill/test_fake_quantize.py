"""Layers on a grid: values and gradients beside an fp64 twin that autograd differentiates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdscale.config.distill.optimizer import FakeQuantizeConfig
from kdscale.distill.layers.fake_quantize import GridLinear
from kdscale.weights.integer_grid import IntegerGrid

GRID = IntegerGrid(4, 32)


def layer(bias: bool, dtype: torch.dtype, stored: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    module = nn.Linear(96, 40, bias=bias, dtype=dtype)
    module.__class__ = GridLinear
    module.grid, module.stored = GRID, stored
    return module


def twin(module: nn.Linear, x: torch.Tensor, stored: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output and gradients in fp64, with w + (Q(w) − w) whose second term has no gradient."""
    weight = module.weight.detach().double().requires_grad_()
    quantised = GRID.nearest(module.weight.detach(), stored).double()
    bias = None if module.bias is None else module.bias.detach().double().requires_grad_()
    x = x.detach().double().requires_grad_()
    out = nn.functional.linear(x, weight + (quantised - weight).detach(), bias)
    out.square().sum().backward()
    grads = {"x": x.grad, "weight": weight.grad, **({} if bias is None else {"bias": bias.grad})}
    return out.detach(), grads


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_the_twins(bias: bool, dtype: torch.dtype, error: float) -> None:
    module = layer(bias, dtype, torch.bfloat16)
    x = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    out = module(x)
    out.square().sum().backward()
    wanted, grads = twin(module, x, torch.bfloat16)
    found = {"x": x.grad, **{name: value.grad for name, value in module.named_parameters()}}
    assert grads.keys() == found.keys()
    for got, want in ((out, wanted), *((found[name], grads[name]) for name in grads)):
        assert got.dtype == dtype
        assert float((got.detach().double() - want).abs().max() / want.abs().max()) < error


def test_the_weight_has_its_gradient_where_the_grid_has_none() -> None:
    """Without a straight-through estimator every gradient of a weight would be zero, and nothing would be learnt."""
    module = layer(False, torch.float32, torch.float32)
    loss = lambda: (module(torch.eye(96)) - 1.0).square().sum()  # noqa: E731
    before = float(loss().detach())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2)
    for _ in range(30):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert float(loss().detach()) < 0.05 * before


def test_settings_describe_the_grid() -> None:
    settings = FakeQuantizeConfig(bits=8, group=None)
    assert IntegerGrid(settings.bits, settings.group).most == 127
