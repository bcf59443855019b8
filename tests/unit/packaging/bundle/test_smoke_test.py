"""The package's own test: what it takes for an answer, and its exit codes."""

from __future__ import annotations

import ast
import json
import math
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from kdscale.packaging.bundle import smoke_test
from kdscale.packaging.bundle.smoke_test import Answer, main, problem_of


@pytest.mark.parametrize(
    ("text", "values", "problem"),
    [
        (" Paris", [-0.5, 0.0], ""),
        (" \n", [-0.5], "no text"),
        (" Paris", [], "probabilities"),
        (" Paris", [-0.5, math.nan], "no numbers"),
        (" Paris", [-math.inf], "no numbers"),
        (" Paris", [3.0], "no numbers"),
    ],
)
def test_what_counts_as_an_answer(text: str, values: list[float], problem: str) -> None:
    found = problem_of(Answer(text, values))
    assert problem in found and bool(found) == bool(problem)


class Server(BaseHTTPRequestHandler):
    """Answers like vLLM: /v1/models, and /v1/completions with what the test chose."""

    answer: Any = None
    served = "small"
    tokens: list[Any] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.tokens.append(self.headers["Authorization"])
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/moved"))
            self.end_headers()
        else:
            self._send({"data": [{"id": self.served}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] == "small" and self.headers["Authorization"] == "Bearer secret"
        self._send(self.answer)

    def _send(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    described = {"served_name": "small", "prompt": "The river", "forms": []}
    (tmp_path / "package.json").write_text(json.dumps(described))
    monkeypatch.setattr(smoke_test, "__file__", str(tmp_path / "smoke_test.py"))
    return tmp_path


def completion(text: str, value: float | None) -> Any:
    return {"choices": [{"text": text, "logprobs": {"token_logprobs": [value]}}]}


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("answer", "code", "shown"),
    [
        (completion(" ran\x1b[2J", -0.5), 0, "OK"),
        (completion("", -0.5), 1, "FAILED: the answer holds no text"),
        (completion(" ran", None), 1, "no numbers"),
        ({"error": "out of memory"}, 1, "out of memory"),
    ],
)
def test_a_server_that_has_the_model_is_asked(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: Any, code: int, shown: str
) -> None:
    monkeypatch.setattr(Server, "answer", answer)
    assert main(["--url", url]) == code
    said = "".join(capsys.readouterr())
    assert shown in said and "\x1b" not in said


def test_the_token_does_not_follow_to_where_a_server_sends_one(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    Server.tokens.clear()
    assert smoke_test.is_served(f"{url}/moved", {"served_name": "small"})
    assert Server.tokens == ["Bearer secret", None]


@pytest.mark.usefixtures("package")
def test_a_server_with_another_model_is_not_asked(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "served", "another")
    assert main(["--url", url]) == 2
    assert main(["--url", "file:///etc"]) == 2
    assert main(["--form", "int8"]) == 2


def test_it_needs_nothing_but_what_answers() -> None:
    """It runs where kdscale is not installed: every import at its top is of Python itself."""
    tree = ast.parse(Path(smoke_test.__file__).read_text(encoding="utf-8"))
    names = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    assert names and {name.partition(".")[0] for name in names} <= set(sys.stdlib_module_names)
