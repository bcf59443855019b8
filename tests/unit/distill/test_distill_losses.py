"""Every field of distill.loss reaches the kernel."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from pydantic import ValidationError

from kdscale.config.objectives import LossConfig
from kdscale.distill.objectives.token_divergence import TERMS, distillation_loss, full_distillation_loss
from kdscale.models.head import OutputHead
from kdscale_kernels import DIVERGENCES, Divergence, linear_topk_lse, reference


def loss_of(divergence, **fields):
    """A loss whose parameter is not the default, where the divergence has one."""
    parameter = 0.2 if DIVERGENCES[divergence].parameter else None
    return LossConfig(divergence=divergence, divergence_parameter=parameter, ce_weight=0.3, temperature=2.0, **fields)


def kernel_options(loss):
    """Every field of the config that the kernels take, by their names."""
    fields = {field: getattr(loss, field) for field in LossConfig.model_fields if field != "targets"}
    return fields | {"divergence": Divergence(loss.divergence, fields.pop("divergence_parameter"))}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", get_args(LossConfig.model_fields["tail"].annotation))
def test_the_loss_is_the_one_the_config_names(divergence, tail):
    gen = torch.Generator().manual_seed(0)
    teacher, student, head = (torch.randn(*shape, generator=gen) for shape in ((5, 6), (5, 6), (40, 6)))
    labels = torch.randint(0, 40, (5,), generator=gen)
    loss = loss_of(divergence, tail=tail)
    targets = linear_topk_lse(teacher, head, 7, temperature=2.0)
    total, terms = distillation_loss(student, head, *targets, labels, loss)
    options = {name: value for name, value in kernel_options(loss).items() if name != "top_k"}
    want = reference.linear_sparse_kl(student, head, *targets, labels_N=labels, **options)
    torch.testing.assert_close(total, want.loss_sum)
    torch.testing.assert_close(terms[TERMS.index("kd")], want.kd_sum)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_loss_over_the_whole_vocabulary_is_the_one_the_config_names(divergence):
    gen = torch.Generator().manual_seed(0)
    shapes = ((5, 6), (44, 6), (44,), (5, 9), (40, 9), (40,))
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias = (
        torch.randn(*shape, generator=gen) for shape in shapes
    )
    labels = torch.randint(0, 40, (5,), generator=gen)
    loss = loss_of(divergence, targets="full")
    heads = OutputHead(weight, bias, softcap=4.0), OutputHead(teacher_weight, teacher_bias, softcap=3.0)
    total, terms = full_distillation_loss(hidden, heads[0], teacher_hidden, heads[1], labels, loss, vocab_size=40)
    want = reference.linear_full_kl(
        hidden,
        weight,
        teacher_hidden,
        teacher_weight,
        labels_N=labels,
        bias_V=bias,
        teacher_bias_V=teacher_bias,
        softcap=4.0,
        teacher_softcap=3.0,
        vocab_size=40,
        **{name: value for name, value in kernel_options(loss).items() if name not in ("top_k", "tail")},
    )
    torch.testing.assert_close(total, want.loss_sum)
    means = torch.stack([want.loss_sum, want.kd_sum, want.ce_sum, torch.tensor(5.0), torch.tensor(0.0)])
    torch.testing.assert_close(terms[:5], means)
    assert TERMS[3:5] == ("teacher_mass", "tail_mass")  # all of it, and nothing


def test_a_tail_beside_the_whole_vocabulary_is_refused():
    with pytest.raises(ValidationError, match=r"tail \(truncated\) is about topk targets"):
        LossConfig(targets="full", tail="truncated")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"divergence": "kl"}, r"divergence: expected forward_kl \| .*, got 'kl'"),
        ({"divergence": "jsd", "divergence_parameter": 1.0}, "divergence_parameter: expected beta of jsd"),
        ({"divergence": "skewed_reverse_kl", "divergence_parameter": 0.0}, "divergence_parameter: expected skew of"),
        ({"divergence_parameter": 0.3}, "divergence_parameter: forward_kl takes none"),
    ],
)
def test_a_divergence_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        LossConfig(**fields)
