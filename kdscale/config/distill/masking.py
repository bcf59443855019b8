"""`distill.masking`: which tokens are hidden from an encoder, which learns to tell them; and what else it may tell."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kdscale.config.fields import Section

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class MaskingConfig(Section):
    """Masked language modelling, as BERT does it (arXiv 1810.04805): other tokens whenever a text comes again."""

    share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15  # of the tokens that are hidden
    random: Share = 0.1  # of them: a random token in place of the mask
    same: Share = 0.1  # of them: the token itself

    @model_validator(mode="after")
    def _shares_are_of_one(self) -> MaskingConfig:
        if self.random + self.same > 1.0:
            raise ValueError(f"random ({self.random}) and same ({self.same}) must be at most 1 together")
        return self


# What an encoder tells: hidden tokens, or the class of each document.
EncoderTask = MaskingConfig | Literal["classes"]
