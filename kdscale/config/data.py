"""`data`: the text to train and measure on."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from kdscale.config.fields import Count, Section


class SourceConfig(Section):
    """One source of text: `builtin:classics`, a .jsonl/.jsonl.gz/.txt file, a folder or glob of these, or `hf:NAME`."""

    path: str = Field(min_length=1)
    field: str = "text"
    split: str = "train"  # only for hf:
    weight: Annotated[int, Field(ge=1, le=10_000)] = 1  # how often each document is repeated per epoch

    @model_validator(mode="after")
    def _hub_sets_have_names(self) -> SourceConfig:
        if self.path.startswith("hf:") and not self.path.removeprefix("hf:").strip():
            raise ValueError("path: expected hf:NAME, the name of a data set on the hub")
        return self


class DataConfig(Section):
    """What is trained and measured on, and how documents are held out."""

    sources: tuple[SourceConfig, ...] = Field(
        strict=False, min_length=1, max_length=1000, default=(SourceConfig(path="builtin:classics"),)
    )
    # Held-out documents are chosen by a hash of their text, so the split stays the same when sources are added.
    heldout_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.05
    heldout_sources: tuple[SourceConfig, ...] = Field(
        strict=False, max_length=1000, default=()
    )  # if given, used instead of the fraction
    max_document_tokens: Count | None = None
