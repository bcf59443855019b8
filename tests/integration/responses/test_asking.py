"""Questions to a real server that misbehaves: each is answered once, or the run ends with the server's words."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from kdscale.config.responses.settings import ResponsesConfig
from kdscale.errors import ConfigError, Interrupted, KdscaleError, ServiceError, SpendingLimitError
from kdscale.responses import asking
from kdscale.responses.asking import RequestPolicy, ask_all
from kdscale.responses.chat import answers_of, question_of
from kdscale.responses.journal import Journal, Usage
from kdscale.responses.prompts import Prompt
from kdscale.runtime.progress import Reporter
from tests.fake_endpoint import FakeEndpoint, Fault, serving

KEY = "sekrit-key-of-the-test"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEndpoint]:
    monkeypatch.setattr(asking, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(asking, "_POLL_SECONDS", 0.01)
    monkeypatch.setenv("FAKE_KEY", KEY)
    monkeypatch.setenv("OPENAI_ORG_ID", "of-another-endpoint")
    with serving(FakeEndpoint()) as running:
        yield running


@pytest.fixture
def ask(server: FakeEndpoint, tmp_path: Path) -> Callable[..., list[list[str]]]:
    """Ask these prompts; the answers to each, as the journal then has them."""

    def run(*texts: str, timeout: float = 20.0, **settings: Any) -> list[list[str]]:
        endpoint = {"base_url": server.url, "model": "m", "key_variable": "FAKE_KEY", "timeout": timeout}
        config = ResponsesConfig.model_validate(
            {"prompts": [{"path": "p"}], "teacher": "endpoint", "endpoint": endpoint, "concurrency": 1, **settings}
        )
        prompts = [Prompt([{"role": "user", "content": text}], f"line {i}") for i, text in enumerate(texts, 1)]
        questions = [question_of(prompt, config) for prompt in prompts]
        journal = Journal(tmp_path / "journal", "answers")
        try:
            with Reporter(quiet=True).bar("ask", len(questions), "prompts") as bar:
                ask_all(questions, journal, RequestPolicy.of(config), bar)
            return [[answer.text for answer in answers_of(journal.get(one.key))] for one in questions]
        finally:
            journal.close()

    return run


def test_ten_kills_lose_nothing_and_ask_nothing_twice_but_what_was_under_way(
    server: FakeEndpoint, ask: Callable[..., Any], tmp_path: Path
) -> None:
    """The server's own log against the journal; the moments of the kills are drawn."""
    server.seconds = 0.005
    texts, concurrency, draw = [f"prompt {i}" for i in range(120)], 4, random.Random(5)
    ask(texts[0])  # so that the library is imported once, here
    answered_before = 1
    for kills in range(1, 11):
        child = os.fork()
        if not child:
            try:
                ask(*texts, concurrency=concurrency)
            finally:
                os._exit(0)
        while sum(server.answered.values()) < answered_before + draw.randrange(1, 9):
            server.wait(0.005)
        server.wait(draw.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        server.wait(0.03)  # what was sent to the killed process is in the log
        answered_before = sum(server.answered.values())
        kept = (tmp_path / "journal" / "answers.jsonl").read_bytes().count(b"\n")
        assert 0 <= answered_before - kept <= kills * concurrency
    assert kept < len(texts)
    assert ask(*texts, concurrency=concurrency) == [[f"{text} #0"] for text in texts]
    lines = (tmp_path / "journal" / "answers.jsonl").read_text().splitlines()
    keys = [json.loads(line)["key"] for line in lines]
    assert len(keys) == len(set(keys)) == len(texts)
    assert set(server.answered) == set(texts)
    twice = sum(server.answered.values()) - len(texts)
    assert twice <= 10 * concurrency
    assert max(server.answered.values()) <= 11


def test_a_signal_waits_for_what_is_under_way_and_asks_nothing_more(
    server: FakeEndpoint, ask: Callable[..., Any], tmp_path: Path
) -> None:
    server.seconds = 0.3
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Interrupted) as caught:
        ask(*"abcdef", concurrency=2)
    assert caught.value.kept
    assert len((tmp_path / "journal" / "answers.jsonl").read_text().splitlines()) == len(server.asked) == 2


def chat(choices: Any, **more: Any) -> bytes:
    return json.dumps({"choices": choices, **more}).encode()


