"""A SkyPilot task: held against what its schema says, and its script run by a shell."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from kdscale_launch import LaunchError
from kdscale_launch.systems import skypilot as sky


def _closed(**fields: object) -> dict[str, object]:
    return {"type": "object", "additionalProperties": False, "properties": fields}


_TEXT = {"type": "string"}
_TEXTS = {"type": "object", "additionalProperties": _TEXT}
_CODE = {"type": "integer", "minimum": 0, "maximum": 255}
# What we use of a task in SkyPilot 0.14 (sky.utils.schemas): names and types.
TASK = _closed(
    name=_TEXT, num_nodes={"type": "integer"}, setup=_TEXT, run=_TEXT, volumes=_TEXTS, file_mounts={"type": "object"},
    envs={"type": "object", "propertyNames": {"pattern": "^[a-zA-Z_][a-zA-Z0-9_]*$"}, "additionalProperties": _TEXT},
    resources=_closed(
        infra=_TEXT, accelerators=_TEXT, cpus=_TEXT, memory=_TEXT, image_id=_TEXT, disk_size={"type": "integer"},
        use_spot={"type": "boolean"},
        job_recovery=_closed(
            max_restarts_on_errors={"type": "integer", "minimum": 0},
            recover_on_exit_codes={"type": "array", "items": _CODE, "uniqueItems": True},
        ),
    ),
)  # fmt: skip


@pytest.fixture
def job() -> sky.SkyPilotTask:
    return sky.SkyPilotTask(
        "kdscale-x-1", 4, 8, ("python", "-m", "kdscale.jobs.rank", "/data/c.yaml"), "/data/logs", "/", "/data/notes",
        infra="aws/us-east-1", accelerators="H100:8", image="docker:registry/image:1", cpus="8+", memory="64",
        spot=True, disk_gigabytes=500, setup="pip install x", env={"HF_HOME": "/data/hf"}, volumes={"/v": "volume"},
        buckets={"/data": "s3://bucket/folder"},
    )  # fmt: skip


def test_a_task_holds_to_the_published_schema(job: sky.SkyPilotTask) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(TASK).validate
    check(sky.task(job))
    check(sky.task(sky.SkyPilotTask("a", 1, 1, ("p",), "/l", "/", "/n")))
    with pytest.raises(jsonschema.ValidationError):
        check({**sky.task(job), "resource": {}})


def test_only_a_stop_that_nobody_asked_for_is_recovered_from(job: sky.SkyPilotTask) -> None:
    recovery = sky.task(job)["resources"]["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]}


def test_the_script_starts_this_nodes_ranks(job: sky.SkyPilotTask, tmp_path: Path) -> None:
    """A shell reads the script, with a program in the place of Python that writes down its arguments."""
    python = tmp_path / "py thon"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$MASTER_ADDR" "$@" > arguments\n')
    python.chmod(0o755)
    words = ("python", "a b", "$HOME", "`touch x`", "'\"", "ü")
    script = sky.task(replace(job, python=str(python), cwd=str(tmp_path), command=words))["run"]
    variables = {"PATH": os.environ["PATH"], "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"}
    subprocess.run(["bash", "-c", script], env=variables, check=True)
    first, *arguments = (tmp_path / "arguments").read_text().splitlines()
    assert first == "10.0.0.1"
    assert arguments[:2] == ["-m", "kdscale_launch.systems.node"]
    assert arguments[arguments.index("--node-rank-from") + 1] == "SKYPILOT_NODE_RANK"
    assert tuple(arguments[arguments.index("--") + 1 :]) == words
    assert json.loads(json.dumps(script)) == script


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "1a"}, "not a name"),
        ({"name": "a b"}, "not a name"),
        ({"infra": "aws/$X"}, "infra"),
        ({"accelerators": "H100:8\n"}, "accelerators"),
        ({"image": "a b"}, "image"),
        ({"volumes": {"/v": "${HOME}"}}, "mount /v"),
        ({"buckets": {"data": "s3://x"}}, "absolute path"),
        ({"buckets": {"/$X": "s3://x"}}, r"without \$"),
        ({"cpus": "eight"}, "cpus"),
        ({"setup": "a\x1b[2J"}, "without line breaks"),
        ({"command": ("p", "a\nb")}, "without line breaks"),
        ({"env": {"A B": "1"}}, "letters, digits and _"),
    ],
)
def test_texts_that_no_task_can_hold_are_refused(job: sky.SkyPilotTask, changed: dict, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        replace(job, **changed)
