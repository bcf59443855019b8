"""Objectives: what the student is trained on, and the weighted sum of several.

N rows (valid positions), H student's hidden size, V vocabulary, F figures that an objective reports.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from kdscale.config.distill.objective import LOSS, LayersRead, ModelPair, ObjectiveConfig
from kdscale.config.distill.objectives import OWN_TEXT, log_columns
from kdscale.config.distill.schedules import at
from kdscale.data.batches import Batch
from kdscale.models.attention import AttentionRows
from kdscale.models.head import OutputHead, VocabShard
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.targets import Targets, rows_of

COUNTS = ("tokens", "sequences")  # what a loss can be a mean over
# the same of what stands in place of text, where there may be some, and pairs of answers
_OWN_COUNTS = ("own_tokens", "own_sequences", "own_pairs")


@dataclass(frozen=True)
class StudentOutput:
    """The student's side of a micro-batch: final hidden states of the rows, and the head that reads them.

    `vocab_size` is how many rows of the head the teacher knows too. `shard`: the part of the head that this rank has,
    where tensor-parallel ranks share it. `layers_NH` and `attention` have what the objectives read of layers, by the
    layer's number, as Targets has the teacher's.
    """

    hidden_NH: torch.Tensor
    head: OutputHead
    vocab_size: int
    shard: VocabShard | None = None
    layers_NH: Mapping[int, torch.Tensor] = field(default_factory=dict)
    attention: Mapping[int, AttentionRows] = field(default_factory=dict)

    def part(self, index_M: torch.Tensor) -> StudentOutput:
        """The output of some of the rows, whose numbers are on the CPU; no objective on single layers asks for it."""
        assert not self.layers_NH and not self.attention
        return replace(self, hidden_NH=rows_of(self.hidden_NH, index_M))


Rows = tuple[StudentOutput, Targets, MicroBatch]


class Objective(Protocol):
    """One loss; made from its entry in distill.objectives, which has its name, needs, terms and count.

    One that is an nn.Module too has parameters, which are trained with the student and left out of its export. It is
    called also without rows: its loss is then a zero that depends on all of them, by the same calls of modules.
    """

    def __call__(
        self, student: StudentOutput, targets: Targets, batch: MicroBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss summed over what the entry counts (fp32 scalar, differentiable) and the detached sums of `terms`.

        Nothing is divided here: step.py divides once, by the count of the global batch. N is at least 1.
        """


