"""`eval`: what is measured at the end."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kdscale.config.fields import Count, Dtype, Section


class EvalConfig(Section):
    """How much held-out text is scored, what the samples continue, and how speed is measured."""

    tokens: Count = 16_384
    seq_len: Count = 512
    micro_batch: Count = 4
    dtype: Dtype = "float32"
    prompts: tuple[str, ...] = Field(
        strict=False,
        default=(
            "The capital of France is",
            "Elizabeth was surprised, and said to her sister,",
            "And it came to pass in those days, that",
            "A computer program is",
        ),
    )
    sample_tokens: Count = 48
    # 0 is greedy, with which small models tend to loop; the draws are seeded and the same for every model
    sample_temperature: Annotated[float, Field(ge=0.0)] = 0.7
    sample_top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    efficiency: bool = True
    prefill_tokens: Count = 256
    decode_tokens: Count = 32
