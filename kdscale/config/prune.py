"""`importance` and `prune`: what is measured, what is cut, and how the shape is found."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from kdscale.config.calibration import CalibrationSection
from kdscale.config.candidate_scores import CandidateScore, CandidateScoreName, candidate_score
from kdscale.config.criteria import Criterion, FfnMethod, HeadMethod, HiddenMethod, LayerMethod, SsmMethod, criterion
from kdscale.config.fields import Count, Length, Section
from kdscale.units import BUDGET_FIELDS, parse_budget


class ImportanceConfig(CalibrationSection):
    """On how much text importance is measured, and how; `processes` share the text in compensation too."""

    calibration_tokens: Count = 32_768
    # of the calibration tokens, for prune.layer_method one_by_one and loss (which keep a state a layer for each) and
    # angular
    layer_tokens: Count = 4_096


Compensation = Literal["none", "ridge", "two_stream"]
PlannedRepair = Literal["none", "linear"]
LayerRepair = Literal["auto", PlannedRepair]
PrunedAxis = Literal[
    "hidden", "ffn", "heads", "kv_heads", "layers", "experts", "ssm_heads", "ssm_head_dim", "ssm_state"
]  # fmt: skip
PRUNED_AXES: tuple[PrunedAxis, ...] = get_args(PrunedAxis)  # each is a field of PruneConfig: the size to keep


class SearchConfig(Section):
    """How the shapes that meet a budget are compared; each score is more expensive and computed for fewer shapes."""

    # this many of the best predicted shapes are run masked on calibration text; 0: the prediction alone decides
    masked_candidates: Annotated[int, Field(ge=0, le=64)] = 8
    masked_tokens: Count = 4_096
    # what puts the masked candidates in order (`acceptance`: of a draft's tokens by the teacher, at temperature 1), and
    # for `task`: tasks as eval.downstream.tasks takes them, and how many items of each
    score: CandidateScoreName = "kl"
    tasks: tuple[Annotated[str, Field(min_length=1, max_length=1024)], ...] = Field(
        strict=False, max_length=256, default=()
    )
    task_items: Annotated[int, Field(ge=2, le=1_000_000)] = 64
    # distil so many tokens into each finalist, keep the better half, double the tokens; None: no probes
    probe_tokens: Count | None = None
    probe_candidates: Annotated[int, Field(ge=2, le=16)] = 4
    # latency is measured with a prompt this long, and for one more token after it
    context_tokens: Length = 256

    @property
    def candidate_score(self) -> CandidateScore:
        """What puts the masked candidates in order."""
        return candidate_score(self.score)

    @property
    def compares(self) -> bool:
        """Whether another score than the default was asked for, which means nothing without candidates to compare."""
        return self.score != SearchConfig.model_fields["score"].default

    @model_validator(mode="after")
    def _tasks_go_with_the_score(self) -> SearchConfig:
        if self.candidate_score.asks and not self.tasks:
            raise ValueError(f"tasks: score {self.score} needs tasks, such as [builtin]")
        if self.compares and self.masked_candidates < 2:
            raise ValueError(
                f"masked_candidates ({self.masked_candidates}) must be at least 2 where score is {self.score}: it "
                "compares masked candidates"
            )
        if self.tasks and not self.candidate_score.asks:
            raise ValueError(f"tasks: expected with score task alone, and score is {self.score}")
        if twice := [task for task in dict.fromkeys(self.tasks) if self.tasks.count(task) > 1]:
            raise ValueError(f"tasks: expected every task once, got {', '.join(twice)} twice")
        return self


class PruneConfig(Section):
    """The budget and the axes. Sizes that are given are fixed; the search chooses the sizes of the open axes."""

    # "4B" (absolute) or "50%" (of the teacher), of the parameters that `count` names
    target_params: str | None = None
    # upper limits instead: "8GiB" of weights on disk, "32KiB" of 16-bit KV cache per token, "12ms" per decoded token or
    # per prompt; each may also be a share of the teacher's
    target_bytes: str | None = None
    target_kv_bytes: str | None = None
    target_decode: str | None = None
    target_prefill: str | None = None
    count: Literal["non_embedding", "total"] = "total"
    tolerance: Annotated[float, Field(gt=0.0, le=0.2)] = 0.03
    # axes that may be cut when a target is given; sizes given below are fixed and need not be listed
    axes: tuple[PrunedAxis, ...] = Field(strict=False, default=("ffn", "heads"))
    hidden: Length | None = None
    ffn: Length | None = None
    heads: Length | None = None
    kv_heads: Length | None = None
    layers: Length | None = None
    experts: Length | None = None  # of a mixture of experts; how many each token is routed to does not change
    # heads of Mamba 2, or value heads of a gated delta net; each group of theirs keeps as many
    ssm_heads: Length | None = None
    ssm_head_dim: Length | None = None  # how wide each of them is: the same channels of all heads of a layer
    ssm_state: Length | None = None  # how wide B and C of Mamba 2 are: the same channels of all groups of a layer
    # smallest step on each axis; None picks 256/256/1 for real sizes and 32/32/1 for small models
    hidden_divisor: Length | None = None
    ffn_divisor: Length | None = None
    ssm_head_dim_divisor: Length | None = None  # None: 8
    ssm_state_divisor: Length | None = None  # None: 16
    experts_divisor: Length | None = None  # None: 8 from 64 experts on, 1 below
    # every width that a linear map reads is a multiple of this; None: of the largest group of quantize.forms
    multiple_of: Length | None = None
    ffn_method: FfnMethod = "output_energy"
    head_method: HeadMethod = "output_energy"
    ssm_method: SsmMethod = "output_energy"
    # auto: refit (the residual stream cut to its principal components, all that reads and writes it refitted), else pca
    # (the stream rotated into them, a head of its own), else activation, as the family and the other fields allow
    hidden_method: HiddenMethod = "auto"
    # auto: one_by_one, or angular where contiguous_layers is true
    layer_method: LayerMethod = "auto"
    # drop one contiguous block of layers (as from Llama-3.1-8B to 4B by depth) instead of the lowest-scored layers
    # anywhere; angular always drops one block, one_by_one never does
    contiguous_layers: bool | None = None
    # linear: the down projection before dropped layers is refitted to add what those layers added; auto: linear in
    # dense models unless compensate is none
    layer_repair: LayerRepair = "auto"
    compensate: Compensation = "two_stream"
    # how much of the student's stream's error so far each projection is asked to undo (two_stream only)
    stream_correction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    ridge_lambda: Annotated[float, Field(gt=0.0, le=1e6)] = 1e-2
    # heads that predict several tokens ahead go along with a student that is cut by depth alone; false: left out
    keep_mtp: bool = False
    max_shard_bytes: Count = 5_000_000_000
    search: SearchConfig = SearchConfig()

    @field_validator(*BUDGET_FIELDS)
    @classmethod
    def _target_parses(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None:
            parse_budget(value, BUDGET_FIELDS[str(info.field_name)])
        return value

    @model_validator(mode="after")
    def _says_what_to_cut(self) -> PruneConfig:
        given = [name for name in BUDGET_FIELDS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one target, not {' and '.join(given)}; sizes may be fixed beside it")
        if not given and self.search.compares:
            raise ValueError(
                f"search.score {self.search.score} compares shapes that meet a target, and there is none: give one, or "
                "leave search.score out"
            )
        if self.contiguous_layers and self.criterion("layers").in_order:
            raise ValueError(
                f"contiguous_layers: layer_method {self.layer_method} chooses layers one by one; leave this out, or "
                "give another layer_method"
            )
        if self.criterion("layers").scores_blocks and self.contiguous_layers is False:
            raise ValueError(
                f"contiguous_layers: layer_method {self.layer_method} drops one contiguous block; leave this out"
            )
        return self

    @property
    def cuts(self) -> bool:
        """Whether it says what to cut; a run without a ready student has to."""
        return self.target is not None or any(getattr(self, axis) for axis in PRUNED_AXES)

    def check_says_what_to_cut(self) -> None:
        """Raises ValueError where it does not."""
        if not self.cuts:
            raise ValueError(
                f"prune: give target_params or another target, or at least one of {', '.join(PRUNED_AXES)}; or a ready "
                "student (student.path)"
            )

    @property
    def target(self) -> tuple[str, str] | None:
        """The target that was given, as (field, text)."""
        return next(((name, getattr(self, name)) for name in BUDGET_FIELDS if getattr(self, name) is not None), None)

    @property
    def is_timed(self) -> bool:
        """Whether the target is a latency, which has to be measured."""
        return self.target_decode is not None or self.target_prefill is not None

    def criterion(self, axis: str) -> Criterion:
        """The criterion that ranks `axis`.

        `hidden_method: auto` stands for `pca` or `activation` only once the family is known (search/hidden_basis.py
        decides); until then it means `activation`, the first row of the axis.
        """
        method = {
            "ffn": self.ffn_method,
            "heads": self.head_method,
            "ssm_heads": self.ssm_method,
            "hidden": None if self.hidden_method == "auto" else self.hidden_method,
            "layers": self._layer_method(),
        }.get(axis)
        return criterion(axis, method)

    def _layer_method(self) -> str:
        if self.layer_method != "auto":
            return self.layer_method
        return "angular" if self.contiguous_layers else "one_by_one"
