"""The steps on bf16 logits, in torch and in C, against fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kdscale_kernels.c_kernels.library import library_obstacle
from kdscale_kernels.c_kernels.steps import CompiledBf16Steps
from kdscale_kernels.rows.bf16_steps import Bf16Steps
from kdscale_kernels.rows.torch_bf16 import TorchBf16Steps

NEG_INF = float("-inf")
OBSTACLE = library_obstacle()
IN_C = pytest.param(
    CompiledBf16Steps, id="compiled", marks=pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))
)
all_steps = pytest.mark.parametrize("steps", [pytest.param(TorchBf16Steps, id="torch"), IN_C])
# one column, less than a vector, less than a group of the search, neither a multiple of anything
widths = pytest.mark.parametrize("width", [1, 7, 31, 1000, 4099])


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).bfloat16()


@all_steps
@widths
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("spread", [0.1, 40.0])  # 40: most lie more than 87 nats below the largest
def test_exponentials(steps: Callable[[], Bf16Steps], width: int, temperature: float, spread: float) -> None:
    z_CV, plain_CV = normal(5, width, scale=spread), torch.empty(5, width, dtype=torch.bfloat16)
    z_CV[1, : width // 2] = NEG_INF
    exact_CV = z_CV.double()
    sums = steps().exponentials(z_CV, plain_CV if temperature != 1.0 else None, temperature)
    top_C1 = exact_CV.amax(1, keepdim=True)
    assert torch.equal(sums.top_C.double(), top_C1[:, 0])
    for got_CV, sum_C, T in ((z_CV, sums.tempered_C, temperature), (plain_CV, sums.plain_C, 1.0)):
        want_CV = torch.exp((exact_CV - top_C1) / T)
        torch.testing.assert_close(sum_C.double(), want_CV.sum(1), rtol=2e-6, atol=0.0)
        if got_CV is z_CV or temperature != 1.0:
            want_CV = want_CV / want_CV.sum(1, keepdim=True) if steps().leaves_softmaxes else want_CV
            torch.testing.assert_close(got_CV.double(), want_CV, rtol=2.0**-8, atol=1e-30)


@all_steps
@widths
def test_scale(steps: Callable[[], Bf16Steps], width: int) -> None:
    first_CV, second_CV = normal(4, width), normal(4, width, seed=1)
    factor_C, other_C = normal(4, seed=2).float() * 1e-20, normal(4, seed=3).float() * 1e-20
    for more, sum_CV in (((), 0.0), ((second_CV, other_C), second_CV.double() * other_C.double()[:, None])):
        got_CV = first_CV.clone()
        steps().scale(got_CV, factor_C, *more)
        want_CV = (first_CV.double() * factor_C.double()[:, None] + sum_CV).bfloat16()
        torch.testing.assert_close(got_CV, want_CV, rtol=2.0**-7, atol=1e-26)  # fp32 sums may round the other way


@all_steps
@pytest.mark.parametrize("hidden", [1, 24, 577])
def test_dots_are_those_of_fp32_products(steps: Callable[[], Bf16Steps], hidden: int) -> None:
    hidden_CH, weight_VH = normal(9, hidden), normal(50, hidden, seed=1)
    ids_CK = torch.randint(0, 50, (9, 13), generator=torch.Generator().manual_seed(2))
    want_CK = (weight_VH[ids_CK].double() * hidden_CH[:, None].double()).sum(2)
    torch.testing.assert_close(steps().dots(hidden_CH, weight_VH, ids_CK).double(), want_CK, rtol=1e-6, atol=1e-4)
    turned_VH = weight_VH.T.contiguous().T  # a head that does not lie row by row
    torch.testing.assert_close(steps().dots(hidden_CH, turned_VH, ids_CK).double(), want_CK, rtol=1e-6, atol=1e-4)


@all_steps
@pytest.mark.parametrize(("columns", "count"), [(1, 1), (40, 40), (1000, 37), (4099, 80), (4099, 1)])
@pytest.mark.parametrize("levels", [3, 1 << 20])  # 3: ties everywhere
def test_candidates(steps: Callable[[], Bf16Steps], columns: int, count: int, levels: int) -> None:
    z_CV = (normal(6, columns, scale=4.0).float() * levels).round().div(levels).bfloat16()
    z_CV[2] = 0.0
    z_CV[2, ::2] = -0.0
    z_CV[3] = -z_CV[3].abs()
    exact_CV = z_CV.double()
    found = steps().candidates(z_CV.clone(), count, 2.0)
    want_CM = exact_CV.topk(count, dim=1).values
    assert torch.equal(exact_CV.gather(1, found.ids_CM).sort(1, descending=True).values, want_CM)
    assert all(len(set(row)) == count for row in found.ids_CM.tolist())
    assert torch.equal(found.lowest_C.double(), want_CM[:, -1])
    assert torch.equal(exact_CV.gather(1, found.lowest_id_C[:, None])[:, 0], want_CM[:, -1])
    assert (found.ids_CM == found.lowest_id_C[:, None]).any(1).all()
    without_CM = found.ids_CM[found.ids_CM != found.lowest_id_C[:, None]].view(6, count - 1)
    others_C = torch.exp((exact_CV.scatter(1, without_CM, NEG_INF) - want_CM[:, -1:]) / 2.0).sum(1)
    torch.testing.assert_close(found.others_C.double(), others_C, rtol=1e-5, atol=0.0)


@all_steps
@pytest.mark.parametrize("bits", [0x7FC0, 0xFFC0])
def test_a_nan_is_never_hidden(steps: Callable[[], Bf16Steps], bits: int) -> None:
    """A product on x86 makes NaNs with the sign set, which lie below all numbers as integers."""
    z_CV = normal(4, 1000)
    z_CV.view(torch.uint16)[1, 500] = z_CV.view(torch.uint16)[2] = bits
    sums = steps().exponentials(z_CV.clone(), None, 1.0)
    assert sums.tempered_C.isnan().tolist() == sums.plain_C.isnan().tolist() == [False, True, True, False]
    found = steps().candidates(z_CV.clone(), 10, 1.0)
    among_C = z_CV.gather(1, found.ids_CM).isnan().any(1)
    assert (found.others_C.isnan() | among_C).tolist() == [False, True, True, False]


@pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))
def test_the_number_of_threads_changes_no_bit() -> None:
    steps, before, runs = CompiledBf16Steps(), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            z_CV = normal(7, 4099)
            sums, found = steps.exponentials(z_CV, None, 1.0), steps.candidates(normal(7, 4099), 80, 1.0)
            dots_CK = steps.dots(normal(7, 576), normal(90, 576), found.ids_CM % 90)
            steps.scale(z_CV, sums.tempered_C)
            runs.append([*sums, *found, dots_CK, z_CV])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
