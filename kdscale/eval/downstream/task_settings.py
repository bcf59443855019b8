"""What a task file of the user's own may say: all of it is data.

The other keys of lm-evaluation-harness name functions, prompts of other packages, or pictures and sound.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MULTIPLE_CHOICE = "multiple_choice"
Shots = Annotated[int, Field(ge=0, le=1000)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Texts(_Strict):
    """Templates of a question, its answers and the right one."""

    doc_to_text: str | None = None
    doc_to_target: str | int | list[str] | list[int] | None = None
    doc_to_choice: str | list[str] | dict[str, str] | None = None
    target_delimiter: str | None = None
    fewshot_delimiter: str | None = None
    gen_prefix: str | None = None


class Fewshot(_Texts):
    """Solved examples that differ from the questions."""

    sampler: Literal["default", "first_n"] = "default"
    split: str | None = None
    samples: list[dict[str, Any]] | None = None
    fewshot_indices: list[int] | None = None


class Metric(BaseModel):
    """One entry of `metric_list`; other keys go on to the metric."""

    model_config = ConfigDict(extra="allow", strict=True)
    metric: str
    aggregation: str = "mean"
    higher_is_better: bool = True
    hf_evaluate: Literal[False] = False  # it loads code from the hub


class Step(BaseModel):
    """One function of a filter; other keys are its arguments."""

    model_config = ConfigDict(extra="allow", strict=True)
    function: str


class Filter(_Strict):
    """What is done to an answer before it is scored."""

    name: str
    filter: Annotated[list[Step], Field(min_length=1, max_length=100)]


class DataFiles(_Strict):
    """Names of the data files, beside the task, by split; without, the file with the task file's name."""

    data_files: dict[str, str | list[str]] | str | list[str] | None = None


class TaskSettings(_Texts):
    """A task file."""

    task: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f]*$")]
    dataset_path: Literal["json", "csv"]
    dataset_name: str | None = None
    dataset_kwargs: DataFiles = DataFiles()
    training_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    fewshot_split: str | None = None
    description: str = ""
    fewshot_config: Fewshot | None = None
    num_fewshot: Shots | None = None
    metric_list: Annotated[list[Metric], Field(min_length=1, max_length=100)] | None = None
    output_type: Literal["multiple_choice", "generate_until", "loglikelihood"] = "generate_until"
    generation_kwargs: dict[str, Any] | None = None
    repeats: Annotated[int, Field(ge=1, le=1000)] = 1
    filter_list: Annotated[list[Filter], Field(min_length=1, max_length=100)] | None = None
    metadata: Any = None
    tag: Any = None
    task_alias: Any = None
    include: Any = None
    should_decontaminate: Any = None
    doc_to_decontamination_query: Any = None

    @model_validator(mode="after")
    def _can_be_asked(self) -> TaskSettings:
        needed = ["doc_to_text", "doc_to_target", *(["doc_to_choice"] if self.output_type == MULTIPLE_CHOICE else [])]
        if missing := [name for name in needed if getattr(self, name) is None]:
            raise ValueError(f"{', '.join(missing)}: required, but not given")
        if self.test_split is None and self.validation_split is None:
            raise ValueError("test_split: required, but not given")
        return self

    def for_harness(self) -> dict[str, Any]:
        """What the harness is told: all but where the data are, and what it would ignore."""
        return self.model_dump(exclude_unset=True, exclude=_NOT_TOLD)


_NOT_TOLD = {
    "dataset_path", "dataset_name", "dataset_kwargs", "tag", "task_alias", "include", "should_decontaminate",
    "doc_to_decontamination_query", "metadata",
}  # fmt: skip
