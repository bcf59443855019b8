"""Targets from a teacher that runs elsewhere: ranks ask for them over HTTP, kdscale.teacher.server answers.

Questions are sent ahead: while the student trains on one step, the teacher works on the next.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kdscale.config.distill.targets import Needs
from kdscale.config.endpoint import fits_header
from kdscale.errors import ConfigError, FileError, ServiceError
from kdscale.files import read_text
from kdscale.runtime.http_status import without_key
from kdscale.runtime.ranks import rank
from kdscale.teacher.messages import Question, decode_targets
from kdscale.teacher.services import Services, make_client
from kdscale.teacher.source import MicroBatch, OpenedSource, SourceRequest
from kdscale.teacher.targets import Targets, TopKTargets
from kdscale.weights import checkpoint_identity

if TYPE_CHECKING:
    import httpx

TOKEN_VARIABLE = "KDSCALE_TEACHER_TOKEN"

_MAX_TOKEN_BYTES = 4096


class ServedTeacher:
    """A source of targets that asks one or more services and holds no weights."""

    def __init__(
        self, urls: Sequence[str], token: str, gives: Needs, *, vocab_size: int, timeout: float, first: int = 0
    ):
        """See Services for `timeout` and `first`."""
        self.model, self.gives = nn.Module(), gives  # no layers to search for a NaN
        self._top_k, self._vocab_size = min(gives.top_k, vocab_size), vocab_size
        self._services = Services[tuple[bytes, float]](
            [make_client(url, token, timeout) for url in urls],
            lambda client, question: client.post("/targets", params=self._asked(question[1]), content=question[0]),
            _refused, key=token,
            section="distill.served", timeout=timeout, first=first,
            hint="check that kdscale serve-teacher still runs there",
        )  # fmt: skip

    def prefetch(self, batch: MicroBatch) -> None:
        """Ask now for targets that will be needed later."""
        if batch.rows:
            self._services.ask_ahead((_question(batch), self.gives.temperature_at(batch.step)))

    def targets(self, batch: MicroBatch) -> Targets:
        """Targets of the batch's rows, on their device. Raises LostRankError when no service answers."""
        device, vocab_size = batch.rows_N.device, self._vocab_size
        temperature = self.gives.temperature_at(batch.step)
        if batch.rows == 0:
            none_NK = torch.empty(0, self._top_k, device=device)
            return Targets(rows=0, top_k=TopKTargets(none_NK.long(), none_NK, none_NK[:, 0], temperature, vocab_size))
        answer = self._services.answer((_question(batch), temperature))
        sent = decode_targets(answer, rows=batch.rows, **self._asked(temperature))
        ids_NK, logits_NK, lse_N = (t.to(device) for t in (sent.ids_NK, sent.logits_NK, sent.lse_N))
        return Targets(rows=batch.rows, top_k=TopKTargets(ids_NK, logits_NK, lse_N, temperature, vocab_size))

    def close(self) -> None:
        """Cancel the questions that nobody waits for, and close the connections."""
        self._services.close()

    def _asked(self, temperature: float) -> dict[str, Any]:
        return {"top_k": self._top_k, "temperature": temperature, "vocab_size": self._vocab_size}


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
    if not fits_header(token):
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
        with make_client(url, token, timeout) as client:
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
            raise _refused(answer, without_key(answer.text, token))
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


def _refused(answer: httpx.Response, words: str) -> ConfigError | ServiceError:
    if answer.status_code in (401, 403):
        return ConfigError(
            "distill.served.token_file",
            expected=f"the token of the service at {answer.url.host}",
            got="a token that it does not accept",
            hint="copy the file that kdscale serve-teacher named at its start",
        )
    return ServiceError(f"the teacher service at {answer.url.host} refused a question", got=words)
