"""`distill.lora`: low-rank adapters are trained beside frozen weights; null: all weights are trained."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from kdscale.config.fields import Few, Section


class LoraConfig(Section):
    """Adapters of linear maps within the layers (LoRA, arXiv 2106.09685): W + scale·B·A, of which A and B are trained.

    They begin as zero, so that the student begins as it was pruned, and are added to its weights when it is written.
    """

    rank: Few = 16
    alpha: Annotated[float, Field(gt=0.0, le=1e6)] = 32.0
    rank_stabilised: bool = False  # scale alpha/√rank (arXiv 2312.03732) in place of alpha/rank
    # the last part of the names of the maps that get adapters, such as q_proj; empty: all linear maps of the layers
    targets: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$", max_length=100)], ...] = Field(
        strict=False, max_length=100, default=()
    )

    @property
    def scale(self) -> float:
        """What B·A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    @property
    def in_words(self) -> str:
        """`rank 16, alpha 32, of q_proj, v_proj`, for the model card."""
        scaled = ", rank-stabilised" if self.rank_stabilised else ""
        return f"rank {self.rank}, alpha {self.alpha:g}{scaled}, of {', '.join(self.targets) or 'all linear maps'}"

    def problems(self, *, tensor_parallel: int, on_a_grid: bool, averaged: bool, sent_whole: bool) -> list[str]:
        """What of the other settings adapters cannot do with."""
        refused = {
            "tensor_parallel above 1, whose ranks have slices of the adapted maps": tensor_parallel > 1,
            "fake_quantize, as the merged weights would not be on the grid": on_a_grid,
            "teacher_placement: ema, an average of weights that do not change": averaged,
            "on_policy.writer: vllm, which is sent whole weights": sent_whole,
        }
        return [f"lora: does not go with {name}" for name, unsupported in refused.items() if unsupported]


def base_problems(
    lora: LoraConfig | None, *, zero_stage: int, several: bool, reads_labels: bool, ranks_pairs: bool
) -> list[str]:
    """What keeps the student without its adapters from being a teacher (teacher_placement: base)."""
    base = "teacher_placement: base"
    refused = {
        f"{base} is the student without its adapters: it needs a section lora": lora is None,
        f"{base} is for the run's own teacher alone, not for one of several": several,
        f"{base} does not go with zero_stage: 3: use replicated, or stage 2": zero_stage == 3,
        f"{base} begins as the student itself, which would have nothing to learn: give ce_weight": not reads_labels,
        f"{base} has no margin over reference: start, which it is itself: use labels: given": ranks_pairs,
    }
    return [problem for problem, applies in refused.items() if applies]
