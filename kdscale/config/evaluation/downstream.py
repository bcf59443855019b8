"""`eval.downstream`: the tasks with right answers that all models of a run are given."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from kdscale.config.fields import Few, Section

_FREE = {"batch_size", "processes"}


class DownstreamConfig(Section):
    """Which tasks, how many items of each, and how they are asked."""

    # tasks and sets by their names, `builtin`, `builtin:NAME`, and YAML files of tasks or folders of them
    tasks: tuple[Annotated[str, Field(min_length=1, max_length=1024)], ...] = Field(
        strict=False, min_length=1, max_length=256, default=("builtin",)
    )
    limit: Few | None = None  # items of each task, drawn by the seed; None: all
    num_fewshot: Annotated[int, Field(ge=0, le=1000)] | None = None  # None: what the set or the task says
    batch_size: Few = 16
    # ranks on this machine that share the questions; None: one a GPU, one on a CPU
    processes: Few | None = None
    checkpoints: bool = False

    @field_validator("tasks")
    @classmethod
    def _every_task_once(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if twice := [task for task in dict.fromkeys(tasks) if tasks.count(task) > 1]:
            raise ValueError(f"expected every task once, got {', '.join(twice)} twice")
        return tasks

    def decisive(self) -> dict[str, Any]:
        """The settings that the scores depend on: all but how fast they are made."""
        return {key: value for key, value in self.model_dump(mode="json").items() if key not in _FREE}

    @property
    def most_processes(self) -> int:
        """Ranks that can share the questions."""
        return 1 << 16
