"""`distill.objectives`: what the student is trained on, and the names under which a run logs it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from kdscale.config.distill.encoder_objectives import ClassificationConfig, SentenceEmbeddingsConfig
from kdscale.config.distill.layer_objectives import AttentionConfig, HiddenStatesConfig
from kdscale.config.distill.objective import LOSS, ObjectiveConfig, Term
from kdscale.config.distill.schedules import Between, Schedule
from kdscale.config.distill.targets import Draws, Needs
from kdscale.config.fields import Length, named_entry
from kdscale_kernels.divergence import DIVERGENCES, Divergence


class TokenDivergenceConfig(ObjectiveConfig):
    """α·CE + (1−α)·T²·divergence on the teacher's top-K and one tail bucket, on samples, or on the whole vocabulary."""

    implementation = "kdscale.distill.objectives.token_divergence:TokenDivergence"
    reads_head_shards = True
    terms = (
        Term("kd", "divergence from the teacher", "nats", better="lower"),
        Term("ce", "cross-entropy", "nats", exponential=Term("perplexity", "perplexity", headline=True)),
        Term("teacher_mass", "teacher's probability of its top K", "fraction"),
        Term("tail_mass", "student's probability outside the top K", "fraction"),
        Term("top1_agree", "top-1 agreement", "fraction", headline=True, better="higher"),
    )

    name: Literal["token_divergence"] = "token_divergence"
    targets: Literal["topk", "sampled", "full"] = "topk"
    divergence: str = "forward_kl"  # a row of kdscale_kernels.DIVERGENCES
    # its β or s; None: the default of that row
    divergence_parameter: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    ce_weight: Annotated[float | Schedule, Between(0.0, 1.0)] = 0.0
    # ce_weight is 1 at tokens where the teacher's entropy, in nats, is lower than this
    text_below_entropy: Annotated[float, Field(gt=0.0, le=20.0)] | None = None
    temperature: Annotated[float | Schedule, Between(1e-3, 1e3, above=True)] = 1.0
    top_k: Length = 64
    draws: Draws = 25  # of targets: sampled
    tail: Literal["bucket", "truncated", "renormalised"] = "bucket"

    @model_validator(mode="after")
    def _divergence_is_known(self) -> TokenDivergenceConfig:
        Divergence(self.divergence, self.divergence_parameter)
        return self

    @model_validator(mode="after")
    def _targets_fit(self) -> TokenDivergenceConfig:
        if self.targets != "topk" and self.tail != "bucket":
            raise ValueError(f"tail ({self.tail}) is about topk targets: leave it out with targets: {self.targets}")
        if self.targets != "topk" and self.text_below_entropy is not None:
            raise ValueError(f"text_below_entropy needs targets: topk, got {self.targets}")
        weighted = [name for name, row in DIVERGENCES.items() if row.takes_weights]
        if self.targets == "sampled" and self.divergence not in weighted:
            raise ValueError(f"divergence ({self.divergence}) must be {' or '.join(weighted)} with targets: sampled")
        return self

    @property
    def reads_labels(self) -> bool:
        """Where α is above 0, now or later in its schedule."""
        return self.ce_weight != 0.0

    @property
    def adds_up(self) -> bool:
        """Σ w·KL(p_i ‖ q) is KL(Σ w·p_i ‖ q) plus what does not depend on the student.

        Not where each teacher's own entropy decides about the text.
        """
        return self.divergence == "forward_kl" and self.text_below_entropy is None

    @property
    def needs(self) -> Needs:
        """The teacher's top K or tokens sampled at this temperature, or its whole distribution."""
        if self.targets == "full":
            return Needs(full=True)
        if self.targets == "sampled":
            return Needs(sampled=self.draws, temperature=self.temperature)
        return Needs(top_k=self.top_k, temperature=self.temperature, mass=self.tail != "renormalised")

    @property
    def formula(self) -> str:
        """`0.2·CE + 0.8·T²·forward_kl, T = 1, teacher's top 64, tail: bucket`."""
        listed = {
            "topk": f"teacher's top {self.top_k}, tail: {self.tail}",
            "sampled": f"{self.draws} tokens sampled from the teacher",
            "full": "whole vocabulary",
        }[self.targets]
        if isinstance(self.ce_weight, Schedule):
            parts = f"α·CE + (1−α)·T²·{self.divergence}, α = {self.ce_weight}"
        else:
            parts = f"{self.ce_weight:g}·CE + {1 - self.ce_weight:g}·T²·{self.divergence}"
        text = (
            f"; CE where the teacher's entropy is below {self.text_below_entropy:g}" if self.text_below_entropy else ""
        )
        return f"{parts}, T = {self.temperature:g}, {listed}{text}"


