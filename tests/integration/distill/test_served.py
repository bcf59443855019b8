"""A teacher that is served: the same student as with one in the process, and what happens when it is not there."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from kdscale.config.distill.targets import Needs
from kdscale.config.load import build_config
from kdscale.errors import ConfigError, LostRankError, ServiceError
from kdscale.runs.folder import RunFolder
from kdscale.teacher.remote import ServedTeacher
from kdscale.teacher.server import TeacherService, make_token
from kdscale.teacher.source import MicroBatch
from tests.teacher_service import TOKEN

_TREE: dict[str, Any] = {"name": "t", "run_dir": "r", "teacher": {"path": "t"}, "prune": {"ffn": 8}}


@pytest.fixture
def unused() -> Iterator[str]:
    """An address that refuses connections: bound by us, never listening."""
    import socket

    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    file = tmp_path / "given.token"
    file.write_text(TOKEN + "\n")
    return str(file)


def _served(token_file: str, *urls: str, **more: Any) -> dict[str, Any]:
    return {"teacher_placement": "served", "served": {"urls": list(urls), "token_file": token_file, **more}}


def test_a_served_teacher_gives_the_same_student(
    distil: Callable[..., list[dict[str, Any]]], service: str, token_file: str, tmp_path: Path
) -> None:
    here = distil(tmp_path / "here")
    there = distil(tmp_path / "there", **_served(token_file, service))
    assert [row.get("loss") for row in there] == [row.get("loss") for row in here]
    weights = "student/model.safetensors"
    assert (tmp_path / "there" / weights).read_bytes() == (tmp_path / "here" / weights).read_bytes()


def test_a_service_that_does_not_answer_is_skipped(service: str, unused: str) -> None:
    batch = MicroBatch(torch.tensor([[1, 2, 3, 4]]), torch.arange(4)[None], torch.tensor([0, 2]), torch.tensor([2, 4]))
    answers = []
    for urls in ([service], [unused, service]):
        teacher = ServedTeacher(urls, TOKEN, Needs(top_k=5), vocab_size=64, timeout=30.0)
        teacher.prefetch(batch)
        answers.append(teacher.targets(batch).top_k)
        teacher.close()
    assert torch.equal(answers[0].logits_NK, answers[1].logits_NK)
    assert torch.equal(answers[0].ids_NK, answers[1].ids_NK)


def test_no_service_at_all_is_a_lost_rank_not_a_hang(unused: str) -> None:
    teacher = ServedTeacher([unused], TOKEN, Needs(top_k=5), vocab_size=64, timeout=0.01)
    with pytest.raises(LostRankError, match=r"distill\.served\.timeout"):
        teacher.targets(
            MicroBatch(torch.tensor([[1, 2]]), torch.tensor([[0, 1]]), torch.tensor([0]), torch.tensor([2]))
        )
    teacher.close()


def test_a_question_that_the_service_refuses_is_an_error_of_the_service(service: str) -> None:
    teacher = ServedTeacher([service], TOKEN, Needs(top_k=5), vocab_size=10**6, timeout=30.0)
    one_token = MicroBatch(torch.tensor([[1, 2]]), torch.tensor([[0, 1]]), torch.tensor([0]), torch.tensor([2]))
    with pytest.raises(ServiceError, match=r"127\.0\.0\.1 refused a question(.|\n)*vocab_size 1000000"):
        teacher.targets(one_token)
    teacher.close()


def test_before_any_training_the_address_the_token_and_the_teacher_are_checked(
    distil: Callable[..., Any], service: str, unused: str, token_file: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with pytest.raises(ConfigError, match=r"distill\.served\.urls"):
        distil(tmp_path / "a", **_served(token_file, unused))
    wrong = tmp_path / "wrong.token"
    wrong.write_text("another")
    with pytest.raises(ConfigError, match="does not accept"):
        distil(tmp_path / "b", **_served(str(wrong), service))
    with pytest.raises(ConfigError, match=r"kdscale serve-teacher wrote"):
        distil(tmp_path / "c", **_served(str(tmp_path / "none"), service))
    monkeypatch.setattr(TeacherService, "about", lambda _self: {"teacher": {"config": "0" * 64}, "rows": 64})
    with pytest.raises(ConfigError, match="another one"):
        distil(tmp_path / "d", **_served(token_file, service))


def test_the_service_answers_nobody_without_its_token_and_refuses_what_it_cannot_compute(service: str) -> None:
    with httpx.Client(base_url=service, trust_env=False) as client:
        assert client.get("/about").status_code == 401
        assert client.post("/targets", content=b"x").status_code == 401
        client.headers["authorization"] = f"Bearer {TOKEN}"
        assert client.get("/about").json()["dtype"] == "float32"
        good = {"top_k": 5, "temperature": 1.0, "vocab_size": 64}
        assert client.post("/targets", params=good, content=b"no question").status_code == 422
        assert client.post("/targets", params={"top_k": 5}, content=b"").status_code == 422
        assert client.post("/targets", params={**good, "vocab_size": 10**6}, content=b"").status_code == 422
        assert client.post("/targets", params=good, content=bytes(4096 * 12 + 5000)).status_code == 413


def test_a_token_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "run" / "teacher.token"
    token = make_token(file)
    assert len(token) >= 32
    assert make_token(file) == token
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    run = RunFolder(file.parent)  # the service may come first: its token makes the folder nobody else's
    run.adopt_config(build_config({**_TREE, "run_dir": str(run.path)}, "test"), accept_changes=False)
    assert run.config.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_placement": "served"}, r"needs served\.urls"),
        ({"served": {"urls": ["localhost:80"]}}, "http://HOST:PORT"),
        ({"served": {"urls": ["http://user:pass@h:1"]}}, r"(?s)\A(?!.*pass@).*no user, password or token"),
        ({"served": {"urls": ["http://h:1/?token=pass"]}}, r"(?s)\A(?!.*=pass).*no user, password or token"),
        (
            {
                "teacher_placement": "served",
                "served": {"urls": ["http://h:1"]},
                "objectives": [{"name": "token_divergence", "targets": "full"}],
            },
            "whole vocabulary; use replicated or partitioned or offloaded",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config({**_TREE, "distill": settings}, "test")
