"""Several teachers: the mixture's loss and gradient, who is asked for which rows, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kdscale.config.distill.objectives import TokenDivergenceConfig
from kdscale.config.distill.targets import Needs
from kdscale.config.distill.teachers import TeacherEntry, shares
from kdscale.distill.objectives.base import Objectives, StudentOutput
from kdscale.errors import ConfigError
from kdscale.models.head import OutputHead
from kdscale.teacher.several import Colleague, SeveralTeachers, check_tags
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.targets import FullTargets, LabelTargets, SampledTargets, Targets, TeacherPart, TopKTargets
from kdscale_kernels import linear_topk_lse

ROWS, VOCAB, HIDDEN = 9, 40, 6
TAGS = ("books", "code", "maths")
TAGS_N = torch.tensor([0, 1, 1, 2, 0, 2, 1, 0, 2])


class Fake:
    """A teacher of random hidden states; it keeps what it was asked."""

    def __init__(self, seed: int, objective: TokenDivergenceConfig):
        generator = torch.Generator().manual_seed(seed)
        self.hidden_NG, self.weight_VG = (
            torch.randn(size, HIDDEN, generator=generator, dtype=torch.float64) for size in (ROWS, VOCAB)
        )
        self.model, self.gives, self._objective = nn.Linear(1, 1), objective.needs, objective
        self.prefetched: list[list[int]] = []
        self.asked: list[list[int]] = []
        self.closed = False

    def prefetch(self, batch: MicroBatch) -> None:
        self.prefetched.append(batch.rows_N.tolist())

    def targets(self, batch: MicroBatch) -> Targets:
        self.asked.append(batch.rows_N.tolist())
        hidden_NG = self.hidden_NG[batch.rows_N]
        if self.gives.full:
            return Targets(rows=batch.rows, full=FullTargets(hidden_NG, OutputHead(self.weight_VG)))
        top = linear_topk_lse(hidden_NG, self.weight_VG, self.gives.top_k)
        return Targets(rows=batch.rows, top_k=TopKTargets(*top, 1.0, VOCAB))

    def close(self) -> None:
        self.closed = True

    def probabilities(self) -> torch.Tensor:
        return (self.hidden_NG @ self.weight_VG.T).softmax(-1)


def several(teachers: list[TeacherEntry], objective: TokenDivergenceConfig, asked: bool = False) -> Any:
    """(the source, its teachers)"""
    fakes = {entry.name: Fake(seed, objective) for seed, entry in enumerate(teachers)}
    colleagues = {
        name: Colleague(fake, torch.tensor([shares(teachers, tag).get(name, 0.0) for tag in TAGS]), asked)
        for name, fake in fakes.items()
    }
    return SeveralTeachers(colleagues, objective.needs), fakes


def micro_batch() -> MicroBatch:
    labels_N = torch.arange(ROWS) * 3
    return MicroBatch(labels_N[None], labels_N[None], torch.arange(ROWS), labels_N, tags_N=TAGS_N)


def loss_and_gradient(source: Any, objective: TokenDivergenceConfig) -> tuple[torch.Tensor, list[torch.Tensor], Any]:
    generator = torch.Generator().manual_seed(99)
    hidden_NH, weight_VH = (
        torch.randn(size, HIDDEN, generator=generator, dtype=torch.float64).requires_grad_() for size in (ROWS, VOCAB)
    )
    batch = micro_batch()
    losses, figures = Objectives([objective])(
        StudentOutput(hidden_NH, OutputHead(weight_VH), VOCAB), source.targets(batch), batch
    )
    losses[0].backward()
    return losses[0].detach(), [hidden_NH.grad, weight_VH.grad], (hidden_NH, weight_VH, figures)  # type: ignore[list-item]


MIXED = [
    TeacherEntry(name="own"),
    TeacherEntry(name="big.er", weight=3.0),
    TeacherEntry(name="coder", tags=("code",), weight=2.0),
    TeacherEntry(name="other", tags=("code", "maths")),
]


@pytest.mark.parametrize("targets", [{"targets": "full"}, {"top_k": VOCAB}], ids=["full", "top K"])
def test_the_gradient_is_that_of_the_forward_kl_to_the_mixture(targets: dict[str, Any]) -> None:
    """In fp64, against the mixture written out: by weight for one tag, by weight of others for the next, one alone."""
    objective = TokenDivergenceConfig(ce_weight=0.2, **targets)
    source, fakes = several(MIXED, objective)
    loss, gradients, (hidden_NH, weight_VH, figures) = loss_and_gradient(source, objective)

    share_of = torch.tensor([[shares(MIXED, TAGS[tag]).get(entry.name, 0.0) for entry in MIXED] for tag in TAGS_N])
    p_INV = torch.stack([fake.probabilities() for fake in fakes.values()])
    mixture_NV = torch.einsum("ni,inv->nv", share_of.double(), p_INV)
    logq_NV = (hidden_NH @ weight_VH.T).log_softmax(-1)
    ce = -logq_NV.gather(1, micro_batch().labels_N[:, None]).sum()
    to_mixture = (mixture_NV * (mixture_NV.log() - logq_NV)).sum()
    apart = sum(
        (share_of[:, number] * (p_NV * (p_NV.log() - logq_NV)).sum(-1)).sum() for number, p_NV in enumerate(p_INV)
    )
    want = torch.autograd.grad(0.2 * ce + 0.8 * to_mixture, (hidden_NH, weight_VH))
    for got, expected in zip(gradients, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(loss, (0.2 * ce + 0.8 * apart).detach(), rtol=1e-6, atol=1e-6)
    assert figures[2].item() == pytest.approx(ce.item(), rel=1e-5)  # each row's labels count once
    assert figures[3].item() == pytest.approx(ROWS, rel=1e-5)


def test_every_divergence_learns_from_one_teacher_a_source_as_from_it_alone() -> None:
    by_tag = [TeacherEntry(name="own"), TeacherEntry(name="coder", tags=("code",))]
    objective = TokenDivergenceConfig(divergence="jsd", top_k=8)
    source, fakes = several(by_tag, objective)
    loss, gradients, (hidden_NH, weight_VH, _) = loss_and_gradient(source, objective)
    total: Any = 0.0
    for name, rows in (("own", TAGS_N != 1), ("coder", TAGS_N == 1)):
        batch = micro_batch().part(rows.nonzero().squeeze(1))
        student = StudentOutput(hidden_NH[rows], OutputHead(weight_VH), VOCAB)
        total = total + Objectives([objective])(student, fakes[name].targets(batch), batch)[0][0]
    torch.testing.assert_close(loss, total.detach())
    for got, expected in zip(gradients, torch.autograd.grad(total, (hidden_NH, weight_VH)), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("always", [False, True])
def test_a_teacher_is_asked_for_its_rows_and_without_any_only_where_all_ranks_must_ask(always: bool) -> None:
    teachers = [
        TeacherEntry(name="own", tags=("books", "code")), TeacherEntry(name="maths", tags=("maths",)),
        TeacherEntry(name="idle", tags=("law",)),
    ]  # fmt: skip
    source, fakes = several(teachers, TokenDivergenceConfig(top_k=4), always)
    source.prefetch(micro_batch())
    targets = source.targets(micro_batch())
    assert fakes["own"].asked == fakes["own"].prefetched == [[0, 1, 2, 4, 6, 7]]
    assert fakes["maths"].asked == [[3, 5, 8]]
    assert fakes["idle"].asked == fakes["idle"].prefetched == ([[]] if always else [])
    assert [part.targets.rows for part in targets.teachers] == [6, 3]
    assert bool(torch.isfinite(targets.probe()))
    source.close()
    assert all(fake.closed for fake in fakes.values())
    assert len(list(source.model.children())) == 3


def test_sampled_targets_are_cut_down_to_rows_too() -> None:
    weights_NK = torch.rand(4, 3)
    sampled = SampledTargets(torch.arange(12).view(4, 3), weights_NK, 2.0, VOCAB)
    some = Targets(rows=4, sampled=sampled).part(torch.tensor([3, 0]))
    assert some.rows == 2 and some.sampled is not None
    assert some.sampled.ids_NK.tolist() == [[9, 10, 11], [0, 1, 2]]
    assert (some.sampled.temperature, some.sampled.vocab_size) == (2.0, VOCAB)


def test_of_some_rows_each_teacher_says_what_it_says_of_them() -> None:
    """Rows of text that the student wrote are learnt apart from the others."""
    label = torch.arange(4.0)
    parts = (
        TeacherPart(0.25, torch.tensor([0, 3, 4, 7]), Targets(rows=4, label=LabelTargets(label))),
        TeacherPart(0.75, None, Targets(rows=9, label=LabelTargets(torch.arange(9.0)))),
        TeacherPart(0.5, torch.tensor([8]), Targets(rows=1, label=LabelTargets(label[:1]))),
    )
    first, second = Targets(rows=9, teachers=parts).part(torch.tensor([1, 3, 7])).teachers
    assert first.rows_M is not None and first.rows_M.tolist() == [1, 2] and first.share == 0.25
    assert first.targets.label is not None and first.targets.label.logprobs_N.tolist() == [1.0, 3.0]
    assert second.rows_M is not None and second.rows_M.tolist() == [0, 1, 2]
    assert second.targets.label is not None and second.targets.label.logprobs_N.tolist() == [1.0, 3.0, 7.0]


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        ([{"tags": ("code",)}], "no teacher teaches books, maths"),
        ([{}, {"tags": ("cod",)}], "no text has the tag cod"),
    ],
)
def test_a_source_without_a_teacher_and_a_teacher_without_a_source_are_refused(
    teachers: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_tags([TeacherEntry(name=str(number), **given) for number, given in enumerate(teachers)], TAGS)


def test_needs_of_nothing_are_met_without_a_teacher() -> None:
    assert Needs().nothing
    assert not Needs(sampled=3).nothing
