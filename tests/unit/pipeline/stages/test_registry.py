"""Which stages a run has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kdscale.config.load import build_config
from kdscale.config.root import Config
from kdscale.errors import ConfigError
from kdscale.pipeline.stages import registry


def make_config(**data: int) -> Config:
    tree = {"name": "a", "run_dir": "runs/a", "teacher": {"path": "t"}, "prune": {"ffn": 8}, "data": data}
    return build_config(tree, "test")


@pytest.fixture
def optional_stage(monkeypatch: pytest.MonkeyPatch) -> str:
    """A stage before the distillation that only a run with data.max_document_tokens has."""
    extra = replace(registry.STAGES["prune"], name="extra", only_with="data.max_document_tokens", help="")
    names = list(registry.STAGES)
    at = names.index(registry.job_stage())
    rows = [*registry.STAGES.values()]
    monkeypatch.setattr(registry, "STAGES", {stage.name: stage for stage in (*rows[:at], extra, *rows[at:])})
    return extra.name


def test_a_stage_belongs_to_the_runs_whose_config_has_its_section(optional_stage: str) -> None:
    without, having = make_config(), make_config(max_document_tokens=64)
    assert optional_stage not in [stage.name for stage in registry.stages_of(without)]
    assert optional_stage in [stage.name for stage in registry.stages_of(having)]
    assert optional_stage in [stage.name for stage in registry.stages_of_steps(having)]
    assert registry.last_alone(without).name == "prune"
    assert registry.last_alone(having).name == optional_stage


def test_asking_for_a_stage_that_the_run_does_not_have_names_the_section(optional_stage: str) -> None:
    with pytest.raises(ConfigError, match=r"no stage extra.*\n.*data\.max_document_tokens"):
        registry.stages_until(optional_stage, make_config())


def test_every_optional_stage_names_a_field_of_the_config() -> None:
    plain = make_config().resolved()
    for stage in registry.STAGES.values():
        for field in (stage.only_with, stage.not_with):
            value = plain
            for part in filter(None, field.split(".")):
                value = value[part]


@pytest.mark.parametrize("ready", [False, True])
def test_a_run_has_no_two_stages_that_write_the_same_place(ready: bool) -> None:
    """A ready student takes the place of a pruned one; a run has every other stage at the most."""
    field = "student"
    rows = [stage for stage in registry.STAGES.values() if (stage.only_with if not ready else stage.not_with) != field]
    written = [artifact.path for stage in rows for artifact in stage.writes]
    assert len(set(written)) == len(written) and "pruned" in written
    assert all(not Path(path).is_absolute() for path in written)


def test_a_ready_student_is_not_pruned() -> None:
    tree = {"name": "a", "run_dir": "runs/a", "teacher": {"path": "t"}, "student": {"path": "s"}}
    names = [stage.name for stage in registry.stages_of(build_config(tree, "test"))]
    assert names == ["data", "student", "distill", "eval", "report"]
    assert registry.last_alone(build_config(tree, "test")).name == "student"
