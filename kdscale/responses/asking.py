"""Many questions to one endpoint: some at a time, at its pace and within the budget. Each answer goes into a journal.

A question that is answered is never asked again. What a kill costs are the requests under way, at most `concurrency`:
they may have been computed, and are asked again.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from kdscale.config.endpoint import EndpointConfig
from kdscale.config.responses.settings import LimitsConfig, ResponsesConfig
from kdscale.errors import Interrupted, ServiceError, SpendingLimitError
from kdscale.responses.client import Client, NotNowError, RefusedError
from kdscale.responses.journal import Usage, usage_of
from kdscale.responses.limits import Budget, Pace
from kdscale.runtime.progress import Bar
from kdscale.runtime.signals import StopRequest, watch_signals
from kdscale.units import format_duration
from kdscale_launch.watchdog import beat

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 10.0  # for the requests under way when the run stops: they are paid for
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0  # seconds before a request is sent again
_LONGEST_WAIT = 3600.0  # that a server may ask for

_NOTHING, _NO_LIMITS = Usage(), LimitsConfig()


@dataclass(frozen=True)
class Question:
    """A request and what becomes of its answer.

    `read` makes the journal's record of an answer, and raises NotNowError for one that is not usable. `most`: the
    tokens that it takes at most, about; `about` names it in messages.
    """

    key: str
    path: str
    body: dict[str, Any]
    read: Callable[[dict[str, Any]], dict[str, Any]]
    most: Usage = _NOTHING
    about: str = ""


@dataclass(frozen=True, kw_only=True)
class RequestPolicy:
    """How an endpoint is asked, which `section` of the config describes."""

    section: str
    endpoint: EndpointConfig
    concurrency: int
    retries: int
    max_answer_bytes: int
    skip_refused: bool = False
    limits: LimitsConfig = _NO_LIMITS

    @classmethod
    def of(cls, settings: ResponsesConfig) -> RequestPolicy:
        """How the endpoint that answers prompts is asked."""
        return cls(
            section="responses.endpoint", endpoint=settings.endpoint, concurrency=settings.concurrency,
            retries=settings.retries, max_answer_bytes=settings.max_answer_bytes,
            skip_refused=settings.on_refusal == "skip", limits=settings.limits,
        )  # fmt: skip


class Answers(Protocol):
    """Where answers are kept: a journal."""

    @property
    def usage(self) -> Usage: ...
    def __contains__(self, key: object) -> bool: ...
    def append(self, key: str, **content: Any) -> None: ...


def ask_all(questions: Iterable[Question], journal: Answers, policy: RequestPolicy, bar: Bar) -> None:
    """Ask every question that is not in the journal.

    Raises ServiceError for an endpoint that refuses or does not answer, ConfigError for one that does not accept the
    key, SpendingLimitError when a limit is reached, and Interrupted on a signal. Requests under way are waited for a
    moment first, and their answers are in the journal.
    """
    with watch_signals() as request:
        asyncio.run(_Asking(questions, journal, policy, bar, request).run())


class _StoppingError(Exception):
    """The run is about to stop: the request is not sent."""


class _Asking:
    def __init__(
        self, questions: Iterable[Question], journal: Answers, policy: RequestPolicy, bar: Bar, request: StopRequest
    ):
        self._journal, self._policy, self._bar, self._request = journal, policy, bar, request
        self._questions = self._missing(questions)
        self._pace, self._budget = Pace(policy.limits), Budget(policy.limits, journal.usage)
        self._keys: set[str] = set()  # under way
        self._jitter = random.Random()

    def _missing(self, questions: Iterable[Question]) -> Iterator[Question]:
        return (one for one in questions if one.key not in self._journal and one.key not in self._keys)

    async def run(self) -> None:
        """Ask until all is answered or something ends it."""
        self._stopping = asyncio.Event()
        self._client = Client(self._policy.endpoint, self._policy.section, self._policy.max_answer_bytes)
        tasks = {asyncio.create_task(self._worker()) for _ in range(self._policy.concurrency)}
        error: BaseException | None = None
        deadline = float("inf")
        try:
            while tasks:
                done, tasks = await asyncio.wait(tasks, timeout=_POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                beat()  # every wait in here has an end of its own
                failures = [failure for task in done if (failure := task.exception()) is not None]
                error = error or next(iter(failures), None)
                if self._request.signum and error is None:
                    error = Interrupted(self._request.signum)
                if error is not None and not self._stopping.is_set():
                    self._stopping.set()
                    deadline = time.monotonic() + _GRACE_SECONDS
                if time.monotonic() > deadline:
                    break
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._client.close()
        if error is not None:
            raise error

    async def _worker(self) -> None:
        for question in self._questions:
            self._keys.add(question.key)
            try:
                await self._answer(question)
            except _StoppingError:
                return
            finally:
                self._keys.discard(question.key)

    async def _answer(self, question: Question) -> None:
        """Ask one question within the budget, and put its answer into the journal."""
        while not self._budget.admit(question.most):
            if not self._budget.under_way:
                raise self._over_budget()
            await self._pause(_POLL_SECONDS)
        took = Usage()
        try:
            record = await self._ask(question)
            took = usage_of(record)
        finally:
            self._budget.settle(question.most, took)
        await asyncio.to_thread(self._journal.append, question.key, **record)
        self._bar.advance(1, self._budget.in_words())

    async def _ask(self, question: Question) -> dict[str, Any]:
        """The record of the answer, however often it has to be asked for."""
        policy, failure = self._policy, ""
        for attempt in range(policy.retries + 1):
            await self._pause(self._pace.turn(question.most.total))
            try:
                async with asyncio.timeout(policy.endpoint.timeout):
                    return question.read(await self._client.post(question.path, question.body))
            except TimeoutError:
                failure, wait = f"no answer within {policy.endpoint.timeout:g} s ({policy.section}.timeout)", None
            except NotNowError as problem:
                failure, wait = str(problem), problem.seconds
                if wait is not None and wait > _LONGEST_WAIT:
                    raise self._gave_up(f"{failure}; it asks to wait {format_duration(wait)}", question) from problem
                if problem.busy and wait is not None:
                    self._pace.hold(wait)  # it would tell the others the same
            except RefusedError as problem:
                if problem.about_prompt and policy.skip_refused:
                    return {"refused": f"{problem.status} {problem}"}
                raise self._refusal(problem, question) from problem
            if attempt < policy.retries:
                longest = min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE)
                await self._pause(longest * self._jitter.uniform(0.5, 1.0) if wait is None else wait)
        raise self._gave_up(f"{failure} ({policy.retries + 1} attempts)", question)

    async def _pause(self, seconds: float) -> None:
        """Wait, unless the run stops."""
        if seconds > 0 and not self._stopping.is_set():
            waiting: Awaitable[Any] = self._stopping.wait()
            try:
                await asyncio.wait_for(waiting, seconds)
            except TimeoutError:
                return
        if self._stopping.is_set():
            raise _StoppingError

    def _gave_up(self, failure: str, question: Question) -> ServiceError:
        return ServiceError(
            f"{self._policy.section}: no usable answer to {question.about}",
            expected=f"one from {self._policy.endpoint.base_url}", got=failure,
            hint="the answers so far are kept; the same command asks for the others",
        )  # fmt: skip

    def _refusal(self, problem: RefusedError, question: Question) -> ServiceError:
        skip = "; on_refusal: skip passes over such prompts" if problem.about_prompt else ""
        return ServiceError(
            f"{self._policy.section}: the endpoint refused {question.about}", got=f"{problem.status} {problem}",
            hint=f"correct what it names; the answers so far are kept{skip}",
        )  # fmt: skip

    def _over_budget(self) -> SpendingLimitError:
        limits = self._policy.limits
        parts = [f"{limits.total_tokens:,} tokens"] if limits.total_tokens is not None else []
        parts += [f"a cost of {limits.total_cost:g}"] if limits.total_cost is not None else []
        return SpendingLimitError(
            "responses.limits: the next request could take more than is left",
            expected=f"at most {' and '.join(parts)}", got=self._budget.in_words(),
            hint="raise the limit and run the same command again: the answers so far are kept",
        )  # fmt: skip
