"""`eval.speed`: with how many sequences of which length speed is measured, and for how long."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from kdscale.config.fields import Few, Length, Section


class SpeedConfig(Section):
    """What is measured of each model: every batch size with every context length, as far as `seconds` allow."""

    batch_sizes: tuple[Few, ...] = Field(strict=False, min_length=1, max_length=16, default=(1, 4))
    context_lengths: tuple[Length, ...] = Field(strict=False, min_length=1, max_length=16, default=(128, 512))
    new_tokens: Length = 32
    # at most; with less than `seconds` allow, the quickest to measure are repeated first
    repeats: Few = 5
    # up to how many sequences the batch is doubled in search of the highest throughput; None: that is not measured
    max_batch_size: Few | None = 256
    # for each model, on average; the smallest batch and context are measured in any case
    seconds: Annotated[float, Field(gt=0.0, le=86_400.0)] = 10.0
    # on a GPU: decode by a recorded graph, which starts all kernels of a step at once, as serving engines do
    cuda_graphs: bool = False

    @field_validator("batch_sizes", "context_lengths")
    @classmethod
    def _in_order(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if list(values) != sorted(set(values)):
            raise ValueError("expected different numbers in ascending order")
        return values

    @property
    def longest(self) -> int:
        """The most positions that a sequence takes."""
        return self.context_lengths[-1] + self.new_tokens