GOOD = {"index": 0, "finish_reason": "stop", "message": {"content": "x"}}


def test_every_question_is_asked_once_and_never_again(server: FakeEndpoint, ask: Callable[..., Any]) -> None:
    texts = [f"prompt {i}" for i in range(20)]
    expected = [[f"{text} #0", f"{text} #1"] for text in [*texts, texts[0]]]
    assert ask(*texts, texts[0], concurrency=5, sampling={"n": 2}) == expected
    assert ask(*texts, texts[0], concurrency=5, sampling={"n": 2}) == expected
    assert len(server.asked) == 20
    assert set(server.answered.values()) == {1}
    path, headers, body = server.asked[0]
    assert not {"openai-organization", "openai-project"} & headers.keys()
    assert (path, headers["authorization"]) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert {"n": 2, "model": "m", "max_tokens": 1024, "temperature": 0.7}.items() <= body.items()
    ask(texts[0], sampling={"n": 3})  # other settings are other questions
    assert len(server.asked) == 21


def test_a_request_may_have_other_fields_and_lack_ours(server: FakeEndpoint, ask: Callable[..., Any]) -> None:
    ask("a", request={"max_tokens": None, "max_completion_tokens": 7}, sampling={"seed": 5})
    body = server.asked[0][2]
    assert "max_tokens" not in body
    assert (body["max_completion_tokens"], body["seed"]) == (7, 5)
    with pytest.raises(SpendingLimitError):
        ask("b", request={"max_completion_tokens": 99, "max_tokens": None}, limits={"total_tokens": 60})
    with pytest.raises(ValueError, match="request: model, n cannot be set here"):
        ask("c", request={"n": 2, "model": "x"})
    with pytest.raises(ValueError, match="max_tokens: expected a number"):
        ask("c", request={"max_tokens": "many"})


@pytest.mark.parametrize(
    "fault",
    [
        Fault(500),
        Fault(503, b"<html>busy: see billing</html>"),
        Fault(429, b'{"error": {"message": "slow down"}}', {"retry-after": "0.05"}),
        Fault(408),
        Fault(hang=60.0),
        Fault(cut=0),
        Fault(cut=40),
        Fault(body=b"{"),
        Fault(body=b"\xff\xfe"),
        Fault(body=b'"text"'),
        Fault(body=b"{}"),
        Fault(body=chat([])),
        Fault(body=chat([GOOD, GOOD])),
        Fault(body=chat([{**GOOD, "message": {"content": 3}}])),
        Fault(body=chat([GOOD], usage={"prompt_tokens": -5, "completion_tokens": 1})),
        Fault(body=b'{"choices": [{"message": {"content": "\\ud800"}}]}'),
        Fault(body=b"[" * 100_000),
        Fault(body=chat([GOOD], padding="x" * 70_000)),
        Fault(500, body=b"x" * 70_000),
        Fault(headers={"content-encoding": "gzip"}),
    ],
    ids=lambda fault: f"{fault.status}-{len(fault.body or b'')}-{fault.hang:g}-{fault.cut}",
)
def test_what_may_pass_is_asked_again(server: FakeEndpoint, ask: Callable[..., Any], fault: Fault) -> None:
    server.faults = [fault, fault]
    assert ask("a", timeout=0.3 if fault.hang else 20.0, max_answer_bytes=65_536) == [["a #0"]]
    assert len(server.asked) == 3


def test_a_server_that_asks_to_wait_is_waited_for_by_all(server: FakeEndpoint, ask: Callable[..., Any]) -> None:
    server.faults = [Fault(429, headers={"retry-after": "0.4"})]
    begin = time.monotonic()
    ask(*"abcdef", concurrency=1)
    assert time.monotonic() - begin >= 0.4
    server.faults = [Fault(429, headers={"retry-after": formatdate(time.time() + 7 * 86_400, usegmt=True)})]
    with pytest.raises(ServiceError, match=r"asks to wait 7 d|asks to wait 6 d|asks to wait 16"):
        ask("g")


def test_after_the_last_attempt_the_failure_is_told_and_the_rest_is_kept(
    server: FakeEndpoint, ask: Callable[..., Any]
) -> None:
    assert ask("a") == [["a #0"]]
    server.faults = [Fault(500, b"out of\x1b[2J order")] * 3
    with pytest.raises(ServiceError, match=r"(?s)line 2.*500 out of\\x1b\[2J order \(3 attempts\)"):
        ask("a", "b", retries=2)
    assert ask("a", "b") == [["a #0"], ["b #0"]]
    assert server.answered == {"a": 1, "b": 1}


