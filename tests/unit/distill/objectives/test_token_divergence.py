"""Every setting of the objective token_divergence reaches the kernel."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError

from kdscale.config.distill.objectives import TokenDivergenceConfig
from kdscale.distill.objectives.base import StudentOutput
from kdscale.distill.objectives.token_divergence import TokenDivergence
from kdscale.models.head import OutputHead
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.targets import FullTargets, SampledTargets, Targets, TopKTargets
from kdscale_kernels import DIVERGENCES, Divergence, linear_topk_lse, reference


def settings_of(divergence, **fields):
    """Settings whose parameter is not the default, where the divergence has one."""
    parameter = 0.2 if DIVERGENCES[divergence].parameter else None
    return TokenDivergenceConfig(
        divergence=divergence, divergence_parameter=parameter, ce_weight=0.3, temperature=2.0, **fields
    )


def kernel_options(settings) -> dict[str, Any]:
    """Every setting that the kernels take, by their names."""
    fields = {field: getattr(settings, field) for field in TokenDivergenceConfig.model_fields}
    fields["divergence"] = Divergence(settings.divergence, fields.pop("divergence_parameter"))
    return {
        name: value
        for name, value in fields.items()
        if name not in ("name", "weight", "targets", "top_k", "text_below_entropy", "draws")
    }


def batch_of(labels_N):
    nothing = torch.empty(0, dtype=torch.long)
    return MicroBatch(nothing, nothing, nothing, labels_N)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", get_args(TokenDivergenceConfig.model_fields["tail"].annotation))
@pytest.mark.parametrize("given", [7, 9], ids=["as many entries as asked for", "more, for another objective"])
def test_the_loss_is_the_one_the_config_names(divergence, tail, given):
    gen = torch.Generator().manual_seed(0)
    teacher, student, head = (torch.randn(*shape, generator=gen) for shape in ((5, 6), (5, 6), (40, 6)))
    labels = torch.randint(0, 40, (5,), generator=gen)
    settings = settings_of(divergence, tail=tail, top_k=7)
    top_k = TopKTargets(*linear_topk_lse(teacher, head, given, temperature=2.0), 2.0, 40)
    total, terms = TokenDivergence(settings)(
        StudentOutput(student, OutputHead(head), 40), Targets(rows=5, top_k=top_k), batch_of(labels)
    )
    want = reference.linear_sparse_kl(
        student, head, *linear_topk_lse(teacher, head, 7, temperature=2.0), labels_N=labels, **kernel_options(settings)
    )
    torch.testing.assert_close(total, want.loss_sum)
    torch.testing.assert_close(terms[0], want.kd_sum)


def test_the_loss_on_sampled_tokens_takes_their_weights():
    """The first token, which nobody drew, counts for nothing but the agreement."""
    gen = torch.Generator().manual_seed(0)
    student, head = (torch.randn(*shape, generator=gen) for shape in ((2, 6), (40, 6)))
    labels = torch.randint(0, 40, (2,), generator=gen)
    best = (student @ head.T).argmax(1)
    other = (best + 1) % 40
    sampled = SampledTargets(
        torch.stack([best, other, torch.full_like(best, -1)], 1),
        torch.tensor([[0.0, 1.0, 0.0], [0.25, 0.75, 0.0]]), 2.0, 40,
    )  # fmt: skip
    settings = settings_of("forward_kl", targets="sampled")
    total, terms = TokenDivergence(settings)(
        StudentOutput(student, OutputHead(head), 40), Targets(rows=2, sampled=sampled), batch_of(labels)
    )
    logq_NV = torch.log_softmax(student @ head.T / 2.0, 1)
    want = -logq_NV[0, other[0]] + 0.25 * (0.25 / logq_NV[1, best[1]].exp()).log()
    want = want + 0.75 * (0.75 / logq_NV[1, other[1]].exp()).log()
    ce = torch.nn.functional.cross_entropy(student @ head.T, labels, reduction="sum")
    torch.testing.assert_close(terms[0], want)
    torch.testing.assert_close(total, 0.3 * ce + 0.7 * 4.0 * want)
    assert terms[2] == 2.0 and terms[4] == 2.0  # the weights' sum; both first tokens are the student's best


@pytest.mark.parametrize("fields", [{"tail": "truncated"}, {"divergence": "jsd"}])
def test_sampled_tokens_have_neither_a_tail_nor_another_divergence(fields):
    with pytest.raises(ValidationError, match="with targets: sampled"):
        TokenDivergenceConfig(targets="sampled", **fields)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_loss_over_the_whole_vocabulary_is_the_one_the_config_names(divergence):
    gen = torch.Generator().manual_seed(0)
    shapes = ((5, 6), (44, 6), (44,), (5, 9), (40, 9), (40,))
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias = (
        torch.randn(*shape, generator=gen) for shape in shapes
    )
    labels = torch.randint(0, 40, (5,), generator=gen)
    settings = settings_of(divergence, targets="full")
    student = StudentOutput(hidden, OutputHead(weight, bias, softcap=4.0), 40)
    full = FullTargets(teacher_hidden, OutputHead(teacher_weight, teacher_bias, softcap=3.0))
    total, terms = TokenDivergence(settings)(student, Targets(rows=5, full=full), batch_of(labels))
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
        **{name: value for name, value in kernel_options(settings).items() if name != "tail"},
    )
    torch.testing.assert_close(total, want.loss_sum)
    # all of the teacher's mass, and no tail
    sums = torch.stack([want.kd_sum, want.ce_sum, torch.tensor(5.0), torch.tensor(0.0)])
    torch.testing.assert_close(terms[:4], sums)
    assert [term.name for term in settings.terms[:4]] == ["kd", "ce", "teacher_mass", "tail_mass"]


def test_a_tail_beside_the_whole_vocabulary_is_refused():
    with pytest.raises(ValidationError, match=r"tail \(truncated\) is about topk targets"):
        TokenDivergenceConfig(targets="full", tail="truncated")


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
        TokenDivergenceConfig(**fields)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_the_text_teaches_where_the_teacher_is_sure(divergence):
    """Beside a twin with each row's α."""
    gen = torch.Generator().manual_seed(0)
    student, head = (torch.randn(*shape, generator=gen, dtype=torch.float64) for shape in ((8, 6), (40, 6)))
    teacher = torch.randn(8, 6, generator=gen, dtype=torch.float64) * torch.linspace(0.2, 4.0, 8)[:, None].double()
    labels = torch.randint(0, 40, (8,), generator=gen)
    student.requires_grad_()
    top = linear_topk_lse(teacher, head, 7, temperature=2.0)
    p_NK = (top.logits_NK / 2.0 - top.lse_N[:, None]).exp()
    entropies = [-sum(float(p) * math.log(p) for p in [*row, 1 - row.sum()]) for row in p_NK]
    limit = sorted(entropies)[4]
    own_N = torch.tensor([1.0 if entropy < limit else 0.3 for entropy in entropies], dtype=torch.float64)
    settings = settings_of(divergence, top_k=7, text_below_entropy=limit)
    targets = Targets(rows=8, top_k=TopKTargets(*top, 2.0, 40))
    total, _ = TokenDivergence(settings)(StudentOutput(student, OutputHead(head), 40), targets, batch_of(labels))
    want = reference.linear_sparse_kl(
        student, head, *top, labels_N=labels, **{**kernel_options(settings), "ce_weight": own_N}
    ).loss_sum
    torch.testing.assert_close(total, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (total, want)))


def test_the_teachers_entropy_needs_its_top_k():
    with pytest.raises(ValidationError, match="text_below_entropy needs targets: topk, got full"):
        TokenDivergenceConfig(text_below_entropy=1.0, targets="full")
