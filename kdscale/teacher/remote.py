"""Targets from a teacher that runs elsewhere: ranks ask for them over HTTP, kdscale.teacher.server answers.

Questions are sent ahead: while the student trains on one step, the teacher works on the next. Several services take
turns; one that does not answer is skipped.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kdscale.config.distill.targets import Needs
from kdscale.errors import ConfigError, FileError, LostRankError, ServiceError
from kdscale.files import read_text
from kdscale.runtime.ranks import rank
from kdscale.teacher.messages import Question, decode_targets
from kdscale.teacher.source import MicroBatch, OpenedSource, SourceRequest
from kdscale.teacher.targets import Targets, TopKTargets
from kdscale.weights import checkpoint_identity

if TYPE_CHECKING:
    import httpx

TOKEN_VARIABLE = "KDSCALE_TEACHER_TOKEN"

_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0  # seconds between rounds over all services
_CONNECT_SECONDS, _MAX_TOKEN_BYTES = 5.0, 4096
_AHEAD = 2  # open questions of a rank: one being computed, one waiting


class ServedTeacher:
    """A source of targets that asks one or more services and holds no weights."""

    def __init__(
        self, urls: Sequence[str], token: str, gives: Needs, *, vocab_size: int, timeout: float, first: int = 0
    ):
        """`timeout`: seconds without an answer from any service until LostRankError.

        `first`: where this rank starts in the list of urls, so that the ranks spread over the services.
        """
        self.model, self.gives = nn.Module(), gives  # no layers to search for a NaN
        top_k = min(gives.top_k, vocab_size)
        self._asked: dict[str, Any] = {"top_k": top_k, "temperature": gives.temperature, "vocab_size": vocab_size}
        self._timeout = timeout
        self._clients = [_client(url, token, timeout) for url in urls]
        self._turn = itertools.count(first)
        self._pool = ThreadPoolExecutor(_AHEAD, thread_name_prefix="teacher")
        self._under_way: dict[bytes, Future[bytes]] = {}

    def prefetch(self, batch: MicroBatch) -> None:
        """Ask now for targets that will be needed later."""
        body = _question(batch)
        if batch.rows and body not in self._under_way:
            self._under_way[body] = self._pool.submit(self._ask, body)

    def targets(self, batch: MicroBatch) -> Targets:
        """Targets of the batch's rows, on their device. Raises LostRankError when no service answers."""
        device, temperature, vocab_size = batch.rows_N.device, self._asked["temperature"], self._asked["vocab_size"]
        if batch.rows == 0:
            none_NK = torch.empty(0, self._asked["top_k"], device=device)
            return Targets(rows=0, top_k=TopKTargets(none_NK.long(), none_NK, none_NK[:, 0], temperature, vocab_size))
        body = _question(batch)
        coming = self._under_way.pop(body, None)
        answer = self._ask(body) if coming is None else coming.result()
        sent = decode_targets(answer, rows=batch.rows, **self._asked)
        ids_NK, logits_NK, lse_N = (t.to(device) for t in (sent.ids_NK, sent.logits_NK, sent.lse_N))
        return Targets(rows=batch.rows, top_k=TopKTargets(ids_NK, logits_NK, lse_N, temperature, vocab_size))

    def close(self) -> None:
        """Cancel the questions that nobody waits for, and close the connections."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for client in self._clients:
            client.close()

    def _ask(self, body: bytes) -> bytes:
        import httpx

        deadline, pause, failure = time.monotonic() + self._timeout, _FIRST_PAUSE, ""
        first = next(self._turn)
        while True:
            for offset in range(len(self._clients)):
                client = self._clients[(first + offset) % len(self._clients)]
                try:
                    answer = client.post("/targets", params=self._asked, content=body)
                except httpx.TransportError as error:
                    failure = f"{client.base_url}: {type(error).__name__}: {error}"
                    continue
                if answer.is_success:
                    return answer.content
                if answer.status_code < 500:  # the service would refuse it again
                    raise _refused(answer)
                failure = f"{client.base_url}: {answer.status_code} {answer.text}"
            if time.monotonic() > deadline:
                raise LostRankError(
                    "no teacher service answers",
                    expected=f"an answer within {self._timeout:.0f} s (distill.served.timeout)",
                    got=failure,
                    hint="check that kdscale serve-teacher still runs there",
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


def _question(batch: MicroBatch) -> bytes:
    return Question(batch.input_ids_BS, batch.position_ids_BS, batch.rows_N).encode()


def open_served(request: SourceRequest) -> OpenedSource:
    """The services of distill.served. Raises ConfigError when they cannot be used."""
    served = request.cfg.distill.served
    token = read_token(served.token_path(request.run_dir))
    about = check_services(served.urls, token, checkpoint_identity(request.teacher_dir), served.timeout)
    return OpenedSource(
        int(about["rows"]),
        lambda vocab_size: ServedTeacher(
            served.urls, token, request.needs, vocab_size=vocab_size, timeout=served.timeout, first=rank()
        ),
    )


def read_token(file: Path) -> str:
    """The token in the environment, or in `file`. Raises ConfigError when there is none; its message never shows it."""
    token, origin = os.environ.get(TOKEN_VARIABLE, "").strip(), TOKEN_VARIABLE
    try:
        if not token:
            origin, token = str(file), read_text(file, limit=_MAX_TOKEN_BYTES).strip()
    except FileError as error:
        raise ConfigError(
            "distill.served.token_file",
            expected="the token that kdscale serve-teacher wrote",
            got=f"{error.what} {error.got}".strip(),
            hint=f"copy it here, or set {TOKEN_VARIABLE}",
        ) from error
    if not token or not all("!" <= character <= "~" for character in token):
        got = f"{origin} holds blanks or control characters" if token else f"{origin} is empty"
        raise ConfigError("distill.served.token_file", expected="a token of visible ASCII characters", got=got)
    return token


def check_services(urls: Sequence[str], token: str, expected: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """Check that all services serve the teacher whose checkpoint_identity is `expected`; what the last one reports.

    Raises ConfigError for a wrong address or token, or when one serves another teacher.
    """
    import httpx

    about: dict[str, Any] = {}
    for url in urls:
        with _client(url, token, timeout) as client:
            try:
                answer = client.get("/about")
            except httpx.TransportError as error:
                raise ConfigError(
                    "distill.served.urls",
                    expected=f"a teacher service at {url}",
                    got=f"{type(error).__name__}: {error}",
                    hint="start it with kdscale serve-teacher CONFIG, and name a host that the ranks can reach",
                ) from error
        if not answer.is_success:
            raise _refused(answer)
        about = answer.json()
        differing = [key for key, value in expected.items() if about.get("teacher", {}).get(key) != value]
        if differing:
            raise ConfigError(
                f"distill.served.urls: the teacher at {url}",
                expected="the teacher of this run",
                got=f"another one: {', '.join(differing)} differ",
                hint="start the service with this run's config",
            )
    return about


def _client(url: str, token: str, timeout: float) -> httpx.Client:
    import httpx

    return httpx.Client(
        base_url=url,
        headers={"authorization": f"Bearer {token}"},
        timeout=httpx.Timeout(timeout, connect=min(_CONNECT_SECONDS, timeout)),
        trust_env=False,  # a proxy for the web must not come between ranks
    )


def _refused(answer: httpx.Response) -> ConfigError | ServiceError:
    if answer.status_code in (401, 403):
        return ConfigError(
            "distill.served.token_file",
            expected=f"the token of the service at {answer.url.host}",
            got="a token that it does not accept",
            hint="copy the file that kdscale serve-teacher named at its start",
        )
    return ServiceError(f"the teacher service at {answer.url.host} refused a question", got=answer.text)
