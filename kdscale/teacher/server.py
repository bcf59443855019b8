"""The teacher as a service: one process holds it and answers the questions of the ranks (kdscale.teacher.remote).

GET /about describes the teacher; POST /targets takes and returns safetensors bytes (kdscale.teacher.messages). Every
request needs the token. One question is computed at a time; the others wait.
"""

from __future__ import annotations

import hmac
import os
import secrets
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import kdscale
from kdscale.config.targets import SOURCES, Needs
from kdscale.errors import ServiceError
from kdscale.files import atomic_path
from kdscale.models.head import head_of
from kdscale.teacher.messages import Question, encode_targets
from kdscale.teacher.online import OnlineTeacher
from kdscale.teacher.placement.placed import ReplicatedTeacher
from kdscale.teacher.remote import TOKEN_VARIABLE, read_token
from kdscale.teacher.source import MicroBatch
from kdscale.weights import checkpoint_identity

if TYPE_CHECKING:
    from starlette.applications import Starlette

_BODY_BYTES_PER_TOKEN = 12  # three int32 per position, besides the header
_HEADER_BYTES = 4096
_MAX_TOP_K = SOURCES["served"].gives.top_k


def make_token(file: Path) -> str:
    """The token in `file`. When there is none yet it is made, and written so that only its owner can read it."""
    if not file.exists() and not os.environ.get(TOKEN_VARIABLE):
        with atomic_path(file) as tmp:
            tmp.touch(mode=0o600)
            tmp.write_text(secrets.token_urlsafe(32) + "\n", encoding="utf-8")
    return read_token(file)


class TeacherService:
    """Holds the model and answers one question at a time."""

    def __init__(self, model: Any, teacher_dir: Path, *, device: torch.device, max_tokens: int):
        self._model, self._device, self._max_tokens = model, device, max_tokens
        self._rows = head_of(model).vocab
        self._embedded = model.get_input_embeddings().weight.shape[0]
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._positions = int(positions or max_tokens)
        self._identity = checkpoint_identity(teacher_dir)
        self._lock = threading.Lock()

    @property
    def body_limit(self) -> int:
        """The most bytes that a question may have."""
        return self._max_tokens * _BODY_BYTES_PER_TOKEN + _HEADER_BYTES

    def about(self) -> dict[str, Any]:
        """Which teacher this is and how it is served, as JSON values."""
        return {
            "kdscale": kdscale.__version__,
            "teacher": self._identity,
            "rows": self._rows,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "device": self._device.type,
            "max_tokens": self._max_tokens,
        }

    def answer(self, body: bytes, top_k: int, temperature: float, vocab_size: int) -> bytes:
        """The answer to a question, as bytes. Raises ServiceError for one that this teacher cannot answer."""
        if not (0 < top_k <= min(_MAX_TOP_K, vocab_size) and vocab_size <= self._rows and temperature > 0.0):
            raise ServiceError(
                "a question to the teacher",
                expected=f"top_k up to {_MAX_TOP_K}, vocab_size up to {self._rows}, a positive temperature",
                got=f"top_k {top_k}, vocab_size {vocab_size}, temperature {temperature}",
            )
        question = Question.decode(
            body, vocab_size=self._embedded, max_positions=self._positions, max_tokens=self._max_tokens
        )
        with self._lock:
            needs = Needs(top_k=top_k, temperature=temperature)
            teacher = OnlineTeacher(ReplicatedTeacher(self._model), needs, vocab_size=vocab_size)
            ids_BS, position_ids_BS, rows_N = (tensor.to(self._device) for tensor in question)
            answer = teacher.targets(MicroBatch(ids_BS, position_ids_BS, rows_N, torch.full_like(rows_N, -100)))
            assert answer.top_k is not None
            return encode_targets(answer.top_k)


def make_app(service: TeacherService, token: str) -> Starlette:
    """The HTTP application: it checks token and size, and passes questions to `service`."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    async def about(_request: Request) -> Response:
        return JSONResponse(service.about())

    async def targets(request: Request) -> Response:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > service.body_limit:
                return PlainTextResponse(f"a question of more than {service.body_limit} bytes", 413)
        query = request.query_params
        try:
            settings = int(query["top_k"]), float(query["temperature"]), int(query["vocab_size"])
        except (KeyError, ValueError):
            return PlainTextResponse("top_k, temperature and vocab_size are needed, as numbers", 422)
        try:
            answer = await run_in_threadpool(service.answer, bytes(body), *settings)
        except ServiceError as error:
            return PlainTextResponse(str(error), 422)
        return Response(answer, media_type="application/octet-stream")

    routes = [Route("/about", about), Route("/targets", targets, methods=["POST"])]
    return Starlette(routes=routes, middleware=[Middleware(_OnlyWithToken, token=token)])


class _OnlyWithToken:
    """ASGI middleware: nothing behind it sees a request without the token."""

    def __init__(self, app: Any, token: str):
        self._app, self._authorization = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            header = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(header, self._authorization):
                from starlette.responses import PlainTextResponse

                refusal = PlainTextResponse("a valid token is needed", 401, headers={"www-authenticate": "Bearer"})
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)
