"""A prompt as a request to an endpoint, and what the endpoint answers as a record of the journal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdscale.config.responses.settings import ResponsesConfig
from kdscale.errors import ServiceError
from kdscale.responses.asking import Question
from kdscale.responses.client import NotNowError
from kdscale.responses.journal import Usage, key_of
from kdscale.responses.prompts import Prompt

PATH = "chat/completions"
ANSWER = "choices.0.message.content"  # where the text of the first answer is
_BYTES_A_TOKEN = 3  # of a prompt, until the endpoint has counted; English has four, code three


@dataclass
class Answer:
    """One answer to a prompt; `dropped_by` names the filter that dropped it, "" while none has."""

    text: str
    finish_reason: str
    dropped_by: str = ""
    logprobs: list[Any] = field(default_factory=list)  # [token, [[token, log-probability], ...]] for each token


class _Said(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Likely(_Said):
    token: str
    logprob: float = Field(le=0.01)


class _Token(_Likely):
    top_logprobs: list[_Likely]


class _Logprobs(_Said):
    content: list[_Token] | None = None


class _Message(_Said):
    content: str | None = None


class _Choice(_Said):
    index: int = 0
    message: _Message
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Usage(_Said):
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)


class _Completion(_Said):
    choices: list[_Choice]
    usage: _Usage | None = None


def question_of(prompt: Prompt, settings: ResponsesConfig) -> Question:
    """The request that has the endpoint answer a prompt; its key is a hash of the whole request."""
    sampling = settings.sampling
    body: dict[str, Any] = {
        "model": settings.endpoint.model, "messages": prompt.messages, "n": sampling.n,
        "temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_tokens,
    }  # fmt: skip
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.top_logprobs:
        body |= {"logprobs": True, "top_logprobs": sampling.top_logprobs}
    body = {name: value for name, value in (body | settings.request).items() if value is not None}
    longest = body.get("max_tokens", body.get("max_completion_tokens", sampling.max_tokens))
    most = Usage(_estimated(prompt.messages), sampling.n * longest)
    return Question(
        key_of(PATH, body), PATH, body, lambda tree: _record_of(tree, settings, most.prompt_tokens), most, prompt.where
    )


def answers_of(record: dict[str, Any]) -> list[Answer]:
    """The answers of a record; none where the endpoint refused the prompt."""
    return [
        Answer(answer["text"], answer["finish_reason"], logprobs=answer.get("logprobs", []))
        for answer in record.get("answers", [])
    ]


def _estimated(messages: Sequence[dict[str, str]]) -> int:
    return sum(8 + len(message["content"].encode()) // _BYTES_A_TOKEN for message in messages)


def _record_of(tree: dict[str, Any], settings: ResponsesConfig, estimated: int) -> dict[str, Any]:
    """The record of what an endpoint sent.

    Raises NotNowError where that is no chat completion, ServiceError where it lacks what was asked for.
    """
    sampling = settings.sampling
    try:
        said = _Completion.model_validate(tree)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise NotNowError(f"what it sent is no chat completion: {where}: {problem['msg']}") from error
    choices = sorted(said.choices, key=lambda choice: choice.index)
    if len(choices) != sampling.n:
        raise NotNowError(f"{len(choices)} answers in place of {sampling.n}")
    answers = []
    for choice in choices:
        answer: dict[str, Any] = {
            "text": choice.message.content or "",
            "finish_reason": choice.finish_reason or "",
        }
        if sampling.top_logprobs:
            answer["logprobs"] = _compact(choice.logprobs, sampling.top_logprobs)
        answers.append(answer)
    counted = said.usage or _Usage(
        prompt_tokens=estimated,
        completion_tokens=sum(len(answer["text"].encode()) // _BYTES_A_TOKEN for answer in answers),
    )
    return {
        "answers": answers, "prompt_tokens": counted.prompt_tokens, "answer_tokens": counted.completion_tokens,
    }  # fmt: skip


def _compact(logprobs: _Logprobs | None, count: int) -> list[Any]:
    """[token, [[token, log-probability], ...]] for each token of an answer."""
    if logprobs is None or logprobs.content is None:
        raise ServiceError(
            "responses.sampling.top_logprobs", expected="an endpoint that gives them", got="an answer without",
            hint="top_logprobs: 0, or another endpoint or model",
        )  # fmt: skip
    return [
        [token.token, [[likely.token, likely.logprob] for likely in token.top_logprobs[:count]]]
        for token in logprobs.content
    ]
