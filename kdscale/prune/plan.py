"""The plan: which units stay, on every axis, and why. No torch, no weights; a file that a person may read and edit.

The search (prune/search) decides, `apply` only executes. An edited plan.json is checked before a weight is read:
indices in range, sorted and unique; as many as the shape says; the same number of query heads in every kv group; a
shape that the family allows; the parameter counts of that shape.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from kdscale.config.criteria import FOLLOWED, methods
from kdscale.config.fields import shown
from kdscale.config.prune import Compensation, PlannedRepair
from kdscale.errors import ConfigError
from kdscale.families import Dims, Family
from kdscale.families.dims import LAYERS_FIRST, NEVER_CUT, SHAPE_AXES
from kdscale.files import read_text, write_text
from kdscale.prune.candidates import PlanSection, ShapeCandidate, Size

SearchResult = Literal["sizes_given", "balanced", "retained_importance", "masked", "probes"]
Indices = list[int]
_MOST_PROBLEMS = 30  # lines of one message
_MAX_BYTES = 1 << 30  # of plan.json: every index of every expert of a large mixture
_INT_LIST = re.compile(r"\[\s*(-?\d+(?:,\s*-?\d+)*)\s*\]")


_RETAINED = (*SHAPE_AXES, "score")
# axes with a list of kept units for each layer, besides ffn and experts
UNIT_AXES = ("heads", "kv_heads", "ssm_heads", "ssm_head_dim", "ssm_state", *FOLLOWED)


class PlannedDims(PlanSection):
    """The sizes of one model, as plan.json has them; those of NEVER_CUT are never cut."""

    hidden: Size
    ffn: Size
    heads: Size
    kv_heads: Size
    head_dim: Size
    layers: Size
    vocab: Size
    experts: Annotated[int, Field(ge=0)] = 0  # 0 in dense models
    dense_ffn: Annotated[int, Field(ge=0)] = 0  # of layers without experts, in a mixture that has such layers
    shared_ffn: Annotated[int, Field(ge=0)] = 0  # of the expert that every token goes to
    ssm_heads: Annotated[int, Field(ge=0)] = 0  # these are 0 in models without recurrent mixers
    ssm_head_dim: Annotated[int, Field(ge=0)] = 0
    ssm_groups: Annotated[int, Field(ge=0)] = 0
    ssm_state: Annotated[int, Field(ge=0)] = 0

    @classmethod
    def of(cls, dims: Dims) -> PlannedDims:
        """From the dimensions of a model."""
        return cls(**{name: getattr(dims, name) for name in cls.model_fields})

    def dims(self) -> Dims:
        """As the dimensions of a model."""
        return Dims(**self.model_dump())


class KeptUnits(PlanSection):
    """The teacher's indices that stay.

    `heads`, `kv_heads` and `experts` have one list per kept layer, in the order of the layers, and so do `ssm_heads`,
    `ssm_head_dim`, `ssm_state`, `dense_ffn` and `shared_ffn` in a model that has them; the list is empty for a layer
    without such units. `ffn` has one list per kept layer, and in a mixture of experts one per kept expert of each kept
    layer, layer by layer.
    """

    layers: Indices
    hidden: Indices
    ffn: list[Indices]
    heads: list[Indices]
    kv_heads: list[Indices]
    experts: list[Indices] = Field(default=[])
    dense_ffn: list[Indices] = Field(default=[])
    shared_ffn: list[Indices] = Field(default=[])
    ssm_heads: list[Indices] = Field(default=[])
    ssm_head_dim: list[Indices] = Field(default=[])
    ssm_state: list[Indices] = Field(default=[])

    def units(self, axis: str, position: int, expert: int | None = None) -> Indices:
        """Kept units of `axis` in the student's layer `position`; ffn in a mixture: of the teacher's `expert`."""
        if axis == "ffn" and expert is not None:
            before = sum(map(len, self.experts[:position]))
            return self.ffn[before + self.experts[position].index(expert)]
        units: list[Indices] = getattr(self, axis)
        return units[position]

    def ffn_of(self, position: int, expert: int) -> Indices:
        """Kept ffn units of the teacher's `expert` in the student's layer `position`."""
        return self.units("ffn", position, expert)


class Methods(PlanSection):
    """The method that ranked each axis; `uncut` where nothing was removed, `first` where there were no scores.

    `search` is the last ranking that chose the shape.
    """

    ffn: str
    heads: str
    kv_heads: str
    hidden: str
    layers: str
    experts: str = "uncut"
    ssm_heads: str = "uncut"
    ssm_head_dim: str = "uncut"
    ssm_state: str = "uncut"
    compensate: Compensation
    layer_repair: PlannedRepair = "none"  # none where no layer was dropped
    search: SearchResult

    @model_validator(mode="after")
    def _methods_are_known(self) -> Methods:
        for axis in SHAPE_AXES:
            known = ["uncut", "first", *methods(axis)]
            known += [f"contiguous_{method}" for method in methods(axis)] if axis == "layers" else []
            if getattr(self, axis) not in known:
                raise ValueError(f"{axis}: expected one of {', '.join(known)}, got {shown(getattr(self, axis))}")
        return self


class ParamCounts(PlanSection):
    """Parameters of one model; `embedding` includes the head."""

    total: Size
    embedding: Annotated[int, Field(ge=0)]
    non_embedding: Size
    active: Size | None = None  # what one token uses, of a mixture of experts; None in dense models


class PlanTarget(PlanSection):
    """What the config asked for and how near the plan is.

    `wanted` and `cost` are in the unit of `kind`, `off_by` is a share of `wanted`. `reached` is the student's parameter
    count by `count`, whatever the target is.
    """

    kind: Literal["params", "bytes", "kv_bytes", "decode", "prefill"] | None
    asked: str | None
    count: Literal["non_embedding", "total"]
    tolerance: float
    wanted: float | None
    cost: float | None
    off_by: float | None
    reached: Size
    share_of_teacher: float


class Plan(PlanSection):
    """Everything that `apply` needs, and the record of how it was chosen."""

    version: Literal[1] = 1
    model_type: str
    teacher: PlannedDims
    student: PlannedDims
    kept: KeptUnits
    # Factor on every norm weight over the hidden axis. The mean square over fewer, stronger channels is higher, so a
    # sliced norm shrinks its output: √(d/d') undoes it to first order. 1.0 where hidden is not cut.
    norm_scale: Annotated[float, Field(gt=0.0, le=1e6)]
    methods: Methods
    teacher_params: ParamCounts
    student_params: ParamCounts
    target: PlanTarget
    # Share of the teacher's importance that stays, by axis, and the predicted score (search/scoring.py); None without
    # importance scores.
    retained: dict[str, float | None]
    candidates: Annotated[list[ShapeCandidate], Field(min_length=1)]  # the chosen one first
    candidates_tried: Size
    warnings: list[str]

    def cut_axes(self) -> list[str]:
        """Axes on which the student is smaller than the teacher."""
        return [axis for axis in LAYERS_FIRST if getattr(self.student, axis) < getattr(self.teacher, axis)]

    def to_json(self) -> str:
        """The text of plan.json: one line per list of indices, final newline."""
        text = json.dumps(self.model_dump(mode="json"), indent=2, allow_nan=False, ensure_ascii=False)
        return _INT_LIST.sub(lambda match: "[" + " ".join(match[1].split()) + "]", text) + "\n"

    def save(self, path: Path) -> None:
        """Write plan.json."""
        write_text(path, self.to_json())

    @classmethod
    def from_json(
        cls,
        text: str,
        where: str = "plan.json",
        *,
        config: Mapping[str, Any] | None = None,
        family: Family | None = None,
    ) -> Plan:
        """Parse and check; with `config` and `family` also check that the plan is for this teacher.

        Raises ConfigError with `where` and every field that is wrong.
        """
        try:
            plan = cls.model_validate_json(text)
        except ValidationError as error:
            items = error.errors(include_url=False)[:_MOST_PROBLEMS]
            problems = "\n".join(f"  - {_explain(item)}" for item in items)
            raise ConfigError(f"{where} cannot be used:\n{problems}") from error
        contradictions = consistency_problems(plan)
        if not contradictions and config is not None and family is not None:
            contradictions = teacher_problems(plan, config, family)
        if contradictions:
            raise ConfigError(
                f"{where} cannot be used:\n"
                + "\n".join(f"  - {problem}" for problem in contradictions[:_MOST_PROBLEMS]),
                hint="undo the edit, or run kdscale plan again",
            )
        return plan

    @classmethod
    def load(cls, path: Path, *, config: Mapping[str, Any] | None = None, family: Family | None = None) -> Plan:
        """Read plan.json. Raises ConfigError when it is missing, not UTF-8 or contradicts itself or the teacher."""
        if not os.path.lexists(path):
            raise ConfigError(f"{path} does not exist", expected="a plan", hint="run kdscale plan first")
        return cls.from_json(read_text(path, ConfigError, _MAX_BYTES), str(path), config=config, family=family)


def consistency_problems(plan: Plan) -> list[str]:
    """Where the plan contradicts itself, as lines `field: expected …, got …`."""
    teacher, student, kept = plan.teacher, plan.student, plan.kept
    out = [
        f"student.{axis}: expected at most the teacher's {getattr(teacher, axis)}, got {getattr(student, axis)}"
        for axis in SHAPE_AXES
        if getattr(student, axis) > getattr(teacher, axis)
    ]
    out += [
        f"student.{axis}: never cut, expected {getattr(teacher, axis)}, got {getattr(student, axis)}"
        for axis in NEVER_CUT
        if getattr(student, axis) != getattr(teacher, axis)
    ]
    if teacher.heads % teacher.kv_heads or student.heads % student.kv_heads:
        return [*out, f"student.heads: expected a multiple of kv_heads ({student.kv_heads}), got {student.heads}"]
    out += [
        f"retained: expected the axes and score, got {shown(name)}" for name in plan.retained if name not in _RETAINED
    ]
    out += _index_problems("kept.layers", kept.layers, student.layers, teacher.layers)
    out += _index_problems("kept.hidden", kept.hidden, student.hidden, teacher.hidden)
    for axis in ("experts", "ffn", *UNIT_AXES):
        if not getattr(teacher, axis):
            continue
        lists = getattr(kept, axis)
        of_experts = axis == "ffn" and teacher.experts
        many = sum(map(len, kept.experts)) if of_experts else student.layers
        if len(lists) != many:
            each = "one per kept expert" if of_experts else "one per kept layer"
            out.append(f"kept.{axis}: expected {many} lists, {each}, got {len(lists)}")
        for position, indices in enumerate(lists):
            if indices or of_experts:  # an empty list: the layer has no such units (teacher_problems knows whether)
                name = f"kept.{axis}[{position}]"
                out += _index_problems(name, indices, getattr(student, axis), getattr(teacher, axis))
    if not out:
        for position, (heads, groups) in enumerate(zip(kept.heads, kept.kv_heads, strict=True)):
            if heads or groups:
                shape = (teacher.heads, teacher.kv_heads, student.heads // student.kv_heads)
                out += _group_problems(f"kept.heads[{position}]", heads, groups, *shape)
        sizes = (teacher.ssm_heads, teacher.ssm_groups, student.ssm_heads // (student.ssm_groups or 1))
        for position, heads in enumerate(kept.ssm_heads):
            if heads:
                out += _group_problems(f"kept.ssm_heads[{position}]", heads, range(teacher.ssm_groups), *sizes)
    return out


def teacher_problems(plan: Plan, config: Mapping[str, Any], family: Family) -> list[str]:
    """Where the plan does not fit this teacher or what the family allows, as lines `field: expected …, got …`."""
    plain = dict(config)
    actual = PlannedDims.of(family.dims(plain))
    if plan.model_type != plain.get("model_type"):
        return [f"model_type: expected {plain.get('model_type')!r}, got {plan.model_type!r}"]
    out = [
        f"teacher.{axis}: expected {getattr(actual, axis)} (the checkpoint's), got {getattr(plan.teacher, axis)}"
        for axis in PlannedDims.model_fields
        if getattr(actual, axis) != getattr(plan.teacher, axis)
    ]
    if out:
        return out
    if wrong := family.violations(plan.student.dims()):
        return [f"student: no shape of the family: {sentence}" for sentence in wrong]
    for position, layer in enumerate(plan.kept.layers):
        axes = family.layer_axes(plain, layer)
        for axis in ("experts", *UNIT_AXES, *(() if actual.experts else ("ffn",))):
            lists: list[Indices] = getattr(plan.kept, axis)
            if lists and bool(lists[position]) != (axis in axes):
                expected = "units" if axis in axes else "an empty list: the layer has no such units"
                out.append(f"kept.{axis}[{position}]: expected {expected}, got {len(lists[position])} indices")
    if not any("kv_heads" in family.layer_axes(plain, layer) for layer in plan.kept.layers):
        out.append("kept.layers: expected at least one layer with attention, whose cache counts the tokens, got none")
    if out:
        return out
    student_config = family.student_config(plain, plan.student.dims(), plan.kept.layers)
    for field, model in (("teacher_params", plain), ("student_params", student_config)):
        counted = count_params(model, family)
        out += [
            f"{field}.{name}: expected {getattr(counted, name)}, got {getattr(getattr(plan, field), name)}"
            for name in ParamCounts.model_fields
            if getattr(counted, name) != getattr(getattr(plan, field), name)
        ]
    reached = getattr(plan.student_params, plan.target.count)
    if plan.target.reached != reached:
        out.append(f"target.reached: expected {reached:,}, got {plan.target.reached:,}")
    return out


def count_params(config: Mapping[str, Any], family: Family) -> ParamCounts:
    """The parameter counts of a model with this config, as plan.json has them."""
    counted = family.count_params(dict(config))
    return ParamCounts(
        total=counted.total,
        embedding=counted.embedding,
        non_embedding=counted.non_embedding,
        active=counted.active if family.experts_per_token else None,
    )


def _index_problems(name: str, indices: Sequence[int], count: int, limit: int) -> list[str]:
    if len(indices) != count:
        return [f"{name}: expected {count} indices (the student's size), got {len(indices)}"]
    wrong = [index for index in indices if not 0 <= index < limit]
    if wrong:
        return [f"{name}: expected indices from 0 to {limit - 1}, got {wrong[0]}"]
    for before, after in itertools.pairwise(indices):
        if after <= before:
            return [f"{name}: expected each index once, in rising order, got {before} before {after}"]
    return []


def _group_problems(
    name: str, heads: Sequence[int], groups: Sequence[int], size: int, of: int, wanted: int
) -> list[str]:
    """Each of the kept `groups` (`of` groups of `size` heads in all) needs `wanted` heads, and no other any."""
    kept = dict.fromkeys(groups, 0)
    for head in heads:
        group = head // (size // of)
        if group not in kept:
            return [f"{name}: query head {head} reads kv head {group}, which is not kept"]
        kept[group] += 1
    return [
        f"{name}: expected {wanted} heads in group {group}, got {count}"
        for group, count in kept.items()
        if count != wanted
    ]


def _explain(item: Any) -> str:
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"]).lstrip(".")
    came = "" if isinstance(item["input"], dict | list | BaseModel) else f", got {shown(item['input'])}"
    what = {"missing": "required, but not there", "extra_forbidden": "unknown key"}.get(item["type"], item["msg"])
    return f"{field or 'plan'}: {what}{came}"[:300]
