"""A vLLM server that writes: it is given the student's weights before each round, and asked for completions.

The weights go into a new folder of their own each time, as vLLM may hold on to files of a folder that it read before
(vLLM issue 32718). The server is told to read it by `/collective_rpc`, which it has in its development mode
(VLLM_SERVER_DEV_MODE=1), and to forget what it computed with the old ones by `/reset_prefix_cache`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from kdscale.config.distill.on_policy import VllmConfig
from kdscale.distill.export import write_weights
from kdscale.distill.on_policy.writers import Asked
from kdscale.distill.parallel.zero3_loading import whole_parameters
from kdscale.errors import ConfigError, Interrupted, ServiceError
from kdscale.files import atomic_dir, explain_os_errors, remove_tree
from kdscale.models.generation.drawing import Drawing, Drawn
from kdscale.models.parameter_map import ParameterRange, trained_tensors
from kdscale.responses.asking import Question, RequestPolicy, ask_all
from kdscale.responses.client import NotNowError
from kdscale.responses.journal import Usage
from kdscale.runtime.http_status import without_key, wrong_setting
from kdscale.runtime.progress import Reporter
from kdscale.runtime.ranks import on_main
from kdscale.teacher.services import make_client, post_limited
from kdscale.weights import Checkpoint, copy_sidecars

SECTION = "distill.on_policy.vllm.endpoint"
_MOST_ANSWER_BYTES = 64 << 20
_OWN_FOLDER = re.compile(r"weights-[0-9]{19}")
_BATCHES = 4  # of `concurrency` prompts, between two looks at whether the run shall stop


class _Logprobs(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    token_logprobs: list[float | None]


class _Choice(BaseModel):
    model_config = ConfigDict(strict=True)
    token_ids: list[int] = Field(min_length=1)
    logprobs: _Logprobs
    finish_reason: str | None = None


class _Completion(BaseModel):
    model_config = ConfigDict(strict=True)
    choices: list[_Choice] = Field(min_length=1, max_length=1)


class VllmWriter:
    """Writes on a server; each rank asks for its own prompts, and rank 0 brings the weights."""

    whole_batches = False  # a server puts prompts together as it likes

    def __init__(
        self, settings: VllmConfig, student: nn.Module, folder: Path, weights: Path, drawing: Drawing,
        tied: Mapping[str, str], max_shard_bytes: int,
    ):  # fmt: skip
        """`student` is the model that is trained, of `folder`'s files; its weights go into folders in `weights`.

        `tied`: other names of a parameter.
        """
        self.at_once = settings.concurrency * _BATCHES
        self._settings, self._student, self._folder, self._weights = settings, student, folder, weights
        self._drawing, self._tied, self._max_shard_bytes = drawing, tied, max_shard_bytes
        self._policy = RequestPolicy(
            section=SECTION, endpoint=settings.endpoint, concurrency=settings.concurrency, retries=settings.retries,
            max_answer_bytes=_MOST_ANSWER_BYTES,
        )  # fmt: skip

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Bring the student's weights to the server. Raises ConfigError or ServiceError on all ranks."""
        with whole_parameters(self._student) as parameters:
            on_main(lambda: self._push(parameters))
        yield

    def write(self, asked: Sequence[Asked]) -> list[Drawn | None]:
        """What the server goes on with after each prompt."""
        answers = _Collected()
        questions = (self._question(number, one) for number, one in enumerate(asked))
        try:
            with Reporter(quiet=True).bar("generate", len(asked), "prompt") as bar:
                ask_all(questions, answers, self._policy, bar)
        except Interrupted as stop:  # the training watches signals too, and all ranks stop together
            os.kill(os.getpid(), stop.signal_number)
        return [answers.found.get(str(number)) for number in range(len(asked))]

    def close(self) -> None:
        """Keep the last weights, which the server may read again when it is started anew."""

    def _question(self, number: int, one: Asked) -> Question:
        drawing = self._drawing
        body = {
            "model": self._settings.endpoint.model, "prompt": one.ids, "max_tokens": drawing.new_tokens,
            "temperature": drawing.temperature, "top_p": drawing.top_p, "seed": one.number >> 32, "logprobs": 0,
            "return_token_ids": True, "stop_token_ids": list(drawing.end_ids), "skip_special_tokens": False,
        }  # fmt: skip
        return Question(str(number), "completions", body, self._read, about=f"prompt {number}")

    def _read(self, tree: dict[str, Any]) -> dict[str, Any]:
        """Raises NotNowError for what is no completion, ServiceError for one without the ids of its tokens."""
        choices = tree.get("choices")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict) and "token_ids" not in choices[0]:
            raise ServiceError(
                f"{SECTION}: an answer of the server", expected="token_ids, as vLLM gives them (return_token_ids)",
                got=", ".join(sorted(map(str, choices[0])))[:200], hint="use vLLM 0.10.2 or newer",
            )  # fmt: skip
        try:
            choice = _Completion.model_validate(tree).choices[0]
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ".".join(map(str, problem["loc"]))
            raise NotNowError(f"what it sent is no completion: {where}: {problem['msg']}") from error
        ids, logprobs = choice.token_ids, choice.logprobs.token_logprobs
        if len(logprobs) != len(ids) or None in logprobs:
            raise NotNowError(f"{len(ids)} tokens with {len(logprobs)} log-probabilities")
        if wrong := [token for token in ids if not 0 <= token < self._drawing.vocab_size]:
            raise ServiceError(
                f"{SECTION}: an answer of the server", expected=f"token ids below {self._drawing.vocab_size}",
                got=str(wrong[0]), hint="serve the student's own folder",
            )  # fmt: skip
        end = next((i + 1 for i, token in enumerate(ids) if token in self._drawing.end_ids), len(ids))
        ended = ids[end - 1] in self._drawing.end_ids
        return {"drawn": Drawn(ids[:end], [float(value or 0.0) for value in logprobs[:end]], [], ended)}

    def _push(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Write the weights as a model's folder, have the server read it, and remove the one before."""
        source = Checkpoint.open(self._folder)
        shapes = {name: tuple(value.shape) for name, value in parameters.items()}
        trained = trained_tensors(source, shapes, self._tied)
        folder = self._weights / f"weights-{time.time_ns()}"

        def fill(span: ParameterRange, out: torch.Tensor) -> None:
            out.copy_(parameters[span.name].reshape(-1).narrow(0, span.offset, span.length))

        with explain_os_errors(self._weights):
            self._weights.mkdir(parents=True, exist_ok=True)
            with atomic_dir(folder) as tmp:
                shutil.copyfile(self._folder / "config.json", tmp / "config.json")
                copy_sidecars(self._folder, tmp)
                write_weights(source, trained, fill, tmp, self._max_shard_bytes)
        read = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}}
        self._tell("collective_rpc", read)
        self._tell("reset_prefix_cache", {})
        for other in self._weights.iterdir():
            if other != folder and _OWN_FOLDER.fullmatch(other.name):
                remove_tree(other)

    def _tell(self, path: str, body: dict[str, Any]) -> None:
        """Post to the server itself, beside its /v1. Raises ConfigError or ServiceError when it does not do it."""
        import httpx

        endpoint = self._settings.endpoint
        key, root = endpoint.key(SECTION), endpoint.base_url.rstrip("/").removesuffix("/v1")
        hint = "start it with VLLM_SERVER_DEV_MODE=1, on a machine that sees the folder of the weights"
        try:
            with make_client(root, key, endpoint.timeout, through_proxy=not endpoint.on_this_machine) as client:
                answer = post_limited(client, f"/{path}", json.dumps(body).encode(), _MOST_ANSWER_BYTES)
        except httpx.HTTPError as error:
            raise ServiceError(
                f"{SECTION}: {path}", expected=f"an answer from {root}", got=f"{type(error).__name__}: {error}",
                hint="start the server, and run the same command again",
            ) from error  # fmt: skip
        if answer.is_success:
            return
        words = without_key(answer.text, key)[:500]
        if answer.status_code == 404:
            raise ConfigError(SECTION, expected=f"a vLLM server with /{path}", got="404", hint=hint)
        wrong = wrong_setting(SECTION, answer.status_code, words, answer.headers.get("location"))
        raise wrong or ServiceError(f"{SECTION}: {path} ({answer.status_code})", got=words, hint=hint)


class _Collected:
    """Answers in memory, by the number of the prompt; kdscale.responses.asking.Answers."""

    def __init__(self) -> None:
        self.usage, self.found = Usage(), dict[str, Drawn]()

    def __contains__(self, key: object) -> bool:
        return key in self.found

    def append(self, key: str, **content: Any) -> None:
        """Keep one."""
        self.found[key] = content["drawn"]
