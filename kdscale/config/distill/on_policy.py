"""What stands in place of some of the run's text: sequences that the student writes, or pairs of answers.

`distill.on_policy`: the student writes, and the teacher scores what it wrote. `distill.preferences`: pairs of answers,
given or written by the student. null: the run's text alone teaches.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from kdscale.config.data import PromptSourceConfig
from kdscale.config.distill.objectives import (
    ObjectiveEntry,
    PreferenceConfig,
    TokenDivergenceConfig,
    check_objectives,
)
from kdscale.config.distill.schedules import Between, Schedule, at
from kdscale.config.endpoint import EndpointConfig
from kdscale.config.fields import Count, Few, Length, Section

_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
REVERSE_KL = TokenDivergenceConfig(divergence="reverse_kl", targets="full")


class VllmConfig(Section):
    """A vLLM server that writes with the student's weights, which are put into a folder that it can read."""

    endpoint: EndpointConfig = EndpointConfig()
    weights: Annotated[str, Field(min_length=1)] | None = None  # null: work/on-policy-weights in the run folder
    concurrency: Few = 64  # requests under way at a time, a rank
    retries: Annotated[int, Field(ge=0, le=1000)] = 8


class OnPolicyConfig(Section):
    """Sequences that the student writes itself (GKD, arXiv 2306.13649), and what it learns on them."""

    section: ClassVar[str] = "on_policy"
    answers: ClassVar[int] = 1  # to each prompt

    # of each step's sequences; a schedule begins where the phase does
    share: Annotated[float | Schedule, Between(0.0, 1.0, above=True)] = 0.5
    start: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # share of the run's steps before the first of them
    every: Count = 8  # steps that learn from one round of writing, which has the weights of the first of them
    # files of prompts; empty: pieces of the run's own text, and of a chat what comes before an answer
    prompts: tuple[PromptSourceConfig, ...] = Field(strict=False, max_length=1000, default=())
    system: str | None = Field(min_length=1, max_length=100_000, default=None)  # begins prompts that have none
    prompt_tokens: Length = 64  # of a piece of text; of a prompt from a file, the most
    max_new_tokens: Length = 128
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] = 1.0  # 0: the most likely token
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    # of what the student wrote: all, or where its distribution had the highest entropy
    positions: Literal["all", "entropy"] = "all"
    position_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5  # of each answer, with positions: entropy
    # their weighted sum is the loss of these sequences
    objectives: tuple[ObjectiveEntry, ...] = Field(strict=False, default=(REVERSE_KL,))
    writer: Literal["local", "vllm"] = "local"  # the ranks themselves, through transformers; or a server
    micro_batch: Few = 8  # prompts that a rank goes on with at a time
    vllm: VllmConfig = VllmConfig()
    validate_prompts: Annotated[int, Field(ge=0, le=65_536)] = 8  # held out; answered anew at every validation

    @model_validator(mode="after")
    def _it_learns_from_the_teacher(self) -> OnPolicyConfig:
        check_objectives(self.objectives)
        for entry in self.objectives:
            if entry.only_pairs:
                raise ValueError(f"objectives: {entry.name} compares two answers: put it in distill.preferences")
            if entry.reads_labels:
                raise ValueError(
                    f"objectives: {entry.name} ({entry.formula}) would teach the student its own tokens: leave out "
                    "what learns from the text (ce_weight, cross_entropy)"
                )
            if entry.matches_layers or entry.count != "tokens":
                raise ValueError(f"objectives: {entry.name} is for the run's text alone")
        return self

    @model_validator(mode="after")
    def _somebody_writes(self) -> OnPolicyConfig:
        if self.writer == "vllm" and (missing := self.vllm.endpoint.missing()):
            raise ValueError(f"writer: vllm needs vllm.endpoint.{' and vllm.endpoint.'.join(missing)}")
        if self.writer == "vllm" and self.positions == "entropy":
            raise ValueError(
                "positions: entropy needs writer: local, as a server does not tell the whole distribution's entropy"
            )
        return self

    @property
    def answers_a_sequence(self) -> int:
        """How many tokens a prompt and its answer take at most."""
        return self.prompt_tokens + self.max_new_tokens

    @property
    def least_sequence(self) -> int:
        """How many tokens a sequence must have for all answers to one prompt."""
        return self.answers * self.answers_a_sequence

    def prompts_a_sequence(self, seq_len: int) -> int:
        """How many prompts a sequence of `seq_len` positions has room for, with their answers."""
        return seq_len // self.least_sequence

    def first_step(self, steps: int) -> int:
        """The first step, from 0, of a run of `steps` that may have such sequences."""
        return min(round(self.start * steps), steps - 1)

    def sequences_at(self, step: int, steps: int, global_batch: int) -> int:
        """How many of step `step`'s sequences the student writes; the mean over steps is the share, on any of them.

        What is left of a sequence at each step adds up to whole ones at steps that the golden ratio spreads evenly.
        """
        first = self.first_step(steps)
        if step < first:
            return 0
        share = self.share.in_steps(steps - first) if isinstance(self.share, Schedule) else self.share
        return min(global_batch, math.floor(at(share, step - first) * global_batch + step * _GOLDEN % 1.0))

    def round_of(self, step: int, steps: int) -> int:
        """The step whose weights write the sequences of step `step`."""
        first = self.first_step(steps)
        return first + (step - first) // self.every * self.every

    def decisive(self) -> dict[str, Any]:
        """The settings that the student's values depend on: all but how the writing is done, and what is measured."""
        plain = self.model_dump(mode="json")
        return {key: value for key, value in plain.items() if key not in FREE_ON_POLICY}

    @property
    def in_words(self) -> str:
        """`from 60 % of the steps on, 50 % of the sequences by the student itself: ...`, for the model card."""
        share = f"{self.share:.0%}" if isinstance(self.share, float) else str(self.share)
        when = f"from {self.start:.0%} of the steps on, " if self.start else ""
        losses = " + ".join(
            f"{entry.weight:g} × ({entry.formula})" if len(self.objectives) > 1 else entry.formula
            for entry in self.objectives
        )
        return f"{when}{share} of the sequences written by the student, anew every {self.every} steps: {losses}"