def over_teachers(
    objective: Objective, student: StudentOutput, targets: Targets, batch: MicroBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """The objective's loss and terms; with several teachers their sums, each teacher's on its rows and by its share.

    For losses that add up (ObjectiveConfig.adds_up) and for rows of one teacher this is the loss to their mixture.
    """
    if not targets.teachers:
        return objective(student, targets, batch)
    parts = []
    for part in targets.teachers:
        rows_M = part.rows_M
        of_student, of_batch = (student, batch) if rows_M is None else (student.part(rows_M), batch.part(rows_M))
        loss, terms = objective(of_student, part.targets, of_batch)
        parts.append((loss * part.share, terms * part.share))
    return torch.stack([loss for loss, _ in parts]).sum(), torch.stack([terms for _, terms in parts]).sum(0)


class Objectives:
    """The objectives of a run: computed together, weighted, and read back as means by the names of the log's columns.

    `entries` are settled, for the `models` of the run; those of `own` are for what stands in place of text (`section`:
    a row of OWN_TEXT), and all others for the text. `figures` vectors hold, for each objective, its loss and then
    its terms. `step`, where a method takes it, is the optimiser step whose weights count; None: those at the end of all
    schedules. Raises ConfigError when an objective cannot be had.
    """

    def __init__(
        self,
        entries: Sequence[ObjectiveConfig],
        models: ModelPair | None = None,
        own: Sequence[ObjectiveConfig] = (),
        section: str = "on_policy",
    ):
        self.entries, self._of_text, self._own = (*entries, *own), tuple(entries), tuple(own)
        self._terms = log_columns(entries, own, section)
        self.columns, self.own_prefix = [term.name for term in self._terms], OWN_TEXT[section][0]
        self.width = sum(1 + len(entry.terms) for entry in self.entries)
        # what the sums of a step or a validation begin with
        self.counts = COUNTS + (_OWN_COUNTS if own else ())
        self._objectives: list[Objective] = [entry.build(models) for entry in self.entries]
        self.modules = nn.ModuleDict(
            {
                entry.name: objective
                for entry, objective in zip(self.entries, self._objectives, strict=True)
                if isinstance(objective, nn.Module)
            }
        )

    def counts_of(self, batches: Iterable[Batch]) -> list[int]:
        """The labels and sequences of these batches, in the order of `counts`."""
        each = [
            (batch.token_count, batch.sequence_count, *(batch.own_counts if self._own else ())) for batch in batches
        ]
        return [sum(column) for column in zip(*each, strict=True)] if each else [0] * len(self.counts)

    @property
    def layers(self) -> LayersRead:
        """The student's layers that any of them reads."""
        read = [entry.student_layers for entry in self.entries]
        return LayersRead(
            tuple(sorted({layer for layers in read for layer in layers.hidden})),
            tuple(sorted({layer for layers in read for layer in layers.attention})),
        )

    def __call__(
        self, student: StudentOutput, targets: Targets, batch: MicroBatch
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """(each objective's summed loss, all figures [F], fp32, detached)."""
        losses, figures, split = [], [], len(self._of_text)
        for (entry, objective), part in zip(
            zip(self.entries, self._objectives, strict=True),
            [rows for rows, count in self._parts(student, targets, batch, split) for _ in range(count)],
            strict=True,
        ):
            if part is None:  # no rows of the kind
                loss, terms = student.hidden_NH.new_zeros((), dtype=torch.float32), None
            else:
                compute = objective if entry.needs.nothing else partial(over_teachers, objective)
                loss, terms = compute(*part)
            losses.append(loss)
            figures += [loss.detach().float().reshape(1), loss.new_zeros(len(entry.terms)) if terms is None else terms]
        return tuple(losses), torch.cat(figures)

    def _parts(
        self, student: StudentOutput, targets: Targets, batch: MicroBatch, split: int
    ) -> list[tuple[Rows | None, int]]:
        """The rows of the run's text and those of the student's own, each for how many objectives; None: no rows."""
        everything = (student, targets, batch)
        if batch.is_own_N is None:
            return [(everything, split), (None, len(self._own))]
        kinds: list[tuple[Rows | None, int]] = []
        for index_M, count in ((~batch.is_own_N, split), (batch.is_own_N, len(self._own))):
            chosen = index_M.nonzero().squeeze(1)
            if not len(chosen):
                kinds.append((None, count))
            elif len(chosen) == batch.rows:
                kinds.append((everything, count))
            else:
                kinds.append(((student.part(chosen), targets.part(chosen), batch.part(chosen)), count))
        return kinds

    def idle(self, student: StudentOutput, targets: Targets, batch: MicroBatch) -> torch.Tensor | float:
        """A zero that depends on all parameters of the objectives, for a micro-batch without rows."""
        return sum((module(student, targets, batch)[0] for module in self.modules.values()), 0.0)

    def of_nothing(self, zero: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """What a micro-batch without rows gives; `zero` depends on the parameters, for a backward on every rank."""
        return (zero,) * len(self.entries), zero.detach().expand(self.width)

    def weights(self, step: int | None = None) -> list[float]:
        """The weight of each objective."""
        return [at(entry.weight, step) for entry in self.entries]

    def scheduled(self, step: int) -> dict[str, float]:
        """What follows a schedule, at optimiser step `step`, by the names of the log's columns."""
        return {name: value for entry in self.entries for name, value in entry.scheduled(step).items()}

    def tokens_per(self, counts: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Tokens of each sequence and of each pair, in the mean, from what `counts_of` counted."""
        found = dict(zip(self.counts, counts.clamp_min(1).float().unbind(), strict=True))
        per = {"sequences": found["tokens"] / found["sequences"]}
        return {**per, "pairs": found["own_tokens"] / found["own_pairs"]} if self._own else per

    def weighted(
        self, losses: Sequence[torch.Tensor], tokens_per: Mapping[str, torch.Tensor], step: int | None = None
    ) -> torch.Tensor:
        """The weighted sum, scaled so that dividing it by the tokens makes every loss a mean over what it counts."""
        total: Any = None
        for entry, loss, weight in zip(self.entries, losses, self.weights(step), strict=True):
            scaled = loss if weight == 1.0 else loss * weight
            scaled = scaled if entry.count == "tokens" else scaled * tokens_per[entry.count]
            total = scaled if total is None else total + scaled
        return total

    def means(self, values: Sequence[float], step: int | None = None) -> dict[str, float]:
        """Means by column from [*counts, *figures], and exponentials of means (the perplexity).

        The loss is what is minimised, over all rows; other figures are means over the rows of their kind, and NaN where
        there are none of the student's own text, or nothing else.
        """
        counts = dict(zip(self.counts, values, strict=False))
        figures = values[len(self.counts) :]
        if not self._own:
            return _means_of(self.entries, counts, figures, self.weights(step))
        width, weights = sum(1 + len(entry.terms) for entry in self._of_text), self.weights(step)
        of_own = {name.removeprefix("own_"): counts[name] for name in _OWN_COUNTS}
        of_text = {name: counts[name] - of_own[name] for name in COUNTS}
        split = len(self._of_text)
        text = _means_of(self._of_text, of_text, figures[:width], weights[:split])
        own = _means_of(self._own, of_own, figures[width:], weights[split:])
        tokens = {"text": of_text["tokens"], "own": of_own["tokens"]}
        loss = (text[LOSS.name] * tokens["text"] + own[LOSS.name] * tokens["own"]) / max(counts["tokens"], 1.0)
        text = text if tokens["text"] else dict.fromkeys(text, math.nan)
        own = own if tokens["own"] else dict.fromkeys(own, math.nan)
        return {**text, LOSS.name: loss, **{self.own_prefix + name: mean for name, mean in own.items()}}

    def headline(self, means: dict[str, float]) -> str:
        """The loss and the terms worth a message: `loss 1.2345 · perplexity 66.01 · top-1 agreement 51.2 %`."""
        terms = [item for term in self._terms for item in (term, term.exponential) if item]
        shown = [
            term.text(means[term.name])
            for term in terms
            if term.headline and (not self._own or math.isfinite(means[term.name]))
        ]
        return " · ".join([f"{LOSS.title} {means[LOSS.name]:.4f}", *shown])


def _means_of(
    entries: Sequence[ObjectiveConfig], counts: Mapping[str, float], figures: Sequence[float], weights: Sequence[float]
) -> dict[str, float]:
    """The means of these objectives' figures over what they count, their weighted sum, and exponentials."""
    counts = {name: max(value, 1.0) for name, value in counts.items()}
    left = iter(figures)
    losses, terms, exponentials = {}, {}, {}
    for entry in entries:
        losses[entry.name] = next(left) / counts[entry.count]
        for term in entry.terms:
            mean = terms[term.name] = next(left) / counts[entry.count]
            if term.exponential is not None:
                exponential = math.exp(min(mean, 80.0)) if math.isfinite(mean) else math.nan
                exponentials[term.exponential.name] = exponential
    weight_of = dict(zip(losses, weights, strict=True))
    weighted = [loss if weight_of[name] == 1.0 else loss * weight_of[name] for name, loss in losses.items()]
    own = losses if len(losses) > 1 else {}
    return {LOSS.name: sum(weighted[1:], weighted[0]), **own, **terms, **exponentials}
