"""`distill.teachers`: several teachers, mixed by weight or chosen by the source of the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from kdscale.config.distill.objective import ObjectiveConfig
from kdscale.config.distill.targets import PlacementName, ServedConfig, source_of
from kdscale.config.endpoint import EndpointConfig
from kdscale.config.fields import Name, Section

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class EmaConfig(Section):
    """The average of the student's weights that teaches it, for teacher_placement: ema."""

    decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999  # what a step leaves of it


class AlignmentConfig(Section):
    """How a teacher with another tokenizer than the student's is understood, and when it is refused."""

    # where the probability of its tokens goes that the student does not have: to the one that such a token begins
    # with, or to none (the tail)
    other_pieces: Literal["first_token", "tail"] = "first_token"
    # the least shares of held-out tokens that are one token in both, and of the teacher's probability on such tokens
    min_same_tokens: Share = 0.5
    min_same_probability: Share = 0.5


class SourceSettings(Section):
    """Where a teacher's targets come from: of the run's own teacher in `distill`, of each of several in `teachers`."""

    # chooses the source of targets (config.distill.targets.SOURCES) and where it keeps the teacher's weights
    teacher_placement: PlacementName = "replicated"
    served: ServedConfig = ServedConfig()
    endpoint: EndpointConfig = EndpointConfig()  # for teacher_placement: endpoint
    ema: EmaConfig = EmaConfig()

    @property
    def follows_student(self) -> bool:
        """Whether this teacher is made of the student's weights."""
        return source_of(self.teacher_placement).follows_student


# the fields of distill that are about teachers
TEACHER_SETTINGS = {"teacher", "teachers", "teacher_dtype", "teacher_overlap", *SourceSettings.model_fields}


class TeacherEntry(SourceSettings):
    """One of several teachers.

    A teacher with tags teaches the documents of the sources with these tags; one without teaches those of all sources
    that no other teacher names. Where several teach the same documents, their weights count in proportion.
    """

    name: Name
    path: str | None = Field(default=None, min_length=1)  # None: the run's own teacher
    revision: str | None = None  # only for a hub id
    weight: Annotated[float, Field(gt=0.0, le=1e6)] = 1.0
    tags: tuple[str, ...] = Field(strict=False, default=())
    alignment: AlignmentConfig = AlignmentConfig()  # for one with another tokenizer

    def decisive(self) -> dict[str, Any]:
        """The settings that the student's values depend on; which model it is, its files say."""
        decisive = self.model_dump(mode="json", include={"name", "weight", "tags", "ema"})
        if self.alignment.other_pieces != AlignmentConfig().other_pieces:  # runs of older versions go on
            decisive["other_pieces"] = self.alignment.other_pieces
        return decisive

    @property
    def in_words(self) -> str:
        """`coder (weight 2, for code, tests)`, for the model card."""
        return f"{self.name} (weight {self.weight:g}" + (f", for {', '.join(self.tags)})" if self.tags else ")")


def shares(teachers: Sequence[TeacherEntry], tag: str) -> dict[str, float]:
    """What each teacher, by name, counts for documents of sources with this tag; sums to 1, or empty without any."""
    named = [entry for entry in teachers if tag in entry.tags] or [entry for entry in teachers if not entry.tags]
    total = sum(entry.weight for entry in named)
    return {entry.name: entry.weight / total for entry in named}


def most_at_once(teachers: Sequence[TeacherEntry]) -> int:
    """How many teachers a document can have at most."""
    tags = {tag for entry in teachers for tag in entry.tags}
    everywhere = sum(not entry.tags for entry in teachers)
    return max([everywhere, *(sum(tag in entry.tags for entry in teachers) for tag in tags)])


def check_teachers(teachers: Sequence[TeacherEntry], objectives: Sequence[ObjectiveConfig]) -> None:
    """Raises ValueError for names that are not distinct, and for objectives that cannot learn from several teachers."""
    names = [entry.name for entry in teachers]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"teachers: every name once; twice: {', '.join(doubled)}")
    for teacher in teachers:
        if teacher.follows_student and teacher.path:
            raise ValueError(
                f"teachers ({teacher.name}): teacher_placement: ema is the student's average, not a path's"
            )
    if sum(teacher.follows_student for teacher in teachers) > 1:
        raise ValueError("teachers: one average of the student (teacher_placement: ema) at most")
    for entry in objectives:
        if entry.needs.unmatched:
            check_unmatched(teachers, entry.name)
        if teachers and entry.matches_layers:
            raise ValueError(f"teachers: the objective {entry.name} matches layers of one teacher, not of several")
        if most_at_once(teachers) > 1 and not entry.adds_up:
            raise ValueError(
                f"teachers: the objective {entry.name} ({entry.formula}) is not defined on a mixture of teachers; use "
                "divergence: forward_kl, or give each source of text one teacher by tags"
            )


def check_unmatched(teachers: Sequence[TeacherEntry], objective: str) -> None:
    """Raises ValueError where no probability stays unmatched, which this objective compares."""
    if not teachers:
        raise ValueError(
            f"objectives ({objective}): it compares tokens that only one of two tokenizers has: list the teacher with "
            "the other one in teachers"
        )
    if projected := [entry.name for entry in teachers if entry.alignment.other_pieces != "tail"]:
        raise ValueError(
            f"teachers ({', '.join(projected)}): the objective {objective} compares tokens that the student lacks: set "
            "alignment.other_pieces: tail, so that their probability counts once"
        )
