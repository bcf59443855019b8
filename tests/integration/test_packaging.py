"""The wheel has everything: it is built, installed alone into a folder, and run far from the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tracked files, so that nothing untracked slips in and no build folder is left behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and not name.startswith(("tests/", "docs/")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(source),
    ]
    subprocess.run(command, check=True)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_carries_code_data_and_configs_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "kdscale/cli/main.py", "kdscale/families/llama.json", "kdscale/data/builtin/classics.jsonl.gz",
        "kdscale/eval/downstream/builtin/cloze.jsonl", "kdscale/eval/downstream/builtin/cloze.yaml",
        "kdscale/report/templates/report.html.j2", "kdscale/service/page/templates/base.html.j2",
        "kdscale/service/page/static/page.css", "kdscale/service/page/static/htmx.min.js",
        "kdscale/service/page/static/htmx.LICENSE.txt", "kdscale/service/page/static/icon.svg",
        "kdscale/configs/demo.yaml", "kdscale_kernels/__init__.py",
        "kdscale_launch/__init__.py",
    ):  # fmt: skip
        assert needed in names, needed
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"kdscale", "kdscale_kernels", "kdscale_launch"}


def test_the_installed_wheel_runs_outside_the_repository(wheel: Path, tmp_path: Path, tiny_config: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True)
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"RANK": "0", "WORLD_SIZE": "1"}  # as some job systems leave them: that is no launcher
    environment.pop("MASTER_ADDR", None)

    def call(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kdscale.cli.main", *args]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=280, check=False, env=environment, cwd=tmp_path
        )

    where = subprocess.run(
        [sys.executable, "-c", "import kdscale; print(kdscale.__file__)"], capture_output=True, text=True, check=True,
        env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(site)
    demo = call("plan", "demo")
    assert demo.returncode == 2
    assert (
        "get-teacher" in demo.stderr
    )  # the shipped config was found; its teacher is not here, and that is what it says
    short = ("--set", "distill.tokens=768", "--set", "eval.efficiency=false")
    done = call("run", str(tiny_config), *short)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report" / "report.html").exists()
