"""Files to deploy with name what exists, and start the service as it can be started."""

from __future__ import annotations

import fnmatch
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main
from ruamel.yaml import YAML

from kdscale.cli.main import make_app

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "kdscale" / "service" / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (word, rest), with continued lines joined and comments left out."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines if line.strip()]


def of(word: str) -> list[str]:
    return [rest for found, rest in instructions() if found == word]


def check_command(words: list[str]) -> None:
    """`kdscale serve` with options that it has."""
    assert words[:2] == ["kdscale", "serve"]
    group: Any = typer.main.get_command(make_app())
    known = {option for item in group.commands["serve"].params for option in item.opts}
    given = {word for word in words[2:] if word.startswith("--")}
    assert given <= known


def test_the_dockerfile_copies_what_exists_and_installs_extras_that_exist() -> None:
    for line in of("COPY"):
        *sources, _ = line.split()
        assert [name for name in sources if not (ROOT / name).exists()] == []
    copied = {name for line in of("COPY") for name in line.split()[:-1]}
    assert {"configs", "kdscale", "kernels", "launch", "setup.py", PROJECT["project"]["readme"]} <= copied
    assert set(PROJECT["project"]["license-files"]) <= copied
    pip = [line for line in of("RUN") if "pip install" in line]
    extras = re.findall(r"\.\[([\w,-]+)\]", " ".join(pip))[0].split(",")
    assert set(extras) <= set(PROJECT["project"]["optional-dependencies"]) and "service" in extras


def test_the_builder_gets_what_is_copied_and_nothing_else() -> None:
    kept = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == {name for line in of("COPY") for name in line.split()[:-1]}


def test_the_container_is_no_root_and_starts_the_service() -> None:
    assert of("USER") == ["10001:10001"]
    assert instructions()[-1][0] == "CMD"
    check_command(YAML(typ="safe").load(of("CMD")[-1]))
    assert YAML(typ="safe").load(of("HEALTHCHECK")[0].partition("CMD ")[2])[0] == "python"


def test_the_compose_file_names_what_it_defines() -> None:
    tree = YAML(typ="safe").load(DEPLOY / "compose.yaml")
    service = tree["services"]["kdscale"]
    context = (DEPLOY / service["build"]["context"]).resolve()
    assert context == ROOT and (context / service["build"]["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    assert all(port.startswith("127.0.0.1:") for port in service["ports"]), "open to this machine alone"
    for one in tree["services"].values():
        volumes = {entry.split(":")[0] for entry in one.get("volumes", [])}
        assert {name for name in volumes if not name.startswith(".")} <= set(tree["volumes"])
        assert set(one.get("secrets", [])) <= set(tree["secrets"])
    assert "ports" not in tree["services"]["postgres"], "the database is nobody's else"


def unit() -> dict[str, str]:
    lines = (DEPLOY / "kdscale.service").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def test_the_unit_starts_the_service_and_leaves_runs_alone() -> None:
    settings = unit()
    program, *options = shlex.split(settings["ExecStart"])
    check_command([Path(program).name, *options])
    assert (settings["KillMode"], settings["OOMPolicy"]) == ("process", "continue")
    assert settings["NoNewPrivileges"] == "true" and settings["User"] not in ("", "root")
    assert not {"PrivateTmp", "PrivateDevices", "MemoryDenyWriteExecute"} & set(settings)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    text = (
        (DEPLOY / "kdscale.service").read_text().replace("/opt/kdscale/bin/kdscale serve", shutil.which("true") or "")
    )
    (tmp_path / "kdscale.service").write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(tmp_path / "kdscale.service")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_files_are_in_a_wheel() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["*"]
    for name in ("Dockerfile", "compose.yaml", "kdscale.service"):
        assert (DEPLOY / name).is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def test_nothing_is_fetched_from_an_address_of_ours() -> None:
    for path in DEPLOY.iterdir():
        if path.is_file():
            urls = re.findall(r"https?://[^\s'\"]+", path.read_text(encoding="utf-8"))
            assert [url for url in urls if "127.0.0.1" not in url] == []
