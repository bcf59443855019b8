"""The teacher as a service: one process holds it and answers the questions of the ranks (kdscale.teacher.remote).

GET /about describes the teacher; POST /targets takes and returns safetensors bytes (kdscale.teacher.messages). Every
request needs the token. One question is computed at a time; the others wait. What a question may cost is limited, and
a question whose client has gone is given up at the next layer.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import secrets
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import kdscale
from kdscale.config.distill.targets import SOURCES, Needs
from kdscale.errors import ServiceError
from kdscale.files import write_private
from kdscale.models.attention import attend_within_documents
from kdscale.models.documents import Documents
from kdscale.models.head import head_of
from kdscale.teacher.messages import Question, encode_targets
from kdscale.teacher.online import OnlineTeacher
from kdscale.teacher.placement.placed import ReplicatedTeacher
from kdscale.teacher.remote import TOKEN_VARIABLE, read_token
from kdscale.teacher.source import MicroBatch
from kdscale.weights import checkpoint_identity

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request

_BODY_BYTES_PER_TOKEN = 12  # three int32 per position, besides the header
_HEADER_BYTES = 4096
_MAX_TOP_K = SOURCES["served"].gives.top_k
_MAX_ANSWER_BYTES = 1 << 29
_TEMPERATURES = (1e-3, 1e3)  # beyond them, float32 logits become inf or all the same
_CLOSE = {"connection": "close"}  # the rest of the request is not read


class ClientLeft(Exception):  # noqa: N818 - says what happened
    """Nobody waits for the answer any more."""


def make_token(file: Path) -> str:
    """The token in `file`. When there is none yet it is made, and written so that only its owner can read it."""
    if not file.exists() and not os.environ.get(TOKEN_VARIABLE):
        write_private(file, f"{secrets.token_urlsafe(32)}\n".encode())
    return read_token(file)


class TeacherService:
    """Holds the model and answers one question at a time: up to `max_tokens` tokens, in sequences of `max_length`."""

    def __init__(self, model: Any, teacher_dir: Path, *, device: torch.device, max_tokens: int, max_length: int):
        self._model, self._device, self._max_tokens = model, device, max_tokens
        attend_within_documents(model)
        self._rows = head_of(model).vocab
        self._embedded = model.get_input_embeddings().weight.shape[0]
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._positions = int(positions or max_tokens)
        self._max_length = max_length
        self._identity = checkpoint_identity(teacher_dir)
        self._lock = threading.Lock()
        self._client_left = threading.Event()  # of the question being computed
        for layers in model.modules():
            for layer in layers if isinstance(layers, nn.ModuleList) else ():
                layer.register_forward_pre_hook(self._stop_if_client_left)

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
            "max_length": self._max_length,
        }

    def _stop_if_client_left(self, *_: Any) -> None:
        if self._client_left.is_set():
            raise ClientLeft

    def answer(
        self, body: bytes, top_k: int, temperature: float, vocab_size: int, client_left: threading.Event | None = None
    ) -> bytes:
        """The answer to a question, as bytes. Raises ServiceError for one that this teacher cannot or will not answer.

        Raises ClientLeft soon after `client_left` is set.
        """
        low, high = _TEMPERATURES
        if not (0 < top_k <= min(_MAX_TOP_K, vocab_size) and vocab_size <= self._rows and low <= temperature <= high):
            raise ServiceError(
                "a question to the teacher",
                expected=f"top_k up to {_MAX_TOP_K}, vocab_size up to {self._rows}, temperature {low:g} to {high:g}",
                got=f"top_k {top_k}, vocab_size {vocab_size}, temperature {temperature}",
            )
        question = Question.decode(
            body, vocab_size=self._embedded, max_positions=self._positions, max_tokens=self._max_tokens,
            max_length=self._max_length,
        )  # fmt: skip
        if (nbytes := len(question.rows_N) * (8 * top_k + 4)) > _MAX_ANSWER_BYTES:
            raise ServiceError(
                "a question to the teacher",
                expected=f"an answer of at most {_MAX_ANSWER_BYTES:,} bytes",
                got=f"{len(question.rows_N):,} rows of top_k {top_k}: {nbytes:,} bytes",
                hint="a smaller distill.micro_batch or top_k",
            )
        with self._lock:
            self._client_left = client_left or threading.Event()
            self._stop_if_client_left()
            needs = Needs(top_k=top_k, temperature=temperature)
            teacher = OnlineTeacher(ReplicatedTeacher(self._model), needs, vocab_size=vocab_size)
            ids_BS, position_ids_BS, rows_N = (tensor.to(self._device) for tensor in question)
            documents = Documents.of(question.position_ids_BS).to(self._device)
            answer = teacher.targets(
                MicroBatch(ids_BS, position_ids_BS, rows_N, torch.full_like(rows_N, -100), documents=documents)
            )
            assert answer.top_k is not None
            return encode_targets(answer.top_k)


def make_app(service: TeacherService, token: str) -> Starlette:
    """The HTTP application: it checks token and size, and passes questions to `service`."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    async def about(_request: Request) -> Response:
        return JSONResponse(service.about())

    async def targets(request: Request) -> Response:
        try:
            body = await _read_body(request, service.body_limit)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        if body is None:
            return PlainTextResponse(f"a question of more than {service.body_limit} bytes", 413, headers=_CLOSE)
        query = request.query_params
        try:
            settings = int(query["top_k"]), float(query["temperature"]), int(query["vocab_size"])
        except (KeyError, ValueError):
            return PlainTextResponse("top_k, temperature and vocab_size are needed, as numbers", 422)
        client_left = threading.Event()
        watching = asyncio.ensure_future(_watch_client(request, client_left))
        try:
            answer = await run_in_threadpool(service.answer, body, *settings, client_left)
        except ServiceError as error:
            return PlainTextResponse(str(error), 422)
        except ClientLeft:
            return Response(status_code=400)
        except (RuntimeError, MemoryError) as error:  # no memory, a failing device: the client asks again
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:400]}"
            print(f"a question could not be answered: {reason}", file=sys.stderr, flush=True)
            return PlainTextResponse(reason, 500)
        finally:
            watching.cancel()
        return Response(answer, media_type="application/octet-stream")

    routes = [Route("/about", about), Route("/targets", targets, methods=["POST"])]
    return Starlette(routes=routes, middleware=[Middleware(_OnlyWithToken, token=token)])


async def _read_body(request: Request, limit: int) -> bytes | None:
    """The request's body; None when it has more than `limit` bytes, of which no more are read."""
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or len(declared) > len(str(limit)) or int(declared) > limit:
        return None
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            return None
    return bytes(body)


async def _watch_client(request: Request, client_left: threading.Event) -> None:
    """Set `client_left` when the connection ends; the whole body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    client_left.set()


class _OnlyWithToken:
    """ASGI middleware: nothing behind it sees a request without the token, whose body is not read."""

    def __init__(self, app: Any, token: str):
        self._app, self._authorization = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            header = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(header, self._authorization):
                from starlette.responses import PlainTextResponse

                headers = {"www-authenticate": "Bearer", **_CLOSE}
                refusal = PlainTextResponse("a valid token is needed", 401, headers=headers)
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)
