"""What a client may cost the teacher service, over real sockets: size, time, connections, and work for nobody."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from kdscale.models.loading import load_model
from kdscale.teacher import connections, server
from kdscale.teacher.messages import Question
from tests.teacher_service import TOKEN, serving_teacher

GOOD: dict[str, Any] = {"top_k": 5, "temperature": 1.0, "vocab_size": 64}


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> Any:
    return load_model(tiny_llama_dir, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture
def address(model: Any, tiny_llama_dir: Path) -> Iterator[tuple[str, int]]:
    """Where a service for questions of up to 4096 tokens, in sequences of up to 32, answers."""
    with serving_teacher(model, tiny_llama_dir, max_length=32) as where:
        yield where


@pytest.fixture
def ask(address: tuple[str, int]) -> Iterator[Callable[..., httpx.Response]]:
    """A question's answer; `changed` are its parameters."""
    headers = {"authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=f"http://{address[0]}:{address[1]}", headers=headers, trust_env=False) as client:

        def post(body: bytes, **changed: Any) -> httpx.Response:
            return client.post("/targets", params={**GOOD, **changed}, content=body)

        yield post


def question(sequences: int = 2, length: int = 8, rows: torch.Tensor | None = None) -> bytes:
    ids_BS = torch.ones(sequences, length, dtype=torch.long)
    rows_N = torch.arange(ids_BS.numel()) if rows is None else rows
    return Question(ids_BS, torch.arange(length).expand_as(ids_BS), rows_N).encode()


def request_head(path: str, length: int, token: str = TOKEN) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {length}", f"authorization: Bearer {token}", "", ""]
    return "\r\n".join(lines).encode()


@pytest.mark.parametrize(
    ("body", "changed", "message"),
    [
        (question(), {"temperature": "inf"}, "temperature 0.001 to 1000"),
        (question(), {"temperature": "nan"}, "temperature 0.001 to 1000"),
        (question(), {"temperature": "1e-300"}, "temperature 0.001 to 1000"),
        (question(), {"top_k": 4097}, "top_k up to 4096"),
        (question(1, 33), {}, "sequences of at most 32 tokens"),
        (question(129, 32), {}, "at most 4096 tokens"),
        (question(rows=torch.zeros(16, dtype=torch.long)), {}, "each row once"),
    ],
)
def test_a_question_that_costs_too_much_is_refused(
    ask: Callable[..., httpx.Response], body: bytes, changed: dict[str, Any], message: str
) -> None:
    answer = ask(body, **changed)
    assert answer.status_code == 422
    assert message in answer.text
    assert ask(question()).status_code == 200


def test_an_answer_that_is_too_large_is_not_computed(
    ask: Callable[..., httpx.Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_MAX_ANSWER_BYTES", 16 * (8 * 5 + 4) - 1)
    answer = ask(question())
    assert (answer.status_code, "at most 703 bytes" in answer.text) == (422, True)


@pytest.mark.parametrize(("token", "status"), [("wrong", b"401"), (TOKEN, b"413")])
def test_a_body_that_is_not_wanted_is_not_read(address: tuple[str, int], token: str, status: bytes) -> None:
    """The answer comes at once and the connection ends; what the client still sends has no reader."""
    with socket.create_connection(address, timeout=10) as client:
        client.sendall(request_head("/targets", 300_000_000, token))
        assert client.recv(12) == b"HTTP/1.1 " + status
        sent = 0
        with pytest.raises(OSError):
            while sent < 100_000_000:
                sent += client.send(bytes(1 << 20))


@pytest.mark.parametrize("beginning", [b"", b"POST /targets HT", request_head("/targets", 100) + b"12345"])
def test_a_client_that_does_not_finish_its_request_is_cut_off(
    address: tuple[str, int], beginning: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "CLIENT_SECONDS", 0.5)
    with socket.create_connection(address, timeout=10) as client:
        client.sendall(beginning)
        with suppress(ConnectionResetError):  # cut off as well
            assert client.recv(1) == b""


def test_there_are_only_so_many_connections(
    address: tuple[str, int], ask: Callable[..., httpx.Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 3)
    assert ask(question()).status_code == 200  # and keeps its connection
    kept = [socket.create_connection(address, timeout=10) for _ in range(2)]
    time.sleep(0.2)
    with socket.create_connection(address, timeout=10) as fourth, suppress(ConnectionResetError):
        assert fourth.recv(1) == b""  # at once; one that is kept would wait
    for client in kept:
        client.close()


def test_a_question_whose_client_has_gone_is_given_up_without_a_trace(
    model: Any, address: tuple[str, int], ask: Callable[..., httpx.Response], capfd: pytest.CaptureFixture[str]
) -> None:
    entered, left, layers_run = threading.Event(), threading.Event(), []

    def wait(*_: Any) -> None:
        entered.set()
        assert left.wait(20)
        time.sleep(0.5)  # the server learns that the client has gone

    layers = model.model.layers
    handles = [
        layers[0].register_forward_pre_hook(wait),
        layers[-1].register_forward_hook(lambda *_: layers_run.append(1)),
    ]
    body = question()
    with socket.create_connection(address, timeout=10) as client:
        client.sendall(request_head("/targets?top_k=5&temperature=1.0&vocab_size=64", len(body)) + body)
        assert entered.wait(20)
    left.set()
    with socket.create_connection(address, timeout=10) as client:  # leaves in the middle of its question
        client.sendall(request_head("/targets", 1000) + b"123")
    handles[0].remove()
    time.sleep(1.0)
    assert layers_run == []
    assert ask(body).status_code == 200
    assert layers_run == [1]
    handles[1].remove()
    printed = capfd.readouterr()
    assert "Traceback" not in printed.err + printed.out


def test_a_failing_device_is_one_line_and_worth_asking_again(
    ask: Callable[..., httpx.Response], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory\nand a long story")

    with monkeypatch.context() as changed:
        changed.setattr(server, "OnlineTeacher", fail)
        answer = ask(question())
    assert (answer.status_code, answer.text) == (500, "OutOfMemoryError: no memory")
    assert capfd.readouterr().err.splitlines() == ["a question could not be answered: OutOfMemoryError: no memory"]
    assert ask(question()).status_code == 200
