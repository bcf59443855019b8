"""Every config that ships is parsed, planned (shapes only) and built on the meta device; its name tells the truth."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kdscale.config.load import config_folder, find_config, load_config
from kdscale.config.root import Config
from kdscale.errors import ConfigError
from kdscale.families import load_family
from kdscale.pipeline.checks import plan_shapes
from kdscale.prune.plan import Plan
from kdscale.prune.search.planning import make_plan

TEACHERS = Path(__file__).resolve().parents[1] / "fixtures" / "teachers"
NAMES = sorted(path.name.removesuffix(".yaml") for path in config_folder().glob("*.yaml"))


def plan_of(name: str) -> tuple[Config, dict[str, Any], Plan]:
    config = load_config(find_config(name))
    teacher: dict[str, Any] = json.loads((TEACHERS / Path(config.teacher.path).name / "config.json").read_text())
    return config, teacher, make_plan(teacher, load_family(teacher, name), None, config.prune)


def test_the_promised_configs_ship() -> None:
    assert {"demo", "quick", "llama3.1-8b-to-4.5b-width", "llama3.1-8b-to-4.5b-depth", "qwen3-8b-to-4b"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_student_has_the_size_in_the_name(name: str) -> None:
    config, _, plan = plan_of(name)
    size, unit = re.findall(r"-to-([\d.]+)([bm])(?=-|$)", config.name)[-1]
    promised = float(size) * {"b": 1e9, "m": 1e6}[unit]
    assert plan.student_params.total == pytest.approx(promised, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_each_says_how_to_get_its_teacher(name: str) -> None:
    text = find_config(name).read_text(encoding="utf-8")
    path = re.escape(load_config(find_config(name)).teacher.path)
    assert re.search(rf"^# Get the teacher first: (kdscale get-teacher|hf download) \S+ .*{path}$", text, re.M)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_builds_the_student_with_as_many_parameters(name: str) -> None:
    import torch
    from transformers import AutoConfig

    from kdscale.models.loading import auto_class

    _, teacher, plan = plan_of(name)
    family = load_family(teacher, name)
    student = family.student_config(teacher, plan.student.dims(), plan.kept.layers)
    settings = {key: value for key, value in student.items() if key != "model_type"}
    with torch.device("meta"):
        model = auto_class(student).from_config(AutoConfig.for_model(student["model_type"], **settings))
    assert sum(p.numel() for p in model.parameters()) == plan.student_params.total


def test_the_quick_run_prunes_as_the_demo_does() -> None:
    quick, demo = (load_config(find_config(name)) for name in ("quick", "demo"))
    assert (quick.prune, quick.teacher) == (demo.prune, demo.teacher)
    assert quick.run_dir != demo.run_dir
    assert quick.distill.tokens < demo.distill.tokens / 10


def test_the_published_shapes() -> None:
    _, _, width = plan_of("llama3.1-8b-to-4.5b-width")
    assert (width.student.hidden, width.student.ffn, width.student.layers, width.student.heads) == (3072, 9216, 32, 32)
    _, _, depth = plan_of("llama3.1-8b-to-4.5b-depth")
    dropped = sorted(set(range(32)) - set(depth.kept.layers))
    assert depth.student.layers == 16
    assert dropped == list(range(dropped[0], dropped[0] + 16))  # one block


def test_the_steps_have_the_sizes_in_the_name_too() -> None:
    config = load_config(find_config("llama3.1-8b-to-6b-to-4.5b"))
    first, last = plan_shapes(config, TEACHERS / "Llama-3.1-8B")
    assert first.student_params.total == pytest.approx(6e9, rel=0.01)
    assert last.teacher == first.student
    assert last.student_params.total == pytest.approx(4.5e9, rel=0.01)
    assert config.step(0).distill.optimizer == config.distill.optimizer
    assert config.step(0).prune.hidden is None  # sizes are not inherited


@pytest.mark.parametrize(
    ("name", "hint"), [("dmo", "demo"), ("llama3.1-8b-to-4.5b-widht", "llama3.1-8b-to-4.5b-width")]
)
def test_a_misspelt_name_gets_a_hint(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean {re.escape(hint)}"):
        find_config(name)
