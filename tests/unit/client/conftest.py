"""A service in a function: what the client sends, and answers that a test chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from kdscale.client import Client, Patience

URL = "http://127.0.0.1:8765"
TOKEN = "kds_an-example"
RUN_ID = "1hc9xqv3z-7m2k0ft"
Handler = Callable[[httpx.Request], httpx.Response]


class Clock:
    """Time that passes while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def _no_token_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KDSCALE_TOKEN", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))


@pytest.fixture
def client_of(clock: Clock) -> Iterator[Callable[..., Client]]:
    """A client of the service that a function is."""
    made: list[Client] = []

    def make(handler: Handler, seconds: float = 60.0) -> Client:
        patience = Patience(seconds, clock.time, clock.sleep, lambda: 1.0)
        made.append(Client(URL, TOKEN, patience=patience, transport=httpx.MockTransport(handler)))
        return made[-1]

    yield make
    for client in made:
        client.close()


def run_json(**changes: object) -> dict[str, object]:
    """A run as the service tells it."""
    return {
        "id": RUN_ID, "name": "tiny", "owner": "ana", "state": "running", "reason": "", "priority": 0,
        "created": "2026-11-30T22:00:00Z", "updated": "2026-11-30T22:00:00Z", "started": None, "ended": None,
        "attempt": 1, "config_name": "", "target": {"engine": "local"}, "slots": 1, "exit_code": None, "parent": None,
        "origin": "service", "progress": {}, "stages": [], "overrides": [], "config": {}, "links": {}, **changes,
    }  # fmt: skip


def taking_turns(*answers: httpx.Response | Exception) -> tuple[Handler, list[httpx.Request]]:
    """A handler that gives one answer after the other, the last one for ever, and the requests that came."""
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        given = answers[min(len(asked), len(answers)) - 1]
        if isinstance(given, Exception):
            raise given
        return given

    return answer, asked