class CrossEntropyConfig(ObjectiveConfig):
    """Cross-entropy with the text's next token; alone it needs no teacher, and none is loaded."""

    implementation = "kdscale.distill.objectives.cross_entropy:CrossEntropy"
    reads_head_shards = True
    terms = (
        Term("ce", "cross-entropy", "nats", exponential=Term("perplexity", "perplexity", headline=True)),
        Term("top1_accuracy", "top-1 accuracy", "fraction", headline=True),
    )

    name: Literal["cross_entropy"] = "cross_entropy"


class PreferenceConfig(ObjectiveConfig):
    """DPO (arXiv 2305.18290) with the teacher's own margin between two answers as a soft label, or with hard labels."""

    implementation = "kdscale.distill.objectives.preference:Preference"
    count = "pairs"
    only_pairs = True
    terms = (
        Term("ranking_accuracy", "ranked as labelled", "fraction", headline=True),
        Term("ranking_margin", "margin of the better answer"),
        Term("label_confidence", "probability of the likelier label", "fraction"),
        Term("better_logprob", "log-probability a token of the better answer", "nats"),
    )

    name: Literal["preference"] = "preference"
    beta: Annotated[float, Field(gt=0.0, le=1e3)] = 0.1  # of the student's margin
    # which of two answers is better: sigmoid of the teacher's margin, its sign, or the file's choice
    labels: Literal["teacher", "ranked", "given"] = "teacher"
    teacher_beta: Annotated[float, Field(gt=0.0, le=1e3)] | None = None  # of the teacher's margin; null: beta
    smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0  # share of labels that are taken for wrong (cDPO)
    # what margins are over: the student as it began, or nothing (SimPO, arXiv 2405.14734)
    reference: Literal["start", "none"] = "start"
    length_normalised: bool = False  # log-probabilities are means over an answer's tokens, not sums
    target_margin: Annotated[float, Field(ge=0.0, le=1e3)] = 0.0  # by which the better answer shall lead (SimPO's γ)

    @property
    def reads_labels(self) -> bool:
        """Where the file says which answer is better: there is something to learn without a teacher."""
        return self.labels == "given"

    @property
    def adds_up(self) -> bool:
        """A mixture of teachers has another margin than the mixture of their margins."""
        return False

    @property
    def needs(self) -> Needs:
        """The teacher's probability of every token of both answers."""
        return Needs(label=self.labels != "given")

    @property
    def needs_reference(self) -> bool:
        """With a reference."""
        return self.reference == "start"

    @property
    def formula(self) -> str:
        """`−log σ(0.1·margin) of the better answer, labels: teacher (β 0.1), over the student as it began`."""
        beta = self.beta if self.teacher_beta is None else self.teacher_beta
        label = f"teacher (β {beta:g})" if self.labels == "teacher" else self.labels
        margin = f"{self.beta:g}·margin" + (f" − {self.target_margin:g}" if self.target_margin else "")
        over = "the student as it began" if self.reference == "start" else "nothing"
        mean = ", a token" if self.length_normalised else ""
        return f"−log σ({margin}) of the better answer{mean}, labels: {label}, over {over}"


class PolicyGradientConfig(ObjectiveConfig):
    """The reverse KL by its policy gradient: each token that the student wrote is rewarded by log p_T − log p_S."""

    implementation = "kdscale.distill.objectives.policy_gradient:PolicyGradient"
    terms = (
        Term("reverse_kl", "reverse KL on its tokens", "nats", headline=True, better="lower"),
        Term("ratio", "importance ratio"),
        Term("clipped", "tokens with a clipped ratio", "fraction"),
    )
    only_own_text = True

    name: Literal["policy_gradient"] = "policy_gradient"
    # the importance ratio p_S / p_S-as-it-wrote stays within 1 ± clip (PPO); null: no ratio (REINFORCE)
    clip: Annotated[float, Field(gt=0.0, le=10.0)] | None = 0.2
    baseline: Literal["none", "sequence"] = "none"  # taken off the rewards: nothing, or their mean over the sequence

    @property
    def reads_labels(self) -> bool:
        """It raises and lowers them by what the teacher says: alone they teach nothing."""
        return False

    @property
    def adds_up(self) -> bool:
        """A mixture of teachers has another reward than the mixture of their rewards."""
        return False

    @property
    def needs(self) -> Needs:
        """The teacher's probability of the tokens that were written."""
        return Needs(label=True)

    @property
    def formula(self) -> str:
        """What is minimised, in one line."""
        less = " − mean" if self.baseline == "sequence" else ""
        if self.clip is None:
            return f"−(log p_T − log p_S{less})·log p_S on the student's own tokens"
        return f"−(log p_T − log p_S{less})·ratio on the student's own tokens, ratio within 1 ± {self.clip:g}"