class PairSourceConfig(Section):
    """A .jsonl or .jsonl.gz file of records with `prompt`, `chosen` and `rejected`, as texts or as chats."""

    path: str = Field(min_length=1)


class PreferencesConfig(OnPolicyConfig):
    """Sequences of pairs of answers to a prompt, in place of text, and what the student learns of them.

    With `pairs` the pairs are those of files. Without, the student writes two answers to each prompt, and the teacher
    says which is better: all that on_policy has about prompts and writing counts here too.
    """

    section: ClassVar[str] = "preferences"
    answers: ClassVar[int] = 2

    pairs: tuple[PairSourceConfig, ...] = Field(strict=False, max_length=1000, default=())
    objectives: tuple[ObjectiveEntry, ...] = Field(strict=False, default=(PreferenceConfig(),))

    @model_validator(mode="after")
    def _it_learns_from_the_teacher(self) -> PreferencesConfig:
        check_objectives(self.objectives)
        for entry in self.objectives:
            if entry.only_own_text and self.pairs:
                raise ValueError(f"objectives: {entry.name} is for what the student wrote itself, not for given pairs")
            if entry.only_pairs:
                continue
            if entry.reads_labels:
                raise ValueError(f"objectives: {entry.name} ({entry.formula}) would teach the worse answers too")
            if entry.matches_layers or entry.count != "tokens":
                raise ValueError(f"objectives: {entry.name} is for the run's text alone")
        return self

    @model_validator(mode="after")
    def _pairs_have_labels(self) -> PreferencesConfig:
        given = [entry for entry in self.objectives if isinstance(entry, PreferenceConfig) and entry.labels == "given"]
        if given and not self.pairs:
            raise ValueError("objectives: labels: given needs pairs, files that say which answer is better")
        if self.pairs and self.prompts:
            raise ValueError("pairs: have prompts of their own: leave prompts out, or pairs")
        if self.positions != "all":
            raise ValueError(f"positions ({self.positions}): answers are compared whole: use all")
        return self

    @property
    def needs_reference(self) -> bool:
        """Whether an objective reads what the student as it began gives the answers."""
        return any(entry.needs_reference for entry in self.objectives)

    @property
    def in_words(self) -> str:
        """`50% of the sequences pairs of answers of the student, ...: ...`, for the model card."""
        words = super().in_words
        if self.pairs:
            every = f"written by the student, anew every {self.every} steps"
            return words.replace(every, "pairs of answers from files")
        return words.replace("written by", "pairs of answers of")


# A run may change these and go on. Local batches of another size round otherwise, as other ranks do.
FREE_ON_POLICY = {"micro_batch", "vllm", "validate_prompts"}
