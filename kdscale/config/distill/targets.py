"""What a student learns from: the parts of a teacher's targets, the sources that give them, `distill.served`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from kdscale.config.distill.schedules import Schedule, at
from kdscale.config.fields import Section
from kdscale_launch.environment import without_credentials

TEACHER_TOKEN = "teacher.token"  # in the run folder, where served.token_file says nothing else

ANY_NUMBER = sys.maxsize  # of top-K entries: as many as are asked for
EMBEDDINGS = -1  # the layer whose hidden states are those that enter layer 0
FINAL = -2  # the layer whose hidden states are those that leave the model, after its final norm
ALL_LAYERS = range(FINAL, sys.maxsize)
Draws = Annotated[int, Field(ge=1, le=4096)]  # tokens that are sampled of a position
MOST_LOGPROBS = 20  # that an endpoint gives with a token of an answer
TEXT = "text alone"  # what is learnt from where no part of a teacher's targets is needed


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Parts of the targets: those that an objective needs, or those that a source gives.

    Layers are the teacher's, counted from 0. An objective that chooses its layers when the models are known needs
    layer 0 until then.
    """

    top_k: int = 0  # most likely tokens per position; of a source: the most it gives
    sampled: int = 0  # tokens drawn from the teacher per position; of a source: the most it draws
    # of the top K's log-sum-exp and of the draws; None, of a source: any, also one that follows a schedule
    temperature: float | Schedule | None = 1.0
    full: bool = False  # the distribution over the whole vocabulary
    hidden_layers: Sequence[int] = ()  # hidden states after these layers
    attention_layers: Sequence[int] = ()  # attention of these layers
    label: bool = False  # the log-probability, at temperature 1, of the token that the text goes on with
    # the probability of all top K at that temperature; a source without it knows it at temperature 1 alone
    mass: bool = True
    # the probabilities of those of its top K that are no tokens of the student's: of a teacher with another tokenizer
    unmatched: bool = False

    def temperature_at(self, step: int | None) -> float:
        """The temperature of the top K at optimiser step `step`; None: at the end of its schedule."""
        assert self.temperature is not None
        return at(self.temperature, step)

    @property
    def nothing(self) -> bool:
        """Whether no part of a teacher's targets is needed."""
        layers = self.hidden_layers or self.attention_layers
        return not (self.top_k or self.sampled or self.full or self.label or layers)

    def missing_from(self, gives: Needs) -> str:
        """The parts needed here that a source with `gives` lacks, in words; "" when it gives all of them."""
        missing = []
        if self.top_k > gives.top_k:
            missing.append(f"the top {self.top_k} tokens (it gives {gives.top_k or 'none'})")
        if self.sampled > gives.sampled:
            missing.append(f"{self.sampled} sampled tokens (it gives {gives.sampled or 'none'})")
        if self.top_k and self.mass and self.temperature != 1.0 and not gives.mass:
            missing.append(f"the top K's mass at temperature {self.temperature:g} (tail: renormalised needs none)")
        sparse = (self.top_k and gives.top_k) or (self.sampled and gives.sampled)
        if sparse and gives.temperature not in (None, self.temperature):
            missing.append(f"targets at temperature {self.temperature} (it has those at {gives.temperature})")
        if self.full and not gives.full:
            missing.append("the distribution over the whole vocabulary")
        if self.label and not gives.label:
            missing.append("the probability of the text's own next token")
        if self.unmatched and not gives.unmatched:
            missing.append("the probabilities of tokens that the student lacks")
        for part, needed, given in (
            ("hidden states", self.hidden_layers, gives.hidden_layers),
            ("attention", self.attention_layers, gives.attention_layers),
        ):
            if layers := [layer for layer in needed if layer not in given]:
                missing.append(f"{part} of layers {layers}")
        return ", ".join(missing)

    def in_words(self) -> str:
        """These parts, for messages and the model card: `the teacher's top-K probabilities`."""
        parts = {
            "top-K probabilities": self.top_k > 0,
            "sampled tokens": self.sampled > 0,
            "probabilities over the whole vocabulary": self.full,
            "probability of the text's own tokens": self.label,
            "probabilities of tokens that the student lacks": self.unmatched,
            "hidden states": bool(self.hidden_layers),
            "attention": bool(self.attention_layers),
        }
        named = [part for part, wanted in parts.items() if wanted]
        return "the teacher's " + ", ".join(named) if named else TEXT


