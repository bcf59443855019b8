"""The average of the student's weights: what it is after some steps, in any dtype, and out of a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdscale.models.parameter_map import ParameterRange
from kdscale.teacher.own_weights import StudentAverage

STEPS, DECAY = 5, 0.9


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).to(dtype)


def walk(student: nn.Module, step: int) -> None:
    torch.manual_seed(step)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter.float()).to(parameter.dtype) * 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_weighted_sum_of_all_weights_so_far(dtype: torch.dtype) -> None:
    """In fp32 also where the model computes in bf16: a step of a thousandth is less than bf16 can add."""
    student, average = model(dtype), StudentAverage(model(dtype), DECAY)
    expected = {name: parameter.detach().double() for name, parameter in student.named_parameters()}
    for step in range(STEPS):
        walk(student, step)
        average.follow(student)
        for name, parameter in student.named_parameters():
            expected[name] = DECAY * expected[name] + (1 - DECAY) * parameter.detach().double()
    for name, parameter in average.model.named_parameters():
        values = average.values(ParameterRange(name, 0, parameter.numel())).view_as(parameter)
        torch.testing.assert_close(values.double(), expected[name], rtol=1e-6, atol=1e-6)
        assert torch.equal(parameter.data, values.to(dtype))
        assert values.dtype == torch.float32


def test_a_checkpoint_has_every_bit_of_it() -> None:
    student, average = model(torch.bfloat16), StudentAverage(model(torch.bfloat16), DECAY)
    walk(student, 1)
    average.follow(student)
    restored = StudentAverage(model(torch.bfloat16), DECAY)
    restored.load(lambda span, out: out.copy_(average.values(span)))
    for name, parameter in average.model.named_parameters():
        halves = ParameterRange(name, 1, parameter.numel() - 1)
        assert torch.equal(restored.values(halves), average.values(halves))
        assert torch.equal(restored.model.get_parameter(name).data, parameter.data)
    walk(student, 2)
    for one in (average, restored):
        one.follow(student)
    assert torch.equal(
        restored.values(ParameterRange("0.weight", 0, 12)), average.values(ParameterRange("0.weight", 0, 12))
    )
