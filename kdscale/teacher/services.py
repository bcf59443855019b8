"""HTTP services that a source of targets asks: questions sent ahead, services in turn, one that is gone is skipped."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, TypeVar

from kdscale.errors import KdscaleError, LostRankError, ServiceError
from kdscale.runtime.http_status import may_pass, without_key

if TYPE_CHECKING:
    import httpx

Question = TypeVar("Question", bound=Hashable)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0  # seconds between rounds over all services
_CONNECT_SECONDS = 5.0
_AHEAD = 2  # open questions of a rank: one being computed, one waiting
_OF_TRANSFER = ("content-encoding", "content-length", "transfer-encoding")


class Services(Generic[Question]):
    """Services of which each gives the same answers.

    `send` asks one of them a question and may raise httpx's RequestError; its answer's content is what `answer`
    returns. `refused` makes the error for an answer that no other service would give differently, from it and its
    words, in which `key` (the token that is sent) is hidden. `section`: of the config, which has a `timeout`: seconds
    without an answer from any of them until LostRankError.
    """

    def __init__(
        self,
        clients: Sequence[httpx.Client],
        send: Callable[[httpx.Client, Question], httpx.Response],
        refused: Callable[[httpx.Response, str], KdscaleError],
        *,
        key: str | None,
        section: str,
        timeout: float,
        first: int = 0,
        hint: str = "",
    ):
        """`first`: where this rank starts in the list of services, so that the ranks spread over them."""
        self._clients, self._send, self._refused = clients, send, refused
        self._key, self._section, self._timeout, self._hint = key, section, timeout, hint
        self._turn = itertools.count(first)
        self._pool = ThreadPoolExecutor(_AHEAD, thread_name_prefix="teacher")
        self._under_way: dict[Question, Future[bytes]] = {}

    def ask_ahead(self, question: Question) -> None:
        """Ask now what will be needed later."""
        if question not in self._under_way:
            self._under_way[question] = self._pool.submit(self._ask, question)

    def answer(self, question: Question) -> bytes:
        """The content of the answer. Raises LostRankError when no service answers, and what `refused` makes."""
        coming = self._under_way.pop(question, None)
        return self._ask(question) if coming is None else coming.result()

    def close(self) -> None:
        """Cancel the questions that nobody waits for, and close the connections."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for client in self._clients:
            client.close()

    def _ask(self, question: Question) -> bytes:
        import httpx

        deadline, pause, failure = time.monotonic() + self._timeout, _FIRST_PAUSE, ""
        first = next(self._turn)
        while True:
            for offset in range(len(self._clients)):
                client = self._clients[(first + offset) % len(self._clients)]
                try:
                    answer = self._send(client, question)
                except httpx.RequestError as error:
                    failure = f"{client.base_url}: {type(error).__name__}: {error}"
                    continue
                if answer.is_success:
                    return answer.content
                words = without_key(answer.text, self._key)
                if not may_pass(answer.status_code):
                    raise self._refused(answer, words)
                failure = f"{client.base_url}: {answer.status_code} {words}"
            if time.monotonic() > deadline:
                raise LostRankError(
                    "no teacher service answers",
                    expected=f"an answer within {self._timeout:.0f} s ({self._section}.timeout)",
                    got=failure,
                    hint=self._hint,
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


def make_client(url: str, token: str | None, timeout: float, *, through_proxy: bool = False) -> httpx.Client:
    """A client of one service, which follows no redirect: the token is for this address alone.

    `through_proxy`: the one that the environment names, for the web; it must not come between ranks.
    """
    import httpx

    return httpx.Client(
        base_url=url,
        headers={} if token is None else {"authorization": f"Bearer {token}"},
        timeout=httpx.Timeout(timeout, connect=min(_CONNECT_SECONDS, timeout)),
        trust_env=through_proxy,
    )


def post_limited(client: httpx.Client, path: str, body: bytes, limit: int) -> httpx.Response:
    """The answer to a JSON body, read whole. Raises ServiceError when it has more than `limit` bytes."""
    import httpx

    with client.stream("POST", path, content=body, headers={"content-type": "application/json"}) as answer:
        content = bytearray()
        for block in answer.iter_bytes():
            content += block
            if len(content) > limit:
                raise ServiceError(
                    f"an answer of {answer.url.host} is too large", expected=f"at most {limit:,} bytes", got="more"
                )
    # the content is decoded: the length and the encoding of what was sent no longer fit it
    headers = [(name, value) for name, value in answer.headers.items() if name not in _OF_TRANSFER]
    return httpx.Response(answer.status_code, headers=headers, content=bytes(content), request=answer.request)
