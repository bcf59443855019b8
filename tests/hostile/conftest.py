"""The hostile cases of a test, and a finished run to damage."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.nasty import HostileCases
from tests.integration.conftest import TINY_CONFIG, kdscale, kdscale_environment  # noqa: F401 (fixtures)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    """Libraries print nasty values as they are; a lone surrogate could not go from a test's process to the main one."""
    report: Any = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture
def hostile(request: pytest.FixtureRequest) -> Iterator[HostileCases]:
    """Collects the cases of one test, and fails it at its end."""
    cases = HostileCases(request.path.stem)
    yield cases
    cases.report()


@pytest.fixture(scope="session")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama_dir: Path,
    tiny_texts: list[str],
    kdscale: Any,  # noqa: F811
) -> Path:
    """The config of a whole tiny run; its run folder is beside it, and `pristine` is a copy of that."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "text").mkdir()
    for index, text in enumerate(tiny_texts):
        (folder / "text" / f"{index:02d}.txt").write_text(text, encoding="utf-8")
    config = folder / "tiny.yaml"
    config.write_text(TINY_CONFIG.format(folder=folder, teacher=tiny_llama_dir), encoding="utf-8")
    outcome = kdscale("run", config, "--set", "eval.efficiency=false", "--set", "distill.tokens=768")
    assert outcome.code == 0, outcome.err
    config.write_text((folder / "run" / "config.yaml").read_text())
    shutil.copytree(folder / "run", folder / "pristine", symlinks=True)
    return config
