"""What serves a package: no root, no open port, no server without a token, no name of a file in the Dockerfile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from kdscale.packaging.bundle import serving
from kdscale.packaging.bundle.contents import served_name


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    names = (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "LICENSE",
        "tokenizer $(x)\nRUN evil",
        "smoke_test.py",
    )
    for name in names:
        (tmp_path / name).write_text("x")
    (tmp_path / "int8").mkdir()
    (tmp_path / "int8" / "model.safetensors.index.json").write_text("x")
    return [tmp_path, tmp_path / "int8"]


def test_the_dockerfile_copies_the_model_and_leaves_root(folders: list[Path]) -> None:
    lines = serving.dockerfile(folders, "small", own_code=False).splitlines()
    keywords = [line.split()[0] for line in lines if not line.startswith("#")]
    assert keywords == ["ARG", "FROM", "ARG", "RUN", "COPY", "USER", "ENV", "EXPOSE", "ENTRYPOINT"]
    (copy,) = [line.split()[2:] for line in lines if line.startswith("COPY")]
    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*"]
    assert copy == [*(f"${{FORM}}/{pattern}" for pattern in patterns), "/model/"]
    entry = json.loads(lines[-1].removeprefix("ENTRYPOINT "))
    assert entry[:3] == ["vllm", "serve", "/model"] and "--trust-remote-code" not in entry
    assert "FORM=int8" in lines[0] and "evil" not in "".join(lines)
    trusted = serving.dockerfile(folders, "small", own_code=True)
    assert "${FORM}/*.py" in trusted and '"--trust-remote-code"' in trusted


def test_compose_listens_on_this_machine_and_wants_a_token() -> None:
    service = YAML(typ="safe", pure=True).load(serving.compose("small"))["services"]["model"]
    assert service["ports"] == ["127.0.0.1:${PORT:-8000}:8000"]
    assert service["environment"]["VLLM_API_KEY"].startswith("${VLLM_API_KEY:?")
    assert service["cap_drop"] == ["ALL"] and service["healthcheck"]["test"][0] == "CMD"
    assert "privileged" not in service and "network_mode" not in service
    compile(service["healthcheck"]["test"][-1], "healthcheck", "exec")


def test_vllm_alone_listens_on_this_machine_too() -> None:
    assert "--host 127.0.0.1" in serving.in_shell(serving.serve_line("small", own_code=False))


@pytest.mark.parametrize(
    ("name", "expected"), [("Qwen3_0.6B", "qwen3-0-6b"), ("a", "a"), ("A.-_b-", "a-b"), ("smol-82m", "smol-82m")]
)
def test_names_of_images_are_lower_case(name: str, expected: str) -> None:
    assert served_name(name) == expected
