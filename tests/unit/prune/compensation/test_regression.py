"""The regression is the textbook one, from few tokens and from many, in fp64 and with one Gram matrix in memory."""

from __future__ import annotations

import pytest
import torch

from kdscale.errors import SelfCheckError
from kdscale.models.layer_pass import GramHooks, add_product
from kdscale.prune.compensation.regression import RidgeSums, TargetSums, solve_in_place

KEPT, INPUTS, OUTPUTS = [0, 2, 3, 6, 7, 9, 10, 11], 12, 5
CPU = torch.device("cpu")


def _case(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    mix = torch.randn(INPUTS, INPUTS, generator=generator)
    return torch.randn(tokens, INPUTS, generator=generator) @ mix, torch.randn(OUTPUTS, INPUTS, generator=generator)


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("tokens", [1, 4, 8, 9, 60])
def test_the_solution_minimises_what_it_should(tokens: int, batch: int) -> None:
    """Against a least-squares solve of the stacked problem [x_K; √λ I] W'ᵀ = [x Wᵀ; √λ W_Kᵀ]."""
    x_NU, weight_DU = _case(tokens)
    sums = RidgeSums(KEPT, INPUTS, CPU)
    for part in x_NU.split(batch):
        sums.add(part[None])
    solved = sums.solve(weight_DU, 1e-2, "it")
    x, weight = x_NU.double(), weight_DU.double()
    root = (1e-2 * x[:, KEPT].square().sum(0).mean()).sqrt()
    left = torch.cat([x[:, KEPT], root * torch.eye(len(KEPT), dtype=torch.float64)])
    right = torch.cat([x @ weight.T, root * weight[:, KEPT].T])
    expected = torch.linalg.lstsq(left, right).solution.T
    assert solved.dtype == torch.float32
    assert (solved - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("tokens", [4, 60])
def test_bf16_inputs_are_summed_in_fp32(tokens: int) -> None:
    x_NU, weight_DU = _case(tokens)
    one, two = RidgeSums(KEPT, INPUTS, CPU), RidgeSums(KEPT, INPUTS, CPU)
    one.add(x_NU.bfloat16())
    two.add(x_NU.bfloat16().float())
    assert torch.equal(one.solve(weight_DU, 1e-2, "it"), two.solve(weight_DU, 1e-2, "it"))


def test_products_of_bf16_values_are_exact() -> None:
    """A processor that multiplies in bf16 has the Gram matrix of fp32; a factor in fp32 is rounded, token by token."""
    generator = torch.Generator().manual_seed(1)
    x_NU, error_ND = torch.randn(1024, 96, generator=generator).bfloat16(), torch.randn(1024, 32, generator=generator)
    gram_UU, cross_DU = add_product(None, x_NU, x_NU), add_product(None, error_ND, x_NU)
    expected = x_NU.double().T @ x_NU.double()
    assert (gram_UU - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (cross_DU - error_ND.double().T @ x_NU.double()).norm() < 3e-3 * cross_DU.norm()
    exact = error_ND.T @ x_NU.float()  # the setting is as it was
    assert (exact - error_ND.double().T @ x_NU.double()).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("tokens", [4, 60])
def test_silence_and_noise(tokens: int) -> None:
    _, weight_DU = _case(tokens)
    silent, broken = RidgeSums(KEPT, INPUTS, CPU), RidgeSums(KEPT, INPUTS, CPU)
    silent.add(torch.zeros(tokens, INPUTS))
    assert torch.equal(silent.solve(weight_DU, 1e-2, "it"), weight_DU[:, KEPT])
    broken.add(torch.full((tokens, INPUTS), torch.inf))
    with pytest.raises(SelfCheckError, match="compensation of it"):
        broken.solve(weight_DU, 1e-2, "it")


@pytest.mark.parametrize("tokens", [4, 60])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, 1e30])
def test_equations_without_a_solution_name_the_layer_and_what_to_do(tokens: int, broken: float) -> None:
    """NaN, infinite and overflowing sums have no factorisation: no LinAlgError may reach the user."""
    x_NU, weight_DU = _case(tokens)
    x_NU[1] = broken
    ridge, target = RidgeSums(KEPT, INPUTS, CPU), TargetSums(weight_DU)
    ridge.add(x_NU)
    target.add(x_NU, x_NU @ weight_DU.T)
    if tokens == 4 and broken == 1e30:  # rows stay rows, and are squared in fp64
        assert torch.isfinite(ridge.solve(weight_DU, 1e-2, "layer 3")).all()
        return
    for solve in (lambda: ridge.solve(weight_DU, 1e-2, "layer 3"), lambda: target.solve(1e-2, "layer 3")):
        with pytest.raises(SelfCheckError, match="compensation of layer 3 is not finite") as caught:
            solve()
        assert "prune.ridge_lambda" in str(caught.value.hint)


def test_gram_hooks_sum_what_modules_read_while_they_are_attached() -> None:
    layers, hooks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2)), GramHooks()
    for name, layer in zip("ab", layers, strict=True):
        hooks.attach(name, layer)
    inputs = [torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in range(3)]
    for x_BSU in inputs[:2]:
        layers.bfloat16()[0](x_BSU)
    hooks.detach()
    layers[0](inputs[2])
    rows_NU = torch.cat(inputs[:2]).flatten(0, 1).double()
    assert hooks.grams.keys() == {"a"}
    torch.testing.assert_close(hooks.grams["a"].double(), rows_NU.T @ rows_NU)
    assert hooks.grams["a"].dtype == torch.float32


def test_solved_where_it_lies() -> None:
    half = torch.randn(30, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram, right = half @ half.T, half[:7, :30].clone()
    expected = torch.linalg.solve(gram, right.T).T
    solved = solve_in_place(gram, right)
    assert solved.data_ptr() == right.data_ptr()
    assert (solved - expected).abs().max() < 1e-9 * expected.abs().max()
    assert solve_in_place(-torch.eye(3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)).isnan().all()
