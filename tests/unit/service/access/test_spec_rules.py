"""What a config may name: nothing outside the roots, no other servers, no code; and no field is forgotten."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kdscale.config
from kdscale.config.fields import Section
from kdscale.config.load import build_config, config_folder, load_config
from kdscale.service.access import spec_rules
from kdscale.service.access.identity import Actor
from kdscale.service.access.spec_rules import PLAIN, RULES, holds_any_text, refused_fields, rule_of
from kdscale.service.settings import ServiceSettings

RUNNER, ADMIN = Actor("ada", ["run"], "t"), Actor("root", ["admin"], "t")
# A flag by such a name may loosen something.
LOOSENS = re.compile(r"trust|remote|code(?!c)|exec|unsafe|insecure|allow|command")


def sections() -> Iterator[type[Section]]:
    """Every section of a run's config; sweeps are not submitted."""
    for module in pkgutil.walk_packages(kdscale.config.__path__, "kdscale.config."):
        importlib.import_module(module.name)
    waiting = list(Section.__subclasses__())
    while waiting:
        section = waiting.pop()
        waiting += section.__subclasses__()
        if section.__module__.startswith("kdscale.config.") and section.__module__ != "kdscale.config.sweep":
            yield section


def test_every_field_that_holds_text_has_a_rule_or_is_plain() -> None:
    seen = set()
    for section in sections():
        for name, field in section.model_fields.items():
            seen |= {f"{base.__name__}.{name}" for base in section.__mro__}
            if holds_any_text(field.annotation) or LOOSENS.search(name):
                ruled = rule_of(section, name) is not None
                plain = any(f"{base.__name__}.{name}" in PLAIN for base in section.__mro__)
                assert ruled != plain, (
                    f"{section.__name__}.{name}: give it a rule in spec_rules.RULES, or list it as plain"
                )
    assert not {*RULES, *PLAIN} - seen, "rules for fields that there are not"


