"""The Triton steps of vocabulary slices against the fp64 twin: in the interpreter on a CPU, the same table on a GPU."""

from __future__ import annotations

import pytest
import torch

import kdscale_kernels as kk
from kdscale_kernels import reference
from kdscale_kernels.rows.teacher_entries import prepare_entries
from kdscale_kernels.types import LossOptions

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

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")


def run(module, example, device, **options):
    p = type(example)(*[t.detach().to(device) for t in example])
    p = type(p)(*[t.requires_grad_() for t in p[:3]], *p[3:])
    out = module.linear_sparse_kl(p.hidden, p.weight, *p.targets, labels_N=p.labels, bias_V=p.bias, **options)
    (out.loss_sum * 0.37).backward()
    return out, [t.grad.double().cpu() for t in p[:3]]


@pytest.mark.parametrize("options", LOSSES)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("noise", [None, 0.05])
def test_vocab_slices_equal_the_twin(make_example, device, options, budget, noise):
    head = {name: options[name] for name in ("temperature", "softcap", "vocab_size") if name in options}
    example = make_example(rows=5, noise=noise, with_bias=True, **head)
    want, want_grads = run(reference, example.cast(torch.float64), "cpu", **options)
    extra = {
        "mode": "vocab_slices",
        "chunk_bytes": 5 * 128 * 4,
        "workspace_bytes": BUDGETS[budget],
        "backend": "triton",
    }
    got, grads = run(kk, example.cast(torch.float32), device, **options, **extra)
    for field in FIELDS:
        truth = float(getattr(want, field))
        assert float(getattr(got, field)) == pytest.approx(truth, rel=1e-4, abs=1e-4), field
    for actual, expected in zip(grads, want_grads, strict=True):
        assert float((actual - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("kept", [False, True])
def test_a_bf16_gradient_over_fp32_logits(make_example, device, kept):
    """What only a device's products ask for, tried on the steps themselves."""
    from kdscale_kernels.row_steps import row_steps
    from kdscale_kernels.rows.results import EntryLogits, TailSums
    from kdscale_kernels.rows.torch_slices import join_slices

    p = make_example(rows=5, noise=0.3)
    options = LossOptions(ce_weight=0.3, temperature=2.0)
    ids, logits, lse, labels, z = (t.to(device) for t in (*p.targets, p.labels.clamp(min=0), p.hidden @ p.weight.T))
    targets = prepare_entries(ids, logits.float(), lse.float(), 203, options.temperature)
    gradients = []
    for backend, dtype in (("triton", torch.bfloat16), ("torch", torch.float32)):
        steps = row_steps(backend).slices(targets, labels, options, [0, 203])
        entry_logits = EntryLogits.empty(targets, labels, 203, torch.float32)
        keep = [torch.empty(z.shape, dtype=dtype, device=device) for _ in range(2)] if kept else []
        tail, left = steps.read(z.float(), 0, entry_logits, keep)
        _, gradient = join_slices(entry_logits, TailSums(*(field[:, None] for field in tail)), targets, labels, options)
        dz = steps.write_kept(left, 0, gradient) if kept else steps.write(z.float(), 0, gradient, dtype)
        assert dz.dtype == dtype
        gradients.append(dz.double().cpu())
    triton_dz, torch_dz = gradients
    assert float((triton_dz - torch_dz).norm() / torch_dz.norm()) < 2e-2  # the interpreter truncates to bf16


def test_same_bits_twice(make_example, device):
    example = make_example(rows=5, noise=0.1).cast(torch.float32)
    extra = {"mode": "vocab_slices", "chunk_bytes": 5 * 128 * 4, "workspace_bytes": 12_000, "backend": "triton"}
    (first, one), (second, two) = (run(kk, example, device, ce_weight=0.3, **extra) for _ in range(2))
    assert torch.equal(first.loss_sum, second.loss_sum)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_an_id_outside_the_vocabulary_poisons_its_row(make_example, device):
    from kdscale_kernels.rows.results import EntryLogits

    p = make_example(rows=5)
    targets = prepare_entries(p.ids, p.logits, p.lse, 203, 1.0)
    ids = targets.ids_NK.clone()
    ids[2, 1] = 203
    entry_logits = EntryLogits.empty(targets._replace(ids_NK=ids), p.labels.clamp(min=0), 203, torch.float32)
    assert entry_logits.support_CK.isnan().nonzero().tolist() == [[2, 1]]
