"""Every field of distill.loss reaches the kernel."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from pydantic import ValidationError

from kdscale.config import LossConfig
from kdscale.losses import TERMS, distillation_loss
from kdscale_kernels import linear_topk_lse, reference

DIVERGENCES = get_args(LossConfig.model_fields["divergence"].annotation)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", get_args(LossConfig.model_fields["tail"].annotation))
def test_the_loss_is_the_one_the_config_names(divergence, tail):
    gen = torch.Generator().manual_seed(0)
    teacher, student, head = (torch.randn(*shape, generator=gen) for shape in ((5, 6), (5, 6), (40, 6)))
    labels = torch.randint(0, 40, (5,), generator=gen)
    loss = LossConfig(divergence=divergence, tail=tail, ce_weight=0.3, temperature=2.0, jsd_beta=0.2, skew=0.4)
    targets = linear_topk_lse(teacher, head, 7, temperature=2.0)
    total, terms = distillation_loss(student, head, *targets, labels, loss)
    options = {field: getattr(loss, field) for field in LossConfig.model_fields if field != "top_k"}
    want = reference.linear_sparse_kl(student, head, *targets, labels_N=labels, **options)
    torch.testing.assert_close(total, want.loss_sum)
    torch.testing.assert_close(terms[TERMS.index("kd")], want.kd_sum)


@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_a_skew_of_nothing_or_everything_is_refused(skew):
    with pytest.raises(ValidationError, match="skew"):
        LossConfig(skew=skew)
