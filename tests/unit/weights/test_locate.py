"""Finding the teacher: a folder, or a model of the hub."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from kdscale.config.root import TeacherConfig
from kdscale.errors import ConfigError, ServiceError
from kdscale.packaging.catalog import NAMES
from kdscale.weights import locate, resolve_teacher


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Records what would be asked of the hub; nothing is to be asked in most of these tests."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(name: str, **kwargs: Any) -> str:
        asked.append((name, kwargs))
        return "/downloaded"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_folder_that_exists_is_taken_even_when_it_looks_like_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: list[Any]
) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_teacher(TeacherConfig(path="org/name")) == Path("org/name")
    assert no_hub == []


@pytest.mark.parametrize(
    "path",
    [
        "./org/name",
        "../org/name",
        "/org/name",
        "~/org",
        "~x/name",
        "models/llama-typo",
        "name",
        "a/b/c",
        "org/na me",
        "org/name",
    ],
)
def test_mistyped_path_never_reaches_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: list[Any], path: str
) -> None:
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^teacher\.path") as caught:
        resolve_teacher(TeacherConfig(path=path))
    assert caught.value.exit_code == 2
    assert no_hub == []


def test_only_the_shape_is_asked_for_when_only_the_shape_is_needed(no_hub: list[tuple[str, dict[str, Any]]]) -> None:
    resolve_teacher(TeacherConfig(path="hf:org/name"), config_only=True)
    assert no_hub[0][1]["allow_patterns"] == ["config.json"]


def test_error_says_how_far_a_mistyped_path_exists(tmp_path: Path, no_hub: list[Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_teacher(TeacherConfig(path=f"{tmp_path}/models/llama"))
    assert f"the folder {tmp_path} exists" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("meta-llama/Llama-3.1-8B", "did you mean hf:meta-llama/Llama-3.1-8B?"),
        ("https://huggingface.co/Qwen/Qwen3-8B", "did you mean hf:Qwen/Qwen3-8B?"),
        ("teachers/Llama-3.1-8B", "hf download ORG/Llama-3.1-8B --local-dir teachers/Llama-3.1-8B"),
        ("models/lama", "check the path"),  # the folder models exists
        ("./org/name", "check the path"),
        ("teachers/smollm2-135m-instruct", "kdscale get-teacher smollm2-135m-instruct teachers/smollm2-135m-instruct"),
        ("my teachers/smollm2-135m-instruct", "instruct 'my teachers/smollm2-135m-instruct'"),
    ],
)
def test_error_says_how_to_get_what_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: list[Any], path: str, hint: str
) -> None:
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no such folder") as caught:
        resolve_teacher(TeacherConfig(path=path))
    assert hint in str(caught.value)
    assert ("did you mean" in str(caught.value)) == hint.startswith("did you mean")


def test_the_demo_teacher_is_in_the_catalogue() -> None:
    assert locate._DEMO in NAMES


def test_file_is_not_a_teacher(tmp_path: Path, no_hub: list[Any]) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"kdscale get-teacher \S+model\.gguf \S+model, and give"):
        resolve_teacher(TeacherConfig(path=str(tmp_path / "model.gguf")))


def test_hub_id_asks_for_safe_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: list[tuple[str, dict[str, Any]]]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_teacher(TeacherConfig(path="hf:org-1/Some.Model_2", revision="v3")) == Path("/downloaded")
    ((name, asked),) = no_hub
    assert (name, asked["revision"]) == ("org-1/Some.Model_2", "v3")
    from huggingface_hub.utils import filter_repo_objects

    there = [
        "config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "LICENSE",
        "chat_template.json", "additional_chat_templates/tool.jinja", "LICENCE", "USE_POLICY.md", "NOTICE", "README.md",
        "modeling_x.py", "scripts/x.py", "pytorch_model.bin", "consolidated.safetensors", "original/params.json",
        "onnx/model.safetensors", "model.gguf",
    ]  # fmt: skip
    kept = filter_repo_objects(there, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"])
    assert list(kept) == there[:15]
    resolve_teacher(TeacherConfig(path="hf:org/name", trust_remote_code=True))
    patterns = {key: no_hub[-1][1][key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(there, **patterns)) == there[:16]


def _http(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    return kind("refused", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (_http(errors.RepositoryNotFoundError), "does not exist or is private"),
        (_http(errors.GatedRepoError), "is gated"),
        (_http(errors.RevisionNotFoundError), r"teacher\.revision"),
        (_http(errors.HfHubHTTPError), "cannot be downloaded"),
        (errors.LocalEntryNotFoundError("offline"), "cannot be downloaded"),
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (errors.HfHubHTTPError.__bases__[0]("no route"), "no route"),
    ],
)
def test_hub_refusals_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ServiceError, match=message):
        resolve_teacher(TeacherConfig(path="hf:org/name"))


def test_offline_is_explained_by_the_real_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE is set for all tests: the real library refuses without a network request."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ServiceError, match="not in the local cache"):
        resolve_teacher(TeacherConfig(path="hf:no-such-org-here/no-such-model"))
