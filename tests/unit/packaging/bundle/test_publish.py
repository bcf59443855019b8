"""Publishing: the package's own files in one commit, and nothing of the hub's errors is a traceback."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors
from typer.testing import CliRunner

from kdscale.cli.main import make_app
from kdscale.errors import ConfigError, FileError, ServiceError
from kdscale.files import write_json
from kdscale.packaging.bundle import publish
from kdscale.packaging.bundle.checksums import SUMS, write_sums


class FakeHub:
    """What the hub was asked, and what it answers."""

    def __init__(self) -> None:
        self.files: list[str] | Exception = []
        self.calls: list[tuple[Any, ...]] = []
        self.error: Exception | None = None

    def list_repo_files(self, name: str) -> list[str]:
        if isinstance(self.files, Exception):
            raise self.files
        return self.files

    def create_repo(self, name: str, **options: Any) -> None:
        if self.error:
            raise self.error
        self.calls.append(("create", name, options["private"]))

    def create_commit(self, name: str, operations: Any, **options: Any) -> Any:
        self.calls.append(("commit", name, sorted(item.path_in_repo for item in operations)))
        return SimpleNamespace(repo_url=f"https://hub/{name}")


def refusal(kind: type[errors.HfHubHTTPError], code: int = 401) -> errors.HfHubHTTPError:
    return kind("refused", response=SimpleNamespace(headers={}, request=None, status_code=code))  # type: ignore[arg-type]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    folder.mkdir()
    write_json(folder / "package.json", {"format": 1, "forms": []})
    (folder / "model.safetensors").write_bytes(b"weights")
    write_sums(folder)
    (folder / "optimizer.safetensors").write_bytes(b"moments")  # came later, and is no part of it
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: fake)
    return fake


def call(*arguments: object, typed: str = "") -> Any:
    return CliRunner().invoke(make_app(), ["publish", *map(str, arguments)], input=typed)


def test_only_what_the_checksums_name_is_uploaded(package: Path, hub: FakeHub) -> None:
    hub.files = refusal(errors.RepositoryNotFoundError, 404)
    done = call(package, "--to", "org/small", "--private", typed="y\n")
    assert done.exit_code == 0, done.output
    files = [SUMS, "model.safetensors", "package.json"]
    assert hub.calls == [("create", "org/small", True), ("commit", "org/small", files)]
    assert "left out, as it is not part of the package: optimizer.safetensors" in done.output
    assert "not there yet" in done.output and "published: https://hub/org/small" in done.output


def test_nothing_is_uploaded_unasked(package: Path, hub: FakeHub) -> None:
    hub.files = ["package.json", "other"]
    assert call(package, "--to", "org/small", typed="n\n").exit_code == 1
    done = call(package, "--to", "org/small")  # nobody who could answer
    assert done.exit_code == 1 and "has 2 files; 1 of them will be replaced" in done.output
    assert call(package, "--to", "org/small", "--dry-run").exit_code == 0
    assert hub.calls == []


def test_a_dry_run_asks_the_hub_nothing(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    done = call(package, "--to", "org/small", "--dry-run")
    assert done.exit_code == 0 and "model.safetensors" in done.output


def test_a_changed_file_is_not_published(package: Path, hub: FakeHub) -> None:
    (package / "model.safetensors").write_bytes(b"other")
    with pytest.raises(FileError, match=r"model\.safetensors was changed"):
        publish.prepare(package, "org/small", False)


@pytest.mark.parametrize("name", ["small", "org/small/x", "../small", "org/..", "https://hub/org/small", "org/a b", ""])
def test_a_name_that_is_no_repository_is_refused(package: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="--to"):
        publish.prepare(package, name, False)


def test_a_run_folder_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: x\n")
    with pytest.raises(ConfigError, match="is not a package"):
        publish.prepare(tmp_path, "org/small", False)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (refusal(errors.HfHubHTTPError, 403), "HF_TOKEN"),
        (refusal(errors.HfHubHTTPError, 500), "refuses"),
        (errors.LocalTokenNotFoundError("no token"), "hf auth login"),
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (ConnectionError("no route"), "cannot be reached"),
    ],
)
def test_refusals_say_what_to_do(package: Path, error: Exception, message: str) -> None:
    hub = FakeHub()
    hub.error = error
    with pytest.raises(ServiceError, match=message):
        publish.upload(hub, publish.prepare(package, "org/small", False), "message")
    assert hub.calls == []
