"""A real HTTP server on this machine that speaks OpenAI's API, and misbehaves as a test tells it to.

It keeps a log of what it was asked, so that a test can compare what was bought with what was kept.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Fault:
    """One answer that is not the right one. `hang`: seconds before it; `cut`: bytes of it, then the connection ends."""

    status: int = 200
    body: bytes | None = None  # None: the right answer
    headers: dict[str, str] = field(default_factory=dict)
    hang: float = 0.0
    cut: int | None = None


@dataclass
class FakeEndpoint:
    """What a server does, and what it was asked: `asked` has the path, headers and JSON body of each request.

    `faults` are used up one a request, the first first. `reply` makes the text of a chat answer from messages and the
    number of the answer; `score` makes prompt_logprobs of a list of prompts.
    """

    faults: list[Fault] = field(default_factory=list)
    reply: Callable[[list[dict[str, str]], int], str] = lambda messages, number: f"{messages[-1]['content']} #{number}"
    score: Callable[[list[list[int]], int], list[Any]] | None = None
    # of a request for a completion that asks for token ids, as vLLM's; and of what is not below /v1
    complete: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    control: Callable[[str, dict[str, Any]], dict[str, Any]] | None = None
    tokens: Callable[[str], list[str]] = lambda text: text.split(" ")  # of an answer, where log-probabilities are asked
    seconds: float = 0.0  # that each right answer takes
    asked: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)  # right answers that were sent whole, by the last message
    url: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _closing: threading.Event = field(default_factory=threading.Event)

    def next_fault(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Fault:
        with self._lock:
            self.asked.append((path, headers, body))
            return self.faults.pop(0) if self.faults else Fault(hang=self.seconds)

    def wait(self, seconds: float) -> None:
        if seconds:
            self._closing.wait(seconds)

    def right_answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path.endswith("/chat/completions"):
            return self._chat(body)
        if not path.startswith("/v1/"):
            assert self.control is not None
            return self.control(path, body)
        if self.complete is not None and "return_token_ids" in body:
            return self.complete(body)
        if path.endswith("/completions"):
            assert self.score is not None
            scored = self.score(body["prompt"], body["prompt_logprobs"])
            return {"choices": [{"index": i, "text": "", "prompt_logprobs": s} for i, s in enumerate(scored)]}
        return {"score": len(body["messages"][-1]["content"]) / 100}

    def _chat(self, body: dict[str, Any]) -> dict[str, Any]:
        choices = []
        for number in range(body.get("n", 1)):
            text = self.reply(body["messages"], number)
            choice = {
                "index": number, "finish_reason": "stop", "message": {"role": "assistant", "content": text}
            }  # fmt: skip
            if body.get("logprobs"):
                entries = [
                    {"token": word, "logprob": -0.5, "top_logprobs": [{"token": word, "logprob": -0.5}]}
                    for word in self.tokens(text)
                ]
                choice["logprobs"] = {"content": entries}
            choices.append(choice)
        used = {"prompt_tokens": 10, "completion_tokens": 5 * len(choices), "total_tokens": 10 + 5 * len(choices)}
        return {"id": "x", "object": "chat.completion", "model": body["model"], "choices": choices, "usage": used}


def scores_of(model: Any) -> Callable[[list[list[int]], int], list[Any]]:
    """What vLLM gives as prompt_logprobs: the top K at every position, and the text's own token at any rank."""
    import torch

    @torch.no_grad()
    def score(prompts: list[list[int]], top_k: int) -> list[Any]:
        out: list[Any] = []
        for prompt in prompts:
            logp_SV = model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
            entries: list[Any] = [None]  # nothing comes before the first token
            for position, token in enumerate(prompt[1:]):
                values, ids = logp_SV[position].topk(top_k)
                listed = dict(zip(ids.tolist(), values.tolist(), strict=True))
                listed[token] = float(logp_SV[position, token])
                entries.append({str(key): {"logprob": value} for key, value in listed.items()})
            out.append(entries)
        return out

    return score


@contextmanager
def serving(endpoint: FakeEndpoint) -> Iterator[FakeEndpoint]:
    """Run the server while the block runs; `endpoint.url` is its base_url."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Print nothing."""

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            fault = endpoint.next_fault(self.path, {k.lower(): v for k, v in self.headers.items()}, body)
            endpoint.wait(fault.hang)
            right = fault.body is None and fault.status == 200
            content = json.dumps(endpoint.right_answer(self.path, body)).encode() if right else fault.body or b""
            try:
                self._send(fault, content)
            except OSError:  # the client has gone
                return
            if right and fault.cut is None and "messages" in body:
                endpoint.answered[body["messages"][-1]["content"]] += 1

        def _send(self, fault: Fault, content: bytes) -> None:
            self.send_response(fault.status)
            for name, value in fault.headers.items():
                self.send_header(name, value)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: fault.cut])
            self.wfile.flush()
            if fault.cut is not None:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield endpoint
    finally:
        endpoint._closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