def test_a_field_without_a_rule_is_refused(monkeypatch: pytest.MonkeyPatch, settings: ServiceSettings) -> None:
    monkeypatch.setattr(spec_rules, "RULES", {key: rule for key, rule in RULES.items() if key != "Config.run_dir"})
    assert [problem.extra["field"] for problem in refused_fields(tree(), RUNNER, settings)] == ["run_dir"]


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name in ("data", "outside", "home", "cwd/here/folder"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd")
    (tmp_path / "data" / "a.txt").write_text("text")
    (tmp_path / "data" / "out").symlink_to(tmp_path / "outside")
    (tmp_path / "data" / "[x]").mkdir()
    return {"root": str(tmp_path / "data"), "outside": str(tmp_path / "outside"), "above": str(tmp_path)}


@pytest.fixture
def settings(tmp_path: Path, places: dict[str, str]) -> ServiceSettings:
    return ServiceSettings(
        home=str(tmp_path / "home"), roots=(places["root"],), endpoint_hosts=("gpu1", "gpu2:8000", "[::1]"),
        endpoint_keys={"gpu1": ("GPU_KEY",)},
    )  # fmt: skip


def tree(**changes: Any) -> dict[str, Any]:
    return {"name": "t", "run_dir": "runs/t", "teacher": {"path": "hf:org/name"}, "prune": {"ffn": 64}, **changes}


def refused(settings: ServiceSettings, *overrides: str, **changes: Any) -> list[str]:
    config = build_config(tree(**changes), "here", overrides)
    assert refused_fields(config.resolved(), ADMIN, settings) == []
    return [problem.extra["field"] for problem in refused_fields(config.resolved(), RUNNER, settings)]


GOOD_PATHS = [
    "{root}",
    "{root}/a.txt",
    "{root}/*.txt",
    "{root}/[x]/a",
    "{root}/new/file",
    "{above}/home/runs/r/student",
]
BAD_PATHS = [
    "/etc", "/etc/passwd", "{outside}", "{root}/../outside", "{root}/out", "{root}/out/a.txt", "{above}", "{above}/*",
    "{above}/home", "{above}/home/secret.key", "{above}/home/jobs/x", "{above}/h*me/secret.key", "~/a", "~root/a",
    "a.txt", ".", "../a", "http://evil.example/a.txt", "s3://bucket/a.txt", "file:///etc/passwd", "/**/*.txt",
    "{root}-other/a",
    "{root}/**/../../outside/*.txt", "/proc/self/environ", "hf:text", "hf:../x", "hf:/etc/x", "hf:a/b/c",
    "hf:here/folder",
]  # fmt: skip


@pytest.mark.parametrize("field", ["data.sources", "teacher.path"])
def test_paths(settings: ServiceSettings, places: dict[str, str], field: str) -> None:
    wrong = []
    for path, bad in [*((path, False) for path in [*GOOD_PATHS, "hf:org/name"]), *((path, True) for path in BAD_PATHS)]:
        value = path.format(**places)
        given = {"path": value, "weight": 1} if field == "data.sources" else value
        changes = {"data": {"sources": [given]}} if field == "data.sources" else {"teacher": {"path": given}}
        if bool(refused(settings, **changes)) != bad:
            wrong.append(value)
    assert wrong == []


def test_nothing_is_written_among_runs_or_outside(settings: ServiceSettings, places: dict[str, str]) -> None:
    for path, bad in (("{root}/store", 0), ("{above}/home/runs/r", 1), ("/tmp/store", 1), ("store", 1), ("{above}", 1)):
        targets = {"codec": {"name": "hidden"}, "path": path.format(**places)}
        assert refused(settings, targets=targets) == ["targets.path"] * bad, path
        zero = {"zero_stage": 3, "zero": {"offload_optimizer": "nvme", "nvme_path": path.format(**places)}}
        assert refused(settings, distill=zero) == ["distill.zero.nvme_path"] * bad, path


@pytest.mark.parametrize(
    ("url", "bad"),
    [
        ("http://gpu1", False), ("https://gpu1:9000/v1", False), ("http://gpu2:8000", False), ("http://GPU1", False),
        ("http://[::1]:80/v1", False), ("http://gpu2", True), ("http://gpu2:8001", True), ("http://gpu1.evil", True),
        ("http://169.254.169.254/latest", True), ("http://127.0.0.1:8765", True), ("http://localhost", True),
        ("http://evil.example/gpu1", True), ("http://evil.example#gpu1", True), ("http://evil.example\\.gpu1", True),
        ("http://0x7f000001", True), ("https://", True),
    ],
)  # fmt: skip
def test_servers(settings: ServiceSettings, url: str, bad: bool) -> None:
    assert bool(refused(settings, distill={"served": {"urls": [url]}})) == bad
    assert bool(refused(settings, tracking={"mlflow": {"uri": url}})) == bad


def test_keys_go_to_their_host_alone(settings: ServiceSettings) -> None:
    def of(host: str, variable: str) -> list[str]:
        endpoint = {"base_url": f"https://{host}/v1", "model": "m", "key_variable": variable}
        return refused(settings, responses={"prompts": [{"path": "builtin:questions"}], "endpoint": endpoint})

    assert of("gpu1", "GPU_KEY") == []
    assert of("gpu1", "AWS_SECRET_ACCESS_KEY") == ["responses.endpoint.key_variable"]
    assert of("gpu2:8000", "GPU_KEY") == ["responses.endpoint.key_variable"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"teacher": {"path": "hf:a/b", "trust_remote_code": True}}, "teacher.trust_remote_code"),
        ({"run_dir": "/etc/cron.d"}, "run_dir"),
        ({"run_dir": "a/../../b"}, "run_dir"),
        ({"data": {"chat_template": "/etc/passwd"}}, "data.chat_template"),
        ({"data": {"leak_sources": [{"path": "/etc"}]}}, "data.leak_sources.0.path"),
        ({"eval": {"downstream": {"tasks": ["hellaswag", "/etc/tasks"]}}}, "eval.downstream.tasks.1"),
        ({"eval": {"downstream": {"tasks": ["here"]}}}, "eval.downstream.tasks.0"),
        ({"bias": {"measures": [{"name": "bbq", "path": "/etc/*"}]}}, "bias.measures.0.path"),
        ({"tracking": {"trackio": {"space": "me/mine"}}}, "tracking.trackio.space"),
        ({"tracking": {"mlflow": {"uri": "sqlite:////etc/x.db"}}}, "tracking.mlflow.uri"),
        ({"tracking": {"mlflow": {"uri": "/srv/mlflow"}}}, "tracking.mlflow.uri"),
        ({"distill": {"served": {"urls": ["http://gpu1"], "token_file": "/etc/shadow"}}}, "distill.served.token_file"),
        ({"responses": {"prompts": [{"path": "/etc/hosts.txt"}]}}, "responses.prompts.0.path"),
        ({"distill": {"preferences": {"pairs": [{"path": "/etc/a.jsonl"}]}}}, "distill.preferences.pairs.0.path"),
        (
            {"steps": [{"name": "a", "prune": {"ffn": 96}, "distill": {"served": {"urls": ["http://evil.example"]}}}]},
            "steps (a): distill.served.urls.0",
        ),
        (
            {"correct": {"distill": {"zero_stage": 3, "zero": {"offload_optimizer": "nvme", "nvme_path": "/etc"}}}},
            "correct: distill.zero.nvme_path",
        ),
        (
            {
                "quantize": {
                    "forms": [
                        {
                            "name": "int4", "method": "distilled",
                            "distill": {"teachers": [{"name": "x", "path": "/srv/secret"}]},
                        }
                    ]
                }
            },
            "quantize.forms (int4_distilled_g32): distill.teachers.0.path",
        ),
    ],
)  # fmt: skip
def test_what_else_is_for_admins(settings: ServiceSettings, changes: dict[str, Any], field: str) -> None:
    assert refused(settings, **changes) == [field]


def test_shipped_configs_need_roots_for_their_folders_alone(settings: ServiceSettings) -> None:
    roots = tuple(str(Path(name).absolute()) for name in ("teachers", "data", "chats.jsonl", "runs/stores"))
    larger = settings.model_copy(update={"roots": roots, "endpoint_hosts": ("localhost", "127.0.0.1")})
    for path in config_folder().glob("*.yaml"):
        assert [problem.extra for problem in refused_fields(load_config(path).resolved(), RUNNER, larger)] == [], (
            path.name
        )


def test_relative_paths_count_from_where_runs_begin(settings: ServiceSettings, places: dict[str, str]) -> None:
    roots = settings.model_copy(update={"roots": (str(Path.cwd()),)})
    assert refused(roots, teacher={"path": "here"}) == []
    elsewhere = roots.model_copy(update={"engines": {"slurm": {"cwd": places["outside"]}}})
    assert refused(elsewhere, teacher={"path": "here"}) == ["teacher.path"]
