"""What a run may say of where it goes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kdscale.config.load import parse_yaml
from kdscale.errors import ConfigError
from kdscale.service.engines.engine import ENGINES, Engines
from kdscale.service.engines.targets import (
    SETTINGS,
    TARGETS,
    admin_fields,
    processes_of,
    read_settings,
    read_target,
    target_schema,
)
from kdscale.service.settings import ServiceSettings


def test_every_engine_has_a_target_and_settings() -> None:
    assert list(TARGETS) == list(SETTINGS) == list(ENGINES)
    for name, model in TARGETS.items():
        assert model.model_fields["engine"].default == name
        assert issubclass(SETTINGS[name], model)
    assert set(target_schema()["discriminator"]["mapping"]) == set(ENGINES)


def test_a_target_comes_before_the_settings() -> None:
    settings = read_settings("slurm", {"slurm": {"partition": "gpu", "nodes": 4, "extra": ["qos=x"], "python": "/p"}})
    target = read_target({"engine": "slurm", "nodes": 2}, settings)
    assert (target.partition, target.nodes, target.extra) == ("gpu", 2, ("qos=x",))
    assert read_target(None) == read_target({}) == read_target({"engine": "local"})


def test_every_wrong_field_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        read_target({"engine": "slurm", "nodes": "2", "partitions": "x"})
    assert "target.nodes: " in str(caught.value)
    assert "target.partitions: unknown key (did you mean 'partition'?)" in str(caught.value)
    with pytest.raises(ConfigError, match="one of local, hosts, slurm, kubernetes, skypilot"):
        read_target({"engine": "condor"})
    with pytest.raises(ConfigError, match=r"engines\.kubernetes\.imag"):
        read_settings("kubernetes", {"kubernetes": {"imag": "x"}})


def test_what_names_code_or_storage_is_for_admins() -> None:
    assert admin_fields({"engine": "slurm", "nodes": 2, "time": "1", "extra": [], "account": "x"}) == [
        "target.account", "target.extra"
    ]  # fmt: skip
    assert admin_fields({"engine": "kubernetes", "image": "x", "volumes": {}, "queue": "q"}) == [
        "target.image", "target.volumes"
    ]  # fmt: skip
    assert admin_fields({"engine": "hosts", "hostfile": "/etc/passwd"}) == ["target.hostfile"]
    assert "target.setup" in admin_fields({"engine": "skypilot", "setup": "curl x | sh"})
    assert admin_fields(None) == admin_fields({"engine": "condor", "image": 1}) == []


def test_a_service_with_wrong_settings_of_engines_does_not_start() -> None:
    engines = {"slurm": {"partitoin": "x"}, "skypilot": {"nodes": 0}, "condor": {}, "local": {"slots": 3}}
    with pytest.raises(ConfigError) as caught:
        Engines(ServiceSettings(home="/none", engines=engines))
    for name in ("engines.slurm.partitoin", "engines.skypilot.nodes", "engines.condor"):
        assert name in str(caught.value)
    assert "engines.local" not in str(caught.value)


def test_how_many_processes_count_against_a_quota() -> None:
    engines = {"slurm": {"nodes": 2, "gpus_per_node": 8}}
    assert processes_of({"engine": "slurm"}, engines) == 16
    assert processes_of({"engine": "slurm", "nodes": 3, "processes_per_node": 4}, engines) == 12
    assert processes_of({"engine": "skypilot", "accelerators": "H100:8", "nodes": 2}, {}) == 16
    assert processes_of({"engine": "kubernetes"}, {}) == 1
    assert processes_of(None, {}) is None
    assert processes_of({"engine": "hosts"}, {}) is None


def test_the_examples_in_the_docs_can_be_used() -> None:
    text = (Path(__file__).parents[4] / "docs/how-to/service-engines.md").read_text()
    engines = {
        name: tree
        for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
        for name, tree in parse_yaml(block, "the page")["engines"].items()
    }
    targets = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]
    assert {target["engine"] for target in targets} == set(engines) == set(ENGINES) - {"local"}
    for target in targets:
        read_target(target, read_settings(target["engine"], engines))
        assert not admin_fields(target)
    sections = {name: text.partition(f"\n  {name}:\n")[2].partition("\n## ")[0] for name in engines}
    for name, section in sections.items():  # what is marked there is what is refused, and nothing is left out
        fields = set(SETTINGS[name].model_fields)
        marked = set(re.findall(r"^    (\w+):.*#.*†|`(\w+)` †", section, re.MULTILINE)) - {("", "")}
        refused = set(admin_fields({**dict.fromkeys(fields), "engine": name}))
        assert {f"target.{first or second}" for first, second in marked} == refused
        missing = {field for field in fields if not re.search(rf"`{field}\W|    {field}:|\"{field}\"", text)}
        assert not missing, name
