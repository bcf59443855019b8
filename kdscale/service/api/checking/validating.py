"""Checking a config before it is submitted: what is refused, the student's shape, memory, speed and days.

What needs the run's own libraries happens in a process of its own, with a time limit, and few of them at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import State

from kdscale.config.fields import shown
from kdscale.service.api.bodies import described, json_body
from kdscale.service.api.checking.hardware import gpus_of
from kdscale.service.api.children import child_environment
from kdscale.service.api.dependencies import Reader
from kdscale.service.api.schemas import Question, Refusal, Verdict
from kdscale.service.api.submitting import read_submission
from kdscale.service.ids import new_run_id
from kdscale.service.problems import Problem
from kdscale.service.redaction import redacted
from kdscale.sizing.gpus import known_gpus

router = APIRouter(prefix="/v1/runs", tags=["runs"])
_AT_ONCE, _MOST_WAITING = 2, 8
_ASSUMED_GPU, _ASSUMED_GPUS = "h100", 8
_MOST_BYTES = 4 << 20  # of an answer


@router.post(":validate", openapi_extra=described(Question))
async def validate(actor: Reader, request: Request, body: Annotated[Question, Depends(json_body(Question))]) -> Verdict:
    """Say what a config would make and need, and what of it is refused; nothing is started or written."""
    state = request.app.state
    cluster = await run_in_threadpool(_cluster, body)
    try:
        planned = await run_in_threadpool(read_submission, state, actor, body, new_run_id(), None)
    except Problem as problem:
        return Verdict(valid=False, notes=[], refused=_refusals(problem))
    config = planned.config.resolved()
    here = planned.target.get("engine", "local") == "local"
    answer = await _ask(state, {"config": config, "here": here, "cluster": cluster})
    told: dict[str, Any] = redacted(answer)
    return Verdict(valid=not told["refused"], config=redacted(config), **told)


def _refusals(problem: Problem) -> list[Refusal]:
    entries = problem.extra.get("errors") or [{"detail": problem.detail, **problem.extra}]
    known = Refusal.model_fields
    return [Refusal(**{"field": "", **{name: entry[name] for name in known if name in entry}}) for entry in entries]


def _cluster(body: Question) -> dict[str, Any]:
    """What the estimate is for: what was asked, else the GPUs of this machine, else what is assumed."""
    if body.gpu is not None and body.gpu not in known_gpus():
        raise Problem(
            422, "request", "the estimate knows no such GPU", field="gpu", expected=f"one of {', '.join(known_gpus())}",
            got=body.gpu, hint="name the nearest",
        )  # fmt: skip
    own = gpus_of() if body.gpu is None else None
    kind, count = own or (_ASSUMED_GPU, _ASSUMED_GPUS)
    return {
        "gpu": body.gpu or kind, "nodes": body.nodes, "gpus_per_node": body.gpus_per_node or count,
        "host_memory_bytes": body.host_memory_bytes, "assumed": body.gpu is None and own is None,
    }  # fmt: skip


async def _ask(state: State, question: dict[str, Any]) -> dict[str, Any]:
    """The answer of a child process. Raises a Problem when it takes too long, fails, or too many wait."""
    if getattr(state, "checks", None) is None:
        state.checks, state.waiting_checks = asyncio.Semaphore(_AT_ONCE), 0
    if state.waiting_checks >= _MOST_WAITING:
        raise Problem(429, "limit", "too many configs are being checked", headers={"Retry-After": "5"})
    state.waiting_checks += 1
    try:
        async with state.checks:
            return await _in_child(question, state.settings.limits.check_seconds)
    finally:
        state.waiting_checks -= 1


async def _in_child(question: dict[str, Any], seconds: float) -> dict[str, Any]:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kdscale.service.api.checking.estimate", stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=child_environment(), start_new_session=True,
        limit=_MOST_BYTES,
    )  # fmt: skip
    try:
        async with asyncio.timeout(seconds):
            out, err = await child.communicate(json.dumps(question).encode())
    except TimeoutError:
        raise Problem(
            503, "slow", f"the check took more than {seconds:g} seconds", hint="submit it: the run says what is wrong"
        ) from None
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            await child.wait()
    try:
        if child.returncode or len(out) > _MOST_BYTES:
            raise ValueError(err.decode("utf-8", "replace")[-500:])
        answer: dict[str, Any] = json.loads(out)
    except ValueError as error:
        raise Problem(503, "check", "the config could not be checked", got=shown(str(error))) from error
    return answer
