"""Where the token goes, what is tried again and for how long, and what a refusal becomes."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx
import pytest

from kdscale.client import (
    BusyError,
    Client,
    RefusedError,
    ScopeError,
    SpecError,
    StateError,
    TokenError,
    UnknownError,
    UnreachableError,
)
from kdscale.client.connection import check_url
from kdscale.errors import ConfigError, ServiceError
from tests.unit.client.conftest import RUN_ID, TOKEN, URL, Clock, run_json, taking_turns


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("http://127.0.0.1:8765", "http://127.0.0.1:8765"), ("http://localhost:1/", "http://localhost:1"),
        ("http://[::1]:80/", "http://[::1]:80"), ("https://Example.org", "https://example.org"),
        (" https://example.org/kdscale/ ", "https://example.org/kdscale"),
    ],
)  # fmt: skip
def test_addresses_have_one_form(given: str, kept: str) -> None:
    assert check_url(given) == kept


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org", "http://10.0.0.1:8765", "http://127.0.0.1.example.org", "http://0.0.0.0:8765",
        "https://ana:secret@example.org", "https://example.org?token=x", "https://example.org/#x", "example.org:8765",
        "ftp://example.org", "https://", "https://example.org:99999", "https://[::1", "", "file:///etc/passwd",
    ],
)  # fmt: skip
def test_addresses_that_would_give_the_token_away_or_are_none_are_refused(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Client(url, TOKEN)
    assert "secret" not in str(caught.value)


def test_plain_http_to_another_machine_has_to_be_asked_for() -> None:
    assert Client("http://10.0.0.1:8765", TOKEN, allow_http=True).url == "http://10.0.0.1:8765"


def test_the_token_is_in_the_header_alone(client_of: Callable[..., Client]) -> None:
    answer, asked = taking_turns(httpx.Response(200, json=run_json()))
    client_of(answer).run(RUN_ID)
    assert asked[0].headers["authorization"] == f"Bearer {TOKEN}"
    assert TOKEN not in str(asked[0].url)


@pytest.mark.parametrize("target", ["https://elsewhere.example.org/v1", "http://127.0.0.1:8766/", "/v1/other"])
def test_a_redirect_is_an_error_and_not_followed(client_of: Callable[..., Client], target: str) -> None:
    answer, asked = taking_turns(httpx.Response(307, headers={"location": target}))
    with pytest.raises(RefusedError, match="redirect"):
        client_of(answer).run(RUN_ID)
    assert len(asked) == 1


def test_a_lost_connection_is_tried_again_with_growing_waits(client_of: Callable[..., Client], clock: Clock) -> None:
    answer, asked = taking_turns(
        httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), httpx.RemoteProtocolError("cut"),
        httpx.Response(200, json=run_json()),
    )  # fmt: skip
    assert client_of(answer).run(RUN_ID).name == "tiny"
    assert clock.slept == [0.5, 1.0, 2.0]
    assert len(asked) == 4


def test_patience_ends(client_of: Callable[..., Client], clock: Clock) -> None:
    answer, _ = taking_turns(httpx.ConnectError("refused"))
    with pytest.raises(UnreachableError, match="does not answer"):
        client_of(answer, seconds=10.0).run(RUN_ID)
    assert 5.0 < clock.now <= 10.0


def test_a_wrong_certificate_is_not_tried_again(client_of: Callable[..., Client], clock: Clock) -> None:
    answer, _ = taking_turns(httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed"))
    with pytest.raises(UnreachableError, match="SSL_CERT_FILE"):
        client_of(answer).run(RUN_ID)
    assert clock.slept == []


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured(client_of: Callable[..., Client], clock: Clock, status: int) -> None:
    answer, _ = taking_turns(httpx.Response(status, headers={"retry-after": "7"}), httpx.Response(200, json=run_json()))
    client_of(answer).run(RUN_ID)
    assert clock.slept == [7.0]


@pytest.mark.parametrize("after", ["3600", "nan", "-5", "Wed, 21 Oct 2026 07:28:00 GMT", "9" * 400])
def test_what_a_service_asks_to_wait_is_bounded_by_the_patience(
    client_of: Callable[..., Client], clock: Clock, after: str
) -> None:
    answer, _ = taking_turns(httpx.Response(503, headers={"retry-after": after}))
    with pytest.raises(BusyError):
        client_of(answer).run(RUN_ID)
    assert clock.now <= 60.0
    assert (after == "3600") == (clock.slept == [])


def test_every_try_of_a_submission_has_the_same_key_and_the_next_submission_another(
    client_of: Callable[..., Client],
) -> None:
    answer, asked = taking_turns(
        httpx.ReadTimeout("the answer was lost"), httpx.Response(503), httpx.Response(201, json=run_json())
    )
    client = client_of(answer)
    client.submit({"name": "tiny"}, set=["distill.tokens=1k"])
    client.submit({"name": "tiny"})
    keys = [request.headers["idempotency-key"] for request in asked]
    assert len(keys) == 4
    assert len(set(keys[:3])) == 1
    assert keys[3] != keys[0]
    assert json.loads(asked[0].content) == {"config": {"name": "tiny"}, "set": ["distill.tokens=1k"], "priority": 0}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, TokenError),
        (403, ScopeError),
        (404, UnknownError),
        (409, StateError),
        (422, SpecError),
        (500, RefusedError),
    ],
)
def test_a_problem_becomes_an_error_of_its_kind_with_all_its_parts(
    client_of: Callable[..., Client], clock: Clock, status: int, kind: type[RefusedError]
) -> None:
    problem = {
        "type": "urn:kdscale:problem:state", "title": "Conflict", "status": status, "detail": f"no, not with {TOKEN}",
        "expected": "one that is paused", "got": "it is running", "hint": "pause it",
    }  # fmt: skip
    answer, asked = taking_turns(httpx.Response(status, json=problem))
    with pytest.raises(kind) as caught:
        client_of(answer).resume(RUN_ID)
    assert isinstance(caught.value, ServiceError)
    assert caught.value.exit_code == 10
    assert (caught.value.status, caught.value.problem["type"]) == (status, problem["type"])
    assert (caught.value.what, caught.value.got) == ("no, not with ***", "it is running")
    assert TOKEN not in str(caught.value)
    assert len(asked) == 1


def test_every_wrong_field_is_named(client_of: Callable[..., Client]) -> None:
    errors = [
        {"field": "distill.tokens", "detail": "expected a number", "got": "'many'"},
        {"field": "prune", "detail": "x"},
    ]
    answer, _ = taking_turns(httpx.Response(422, json={"detail": "the config cannot be used", "errors": errors}))
    with pytest.raises(SpecError, match=r"distill\.tokens: expected a number, got 'many'") as caught:
        client_of(answer).submit(config_name="tiny")
    assert "prune: x" in str(caught.value)


@pytest.mark.parametrize(
    "body", [b"", b"<html>Bad gateway</html>", b"[1]", b"\xff\xfe", b'{"detail": {"a": 1}, "errors": "x"}', b"[" * 9999]
)
def test_refusals_of_others_are_shown_too(client_of: Callable[..., Client], body: bytes) -> None:
    answer, _ = taking_turns(httpx.Response(400, content=body))
    with pytest.raises(SpecError, match="400"):
        client_of(answer).run(RUN_ID)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"id": 1}', b"null", b"\xff"])
def test_an_answer_of_something_else_is_an_error_in_words(client_of: Callable[..., Client], body: bytes) -> None:
    answer, _ = taking_turns(httpx.Response(200, content=body))
    with pytest.raises(ServiceError, match="answer of http"):
        client_of(answer).run(RUN_ID)


def test_an_answer_without_end_is_given_up(client_of: Callable[..., Client], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdscale.client.connection._MOST_BYTES", 1000)
    answer, _ = taking_turns(httpx.Response(200, content=b" " * 2000))
    with pytest.raises(ServiceError, match="at most 1,000 bytes"):
        client_of(answer).run(RUN_ID)


@pytest.mark.parametrize("run_id", ["", "..", "../runs", "a/b", "A", "a?b", "%2e", "a" * 65, "x\n"])
def test_no_text_but_an_id_comes_into_a_path(client_of: Callable[..., Client], run_id: str) -> None:
    answer, asked = taking_turns(httpx.Response(200, json=run_json()))
    with pytest.raises(ConfigError, match="the run"):
        client_of(answer).run(run_id)
    assert asked == []


def test_lists_are_followed_page_by_page_and_never_in_a_circle(client_of: Callable[..., Client]) -> None:
    answer, asked = taking_turns(
        httpx.Response(200, json={"items": [run_json(name="a")], "next": "x"}),
        httpx.Response(200, json={"items": [run_json(name="b")], "next": None}),
    )
    found = client_of(answer).runs(states=["running", "failed"], owner="ana")
    assert [run.name for run in found] == ["a", "b"]
    assert [request.url.params.get("after") for request in asked] == [None, "x"]
    assert asked[0].url.params["owner"] == "ana"
    answer, asked = taking_turns(httpx.Response(200, json={"items": [run_json()], "next": "x"}))
    with pytest.raises(ServiceError, match="cursor"):
        list(client_of(answer).runs())


def test_urls_are_of_the_service(client_of: Callable[..., Client]) -> None:
    answer, asked = taking_turns(httpx.Response(200, json=run_json()))
    client_of(answer).pause(RUN_ID)
    assert (asked[0].method, str(asked[0].url)) == ("POST", f"{URL}/v1/runs/{RUN_ID}/pause")
