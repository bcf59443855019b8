"""One request to an OpenAI-compatible endpoint through the library `openai`.

The library's own retries are off: kdscale.responses.asking knows how long to wait, what is left to spend and whether
the run is about to stop. Redirects are off too: the key is for one host.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from email.utils import parsedate_to_datetime
from typing import Any

from kdscale.config.endpoint import EndpointConfig
from kdscale.errors import ConfigError, FileError
from kdscale.files import parse_json
from kdscale.runtime.http_status import may_pass, without_key, wrong_setting
from kdscale.runtime.packages import require_packages

_CONNECT_SECONDS = 20.0
_ABOUT_THE_PROMPT = (400, 413, 422)
_USED_UP = ("insufficient_quota", "billing")  # in the words of a 429 that waiting does not cure
_LONGEST_WORDS = 2000


class NotNowError(Exception):
    """A request that failed for a reason that may pass; `seconds`: how long the server asks to wait."""

    def __init__(self, words: str, seconds: float | None = None, busy: bool = False):
        super().__init__(words[:_LONGEST_WORDS])
        self.seconds, self.busy = seconds, busy


class RefusedError(Exception):
    """A request that will fail again. `about_prompt`: another prompt may be answered."""

    def __init__(self, status: int, words: str, about_prompt: bool):
        super().__init__(words[:_LONGEST_WORDS])
        self.status, self.about_prompt = status, about_prompt


class Client:
    """A connection pool to one endpoint; used within one event loop."""

    def __init__(self, endpoint: EndpointConfig, section: str, max_answer_bytes: int):
        """Raises ConfigError when the library or the key is missing."""
        check_library(section)
        import httpx2
        import openai

        self._section, self._key = section, endpoint.key(section)
        self._openai, self._response = openai, httpx2.Response
        self._client = openai.AsyncOpenAI(
            base_url=endpoint.base_url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=httpx2.Timeout(endpoint.timeout, connect=min(_CONNECT_SECONDS, endpoint.timeout)),
            http_client=httpx2.AsyncClient(
                headers={"accept-encoding": "identity"},  # a compressed answer may be a thousand times as large
                event_hooks={"response": [_limit(max_answer_bytes)]},
                follow_redirects=False,
                limits=httpx2.Limits(),  # as many connections as there are requests
                trust_env=not endpoint.on_this_machine,  # for the web the environment may name a proxy
            ),
        )
        # the environment may hold these for another endpoint
        self._client.organization = self._client.project = None

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that the endpoint answers.

        Raises NotNowError or RefusedError, and ConfigError for a key or an address that it does not accept.
        """
        openai = self._openai
        try:
            answer = await self._client.post(path, cast_to=self._response, body=body)
        except openai.APIStatusError as error:
            raise self._failure(error.response) from error
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise NotNowError(f"{type(cause).__name__}: {cause}") from error
        try:
            tree: dict[str, Any] = parse_json(answer.text, "the answer", expect=dict)
        except FileError as error:
            raise NotNowError(str(error)) from error
        return tree

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def _failure(self, response: Any) -> NotNowError | RefusedError | ConfigError:
        words, status = without_key(_words(response), self._key), response.status_code
        used_up = status == 429 and any(mark in words for mark in _USED_UP)
        if may_pass(status) and not used_up:
            return NotNowError(f"{status} {words}", retry_after(response.headers), busy=status in (429, 503))
        error = wrong_setting(self._section, status, words, response.headers.get("location"))
        return error or RefusedError(status, words, status in _ABOUT_THE_PROMPT)


def check_library(section: str) -> None:
    """Raises ConfigError, which names `section`, when the client library is not installed."""
    require_packages(section, ("openai", "httpx2"), "responses")


def retry_after(headers: Any) -> float | None:
    """Seconds that the server asks to wait, from `retry-after-ms`, or `retry-after` in seconds or as a date."""
    text = headers.get("retry-after-ms") or headers.get("retry-after") or ""
    try:
        seconds = float(text) / (1000.0 if headers.get("retry-after-ms") else 1.0)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _words(response: Any) -> str:
    """What the server says: the message of OpenAI's error object, or the whole text."""
    try:
        error = parse_json(response.text, "the error", expect=dict).get("error")
        if isinstance(error, dict) and isinstance(error.get("message"), str):
            code = error.get("code") or error.get("type")
            return f"{error['message']}" + (f" ({code})" if isinstance(code, str) else "")
    except FileError:
        pass
    return str(response.text)


def _limit(most_bytes: int) -> Callable[[Any], Awaitable[None]]:
    """What makes the reading of an answer end with an error after so many bytes, whatever its status."""
    import httpx2

    class Limited(httpx2.AsyncByteStream):
        def __init__(self, stream: Any):
            self._stream = stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            size = 0
            async for block in self._stream:
                size += len(block)
                if size > most_bytes:
                    raise httpx2.ReadError(f"an answer of more than {most_bytes:,} bytes")
                yield block

        async def aclose(self) -> None:
            await self._stream.aclose()

    async def limit(response: Any) -> None:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise httpx2.ReadError("an answer that is compressed, which was not asked for")
        response.stream = Limited(response.stream)

    return limit
