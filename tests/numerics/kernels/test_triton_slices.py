"""The Triton steps of the lean mode against the fp64 twin: in the interpreter on a CPU, the same table on a GPU."""

from __future__ import annotations

import os

import pytest
import torch

import kdscale_kernels as kk
from kdscale_kernels import backend as dispatch
from kdscale_kernels import reference
from kdscale_kernels.rows.teacher_entries import prepare
from kdscale_kernels.types import LossOptions

triton = pytest.importorskip("triton", reason="triton is not installed (the dev extra installs it on Linux)")

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and dispatch._body_is_interpreted()
FIELDS = ("loss_sum", "kd_sum", "ce_sum", "teacher_mass_sum", "student_tail_sum", "top1_agree_sum")
LOSSES = [
    {},
    {"ce_weight": 0.3},
    {"temperature": 2.5, "ce_weight": 0.4},
    {"temperature": 2.5, "ce_weight": 0.4, "softcap": 5.0},
    {"divergence": kk.Divergence("jsd", 0.3), "softcap": 5.0, "vocab_size": 190},
    {"tail": "truncated", "ce_weight": 1.0},
    {"tail": "renormalised", "divergence": "skewed_forward_kl"},
]
BUDGETS = {"none kept": 1, "in blocks": 12_000, "all kept": 1 << 20}

pytestmark = [
    pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]),
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def _can_run(device):
    if device == "cuda" and (INTERPRETED or not CUDA):
        pytest.skip("needs a CUDA device and TRITON_INTERPRET unset")
    if device == "cpu" and not INTERPRETED:
        pytest.skip("on a machine with a GPU the interpreter runs only under TRITON_INTERPRET=1")


def run(module, problem, device, **options):
    p = type(problem)(*[t.detach().to(device) for t in problem])
    p = type(p)(*[t.requires_grad_() for t in p[:3]], *p[3:])
    out = module.linear_sparse_kl(p.hidden, p.weight, *p.targets, labels_N=p.labels, bias_V=p.bias, **options)
    (out.loss_sum * 0.37).backward()
    return out, [t.grad.double().cpu() for t in p[:3]]


@pytest.mark.parametrize("options", LOSSES)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("noise", [None, 0.05])
def test_lean_equals_the_twin(make_problem, device, options, budget, noise):
    head = {name: options[name] for name in ("temperature", "softcap", "vocab_size") if name in options}
    problem = make_problem(rows=5, noise=noise, with_bias=True, **head)
    want, want_grads = run(reference, problem.cast(torch.float64), "cpu", **options)
    extra = {"mode": "lean", "chunk_bytes": 5 * 128 * 4, "workspace_bytes": BUDGETS[budget], "backend": "triton"}
    got, grads = run(kk, problem.cast(torch.float32), device, **options, **extra)
    for field in FIELDS:
        truth = float(getattr(want, field))
        assert float(getattr(got, field)) == pytest.approx(truth, rel=1e-4, abs=1e-4), field
    for mine, theirs in zip(grads, want_grads, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-4


@pytest.mark.parametrize("kept", [False, True])
def test_a_bf16_gradient_over_fp32_logits(make_problem, device, kept):
    """What only a device's products ask for, tried on the steps themselves."""
    from kdscale_kernels.row_steps import SliceSteps
    from kdscale_kernels.rows.results import Found, Parts
    from kdscale_kernels.rows.torch_slices import join

    p = make_problem(rows=5, noise=0.3)
    options = LossOptions(ce_weight=0.3, temperature=2.0)
    ids, logits, lse, labels, z = (t.to(device) for t in (*p.targets, p.labels.clamp(min=0), p.hidden @ p.weight.T))
    targets = prepare(ids, logits.float(), lse.float(), 203, options.temperature)
    found_grads = []
    for backend, dtype in (("triton", torch.bfloat16), ("torch", torch.float32)):
        steps = SliceSteps(backend, targets, labels, options, [0, 203])
        found = Found.empty(targets, labels, 203, torch.float32)
        keep = [torch.empty(z.shape, dtype=dtype, device=device) for _ in range(2)] if kept else []
        parts, left = steps.read(z.float(), 0, found, keep)
        _, gradient = join(found, Parts(*(part[:, None] for part in parts)), targets, labels, options)
        dz = steps.write_kept(left, 0, gradient) if kept else steps.write(z.float(), 0, gradient, dtype)
        assert dz.dtype == dtype
        found_grads.append(dz.double().cpu())
    mine, theirs = found_grads
    assert float((mine - theirs).norm() / theirs.norm()) < 2e-2  # the interpreter truncates to bf16


def test_same_bits_twice(make_problem, device):
    problem = make_problem(rows=5, noise=0.1).cast(torch.float32)
    extra = {"mode": "lean", "chunk_bytes": 5 * 128 * 4, "workspace_bytes": 12_000, "backend": "triton"}
    (first, one), (second, two) = (run(kk, problem, device, ce_weight=0.3, **extra) for _ in range(2))
    assert torch.equal(first.loss_sum, second.loss_sum)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_an_id_outside_the_vocabulary_poisons_its_row(make_problem, device):
    from kdscale_kernels.rows.results import Found

    p = make_problem(rows=5)
    targets = prepare(p.ids, p.logits, p.lse, 203, 1.0)
    ids = targets.ids_NK.clone()
    ids[2, 1] = 203
    found = Found.empty(targets._replace(ids_NK=ids), p.labels.clamp(min=0), 203, torch.float32)
    assert found.support_CK.isnan().nonzero().tolist() == [[2, 1]]
