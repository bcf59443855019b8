"""`data`: the text to train and measure on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kdscale.config.fields import Count, Section


class SourceConfig(Section):
    """One source of text: `builtin:classics`, a .jsonl/.jsonl.gz/.txt file, a folder or glob of these, or `hf:NAME`."""

    path: str = Field(min_length=1)
    field: str = "text"
    source_field: str | None = "source"  # names where each record comes from; None: the file's name does
    split: str = "train"  # only for hf:
    weight: Annotated[int, Field(ge=1, le=10_000)] = 1  # how often each document is repeated per epoch
    tag: Annotated[str, Field(min_length=1)] | None = (
        None  # names the source elsewhere; None: each document's label does
    )

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
    # Whether what the tokenizer puts around a text (BOS) begins each document and each window that continues one.
    add_special: Literal["auto", "never"] = "auto"
    processes: Annotated[int, Field(ge=1, le=256)] | None = None  # that tokenise; None: one per core for much text
    share: bool = True  # tokenised text with other runs of this user, in a cache folder