def combined(needs: Iterable[Needs]) -> Needs:
    """What satisfies all of `needs`. Raises ValueError when their sparse targets have different temperatures."""
    needs = list(needs)
    temperatures = list(dict.fromkeys(item.temperature for item in needs if item.top_k or item.sampled))
    if len(temperatures) > 1:
        raise ValueError(
            "objectives: those on the teacher's top K or on sampled tokens, of on_policy too, must have one "
            f"temperature, got {' and '.join(sorted(map(str, temperatures)))} (targets: full has none)"
        )
    return Needs(
        top_k=max((item.top_k for item in needs), default=0),
        sampled=max((item.sampled for item in needs), default=0),
        temperature=temperatures[0] if temperatures else 1.0,
        mass=any(item.mass for item in needs if item.top_k),
        full=any(item.full for item in needs),
        label=any(item.label for item in needs),
        unmatched=any(item.unmatched for item in needs),
        hidden_layers=sorted({layer for item in needs for layer in item.hidden_layers}),
        attention_layers=sorted({layer for item in needs for layer in item.attention_layers}),
    )


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source of targets, as the config knows it: one row of SOURCES.

    `open` names the function ("module:function") that opens it, with a teacher.source.SourceRequest; it is imported
    only then.
    """

    name: str
    gives: Needs
    placements: tuple[str, ...]  # the values of distill.teacher_placement that choose this source
    open: str
    in_process: bool = True  # the ranks run the teacher themselves (and may share its layers), with their FLOPs
    is_student: bool = False  # its model is the student's, as it is trained or as it was
    follows_student: bool = False  # its weights change with the student's, which each rank must have whole
    same_on_all_ranks: bool = True  # ranks that share the student's layers get the same bits for the same batch
    any_text: bool = True  # it also knows what was written during the training


SOURCES: dict[str, Source] = {
    row.name: row
    for row in (
        Source(
            name="online",
            gives=Needs(
                top_k=ANY_NUMBER,
                sampled=ANY_NUMBER,
                temperature=None,
                full=True,
                label=True,
                unmatched=True,  # where its tokens are not the student's
                hidden_layers=ALL_LAYERS,
                attention_layers=ALL_LAYERS,
            ),
            # all weights on every rank; a slice on each rank; once in each host's memory
            placements=("replicated", "partitioned", "offloaded"),
            open="kdscale.teacher.online:open_online",
        ),
        Source(
            name="served",
            gives=Needs(top_k=4096, temperature=None, unmatched=True),
            placements=("served",),
            open="kdscale.teacher.remote:open_served",
            in_process=False,
            same_on_all_ranks=False,
        ),
        Source(
            name="endpoint",
            gives=Needs(top_k=4096, temperature=None, mass=False, label=True),
            placements=("endpoint",),
            open="kdscale.teacher.endpoint:open_endpoint",
            in_process=False,
            same_on_all_ranks=False,
        ),
        # the log-probabilities that an endpoint gave with the answers of the stage responses
        Source(
            name="responses",
            gives=Needs(top_k=MOST_LOGPROBS, temperature=None, mass=False),
            placements=("responses",),
            open="kdscale.responses.answer_logprobs:open_responses",
            in_process=False,
            any_text=False,
        ),
        Source(
            name="cached",
            gives=Needs(
                top_k=ANY_NUMBER, sampled=ANY_NUMBER, temperature=None, full=True
            ),  # what of it, the codec of the store says
            placements=("cached",),
            open="kdscale.teacher.store.cached:open_cached",
            in_process=False,
            any_text=False,
        ),
        # the average of the student's own weights, made anew after every step
        Source(
            name="ema",
            gives=Needs(top_k=ANY_NUMBER, sampled=ANY_NUMBER, temperature=None, full=True, label=True),
            placements=("ema",),
            open="kdscale.teacher.own_weights:open_ema",
            is_student=True,
            follows_student=True,
        ),
        # the student itself without its adapters (distill.lora): no second copy of any weight
        Source(
            name="base",
            gives=Needs(top_k=ANY_NUMBER, sampled=ANY_NUMBER, temperature=None, full=True, label=True),
            placements=("base",),
            open="kdscale.teacher.own_weights:open_base",
            is_student=True,
        ),
        # several teachers, each from a source of its own: where distill.teachers has any
        Source(name="several", gives=Needs(), placements=(), open="kdscale.teacher.several:open_several"),
        # no teacher at all: the source where the objectives need none, whatever teacher_placement says
        Source(name="text", gives=Needs(), placements=(), open="kdscale.teacher.source:open_text", in_process=False),
    )
}
SEVERAL, TEXT_ALONE = SOURCES["several"], SOURCES["text"]


def placements() -> list[str]:
    """Every value of distill.teacher_placement."""
    return [placement for source in SOURCES.values() for placement in source.placements]


def source_of(placement: str) -> Source:
    """The source that a value of distill.teacher_placement chooses. Raises ValueError for an unknown one."""
    for source in SOURCES.values():
        if placement in source.placements:
            return source
    raise ValueError(f"expected one of {', '.join(placements())}")


PlacementName = Annotated[str, AfterValidator(lambda name: source_of(name) and name)]


def check_source(placement: str, needs: Needs) -> None:
    """Raises ValueError when the source that `placement` chooses lacks something of `needs`; names those that do."""
    if missing := needs.missing_from(source_of(placement).gives):
        able = [other for other in placements() if not needs.missing_from(source_of(other).gives)]
        raise ValueError(
            f"teacher_placement: {placement} does not give what the objectives need: {missing}; "
            + (f"use {' or '.join(able)}" if able else "no source of targets does")
        )


class ServedConfig(Section):
    """Where `kdscale serve-teacher` answers, for distill.teacher_placement: served."""

    urls: tuple[str, ...] = Field(strict=False, default=())  # http://HOST:PORT; several share the questions
    token_file: str | None = None  # None: teacher.token in the run folder
    timeout: Annotated[float, Field(gt=0.0, le=30 * 86_400.0)] = 600.0  # seconds without an answer from any of them

    def token_path(self, run_dir: Path) -> Path:
        """The file that holds the token, of a run in `run_dir`."""
        return Path(self.token_file) if self.token_file else run_dir / TEACHER_TOKEN

    @model_validator(mode="after")
    def _urls_are_urls(self) -> ServedConfig:
        wrong = [url for url in self.urls if not url.startswith(("http://", "https://"))]
        if wrong:
            raise ValueError(f"urls: expected http://HOST:PORT, got {without_credentials(', '.join(wrong))}")
        return self