def refusal(status: int, message: str) -> Fault:
    return Fault(status, json.dumps({"error": {"message": message, "code": "c"}}).encode())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (refusal(400, "too long"), r"400 too long \(c\)"),
        (refusal(401, f"{KEY} is no key"), r"401 \*\*\* is no key"),
        (refusal(403, "not you"), "403 not you"),
        (refusal(404, "no model m"), "404 no model m"),
        (refusal(429, "insufficient_quota: pay first"), "pay first"),
        (Fault(307, headers={"location": "http://127.0.0.1:1/v1/chat/completions"}), "a redirect to http://127"),
    ],
)
def test_what_will_not_pass_ends_the_run_at_once_with_the_servers_words(
    server: FakeEndpoint, ask: Callable[..., Any], fault: Fault, message: str
) -> None:
    server.faults = [fault]
    with pytest.raises(KdscaleError, match=message) as caught:
        ask("a")
    assert len(server.asked) == 1
    assert KEY not in str(caught.value)


def test_a_prompt_that_is_refused_may_be_passed_over(server: FakeEndpoint, ask: Callable[..., Any]) -> None:
    server.faults = [refusal(400, "too long")]
    assert ask("a", "b", on_refusal="skip") == [[], ["b #0"]]
    assert ask("a", "b", on_refusal="skip") == [[], ["b #0"]]
    assert len(server.asked) == 2
    server.faults = [refusal(401, "no key")]
    with pytest.raises(ConfigError, match=r"responses\.endpoint\.key_variable(.|\n)*401"):
        ask("c", on_refusal="skip")


def test_the_budget_is_never_passed_and_a_higher_one_goes_on(server: FakeEndpoint, ask: Callable[..., Any]) -> None:
    settings = {"sampling": {"max_tokens": 10}, "concurrency": 4}
    texts = [f"prompt {i}" for i in range(12)]
    with pytest.raises(SpendingLimitError, match=r"at most 100 tokens") as caught:
        ask(*texts, limits={"total_tokens": 100}, **settings)
    assert caught.value.exit_code == 14
    bought = len(server.asked)
    assert 0 < 15 * bought <= 100
    with pytest.raises(SpendingLimitError):  # what was spent before counts
        ask(*texts, limits={"total_tokens": 15 * bought + 5}, **settings)
    assert len(server.asked) == bought
    cost = {"total_cost": 1.0, "input_price": 1000.0, "output_price": 1000.0}
    assert len(ask(*texts, limits=cost, **settings)) == 12
    assert set(server.answered.values()) == {1}


def test_the_pace_is_kept(server: FakeEndpoint, ask: Callable[..., Any]) -> None:
    begin = time.monotonic()
    ask(*"abcdef", concurrency=6, limits={"requests_per_minute": 600})
    assert time.monotonic() - begin >= 0.5


def test_an_endpoint_that_counts_nothing_is_counted_for(
    server: FakeEndpoint, ask: Callable[..., Any], tmp_path: Path
) -> None:
    server.faults = [Fault(body=chat([{**GOOD, "message": {"content": "123456"}}]))]
    ask("a")
    assert Journal(tmp_path / "journal").usage == Usage(8, 2)


def test_the_words_likely_tokens_come_along(server: FakeEndpoint, ask: Callable[..., Any], tmp_path: Path) -> None:
    ask("so it is", sampling={"top_logprobs": 3})
    (record,) = map(json.loads, (tmp_path / "journal" / "answers.jsonl").read_text().splitlines())
    assert record["answers"][0]["logprobs"][0] == ["so", [["so", -0.5]]]
    server.faults = [Fault(body=chat([GOOD]))]
    with pytest.raises(ServiceError, match="top_logprobs"):
        ask("b", sampling={"top_logprobs": 3})


def test_without_the_key_nobody_is_asked(
    server: FakeEndpoint, ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in ("", "two words", "line\nbreak"):
        monkeypatch.setenv("FAKE_KEY", value)
        with pytest.raises(ConfigError, match=r"(?s)\A(?!.*two words).*FAKE_KEY"):
            ask("a")
    assert server.asked == []