class UldConfig(ObjectiveConfig):
    """ULD: the distance between the sorted probabilities of tokens that only one of two tokenizers has."""

    implementation = "kdscale.distill.objectives.uld:Uld"
    terms = (
        Term("teacher_unmatched", "teacher's probability of tokens that the student lacks", "fraction"),
        Term("student_unmatched", "student's probability of tokens that the teacher lacks", "fraction"),
    )

    name: Literal["uld"] = "uld"
    top_k: Length = 64  # of either side the most likely count
    temperature: Annotated[float | Schedule, Between(1e-3, 1e3, above=True)] = 1.0
    # positions that the teacher's tokens are not aligned with: left out, or all tokens of both compared there
    unaligned: Literal["skip", "compare"] = "skip"

    @property
    def adds_up(self) -> bool:
        """A mixture of teachers has other sorted probabilities than each of them."""
        return False

    @property
    def needs(self) -> Needs:
        """Those of the teacher's top K that the student lacks."""
        return Needs(top_k=self.top_k, temperature=self.temperature, unmatched=True)

    @property
    def formula(self) -> str:
        """What is minimised, in one line."""
        return (
            f"Σ |p_(i) − q_(i)|, the {self.top_k} most likely of the tokens that only one has, T = {self.temperature:g}"
        )


OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "token_divergence": TokenDivergenceConfig,
    "cross_entropy": CrossEntropyConfig,
    "preference": PreferenceConfig,
    "policy_gradient": PolicyGradientConfig,
    "uld": UldConfig,
    "hidden_states": HiddenStatesConfig,
    "attention": AttentionConfig,
    "sentence_embeddings": SentenceEmbeddingsConfig,
    "classification": ClassificationConfig,
}


ObjectiveEntry = Annotated[
    SerializeAsAny[ObjectiveConfig],
    BeforeValidator(lambda entry: named_entry(entry, OBJECTIVES, ObjectiveConfig, "an objective")),
]


# The sections of what stands in place of text: what their columns begin with, and how titles of their figures end.
OWN_TEXT = {"on_policy": ("on_policy_", "on its own text"), "preferences": ("preferences_", "on pairs")}


def of_own_text(term: Term, section: str = "on_policy") -> Term:
    """The same figure, on what a section of OWN_TEXT puts in place of text."""
    (prefix, where), exponential = OWN_TEXT[section], term.exponential
    exponential = None if exponential is None else of_own_text(exponential, section)
    return replace(term, name=prefix + term.name, title=f"{term.title} {where}", exponential=exponential)


def log_columns(
    entries: Sequence[ObjectiveConfig], own: Sequence[ObjectiveConfig] = (), section: str = "on_policy"
) -> list[Term]:
    """The columns that every step logs for these objectives: the loss, each one's own if there are several, terms.

    `own`: those of `section`, a row of OWN_TEXT.
    """
    columns = [LOSS, *_columns_of(entries)]
    return columns + [of_own_text(term, section) for term in ([LOSS, *_columns_of(own)] if own else [])]


def _columns_of(entries: Sequence[ObjectiveConfig]) -> list[Term]:
    losses = [Term(entry.name, f"loss of {entry.name}") for entry in entries] if len(entries) > 1 else []
    return [*losses, *(term for entry in entries for term in entry.terms)]


def farther_from_teacher(terms: Sequence[Term], start: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
    """Distances to the teacher that grew since `start`: `divergence from the teacher 1.31 → 1.59`.

    Figures that read alike count as equal; one that is missing (it was not finite) is passed over.
    """
    out = []
    for term in terms:
        before, after = start.get(term.name, math.nan), now.get(term.name, math.nan)
        nearer = after < before if term.better == "lower" else after > before
        if not term.better or nearer or not (math.isfinite(before) and math.isfinite(after)):
            continue
        if term.text(before) != term.text(after):
            out.append(f"{term.text(before)} → {term.text(after).removeprefix(term.title).strip()}")
    return out


def check_objectives(entries: Sequence[ObjectiveConfig], masked: bool = False) -> None:
    """Raises ValueError unless every column of the log has one meaning, and for what cannot be with `masked` tokens."""
    if not entries:
        raise ValueError("objectives: expected at least one")
    if masked and (whole := [entry.name for entry in entries if entry.pools or entry.of_classes]):
        raise ValueError(f"masking: does not go with {whole[0]}, which reads whole texts")
    if pooled := [entry.name for entry in entries if entry.pools and any(other.of_classes for other in entries)]:
        raise ValueError(f"objectives: {pooled[0]} reads all positions of a text, and classification its first alone")
    names = [term.name for term in log_columns(entries)]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"objectives: each may appear once, and no two may log the same column; twice: {doubled}")
