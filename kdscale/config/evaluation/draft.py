"""`eval.draft`: the students as drafts that speed up the teacher by speculative decoding; null: not measured."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from kdscale.config.fields import Few, Length, Section


class DraftConfig(Section):
    """For which draft lengths the speed-up is predicted, and how much is really generated."""

    # how many tokens a draft writes before the teacher checks them
    lengths: tuple[Few, ...] = Field(strict=False, min_length=1, max_length=16, default=(1, 2, 4, 8))
    # the draft length with which the teacher really continues eval.prompts, greedily and at temperature 1; null: none
    generate_length: Few | None = 4
    new_tokens: Length = 48  # of each prompt
    repeats: Annotated[int, Field(ge=1, le=1000)] = 9  # timings of a step, of which the median counts

    @field_validator("lengths")
    @classmethod
    def _in_order(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if list(values) != sorted(set(values)):
            raise ValueError("expected different numbers in ascending order")
        return values

    @model_validator(mode="after")
    def _generates_more_than_a_draft(self) -> DraftConfig:
        if self.generate_length is not None and self.new_tokens <= self.generate_length:
            raise ValueError(
                f"new_tokens ({self.new_tokens}) must be above generate_length ({self.generate_length}): a draft that "
                "the end of the text cuts short does not count"
            )
        return self
