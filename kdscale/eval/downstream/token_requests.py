"""Tasks as tokens: for models that nobody holds whole, such as the masked candidates of a search.

The harness asks a model that has no weights; its requests are noted as tokens. Whoever computes the log-likelihoods of
the answers gives them back, and the harness makes scores of them: prompts, tokens and metrics are those of `score`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kdscale.errors import ConfigError
from kdscale.eval.downstream.harness import PreparedTask, TaskScores, has_choices, score_task
from kdscale.eval.downstream.language_model import LanguageModel
from kdscale.eval.downstream.library import quiet

Tokens = tuple[int, ...]


def require_choices(tasks: Sequence[PreparedTask], field: str) -> None:
    """Raises ConfigError for tasks whose items are not choices between given answers."""
    if wrong := [task.name for task in tasks if not all(has_choices(part.task) for part in task.parts)]:
        raise ConfigError(field, expected="tasks with given answers to choose from", got=", ".join(wrong))


class TokenRequests:
    """What prepared tasks ask: `texts` to read, and `answers`, each with the text at whose end its tokens stand.

    The last token of an answer is scored but not read: a text ends with the one before it. `tasks` are as
    `require_choices` wants them; `model` is only asked how long a text it reads, and may be on the meta device.
    """

    def __init__(self, model: Any, tokenizer: Any, tasks: Sequence[PreparedTask]):
        self._tasks = list(tasks)
        with quiet():
            self._asked = _Asked(model, tokenizer, batch_size=1)
            for task in self._tasks:
                score_task(task, self._asked)
        inputs = self._asked.inputs(self._asked.requests)
        self.texts: list[Tokens] = list(inputs)
        text_of = {number: text for text, numbers in enumerate(inputs.values()) for number in numbers}
        self.answers: list[tuple[int, Tokens]] = [
            (text_of[number], tuple(continuation)) for number, (_, _, continuation) in enumerate(self._asked.requests)
        ]

    def judge(self, values: Sequence[float] | np.ndarray) -> dict[str, TaskScores]:
        """What a model scores that gives the answers these log-likelihoods, in nats."""
        with quiet():
            self._asked.values = iter(np.asarray(values, dtype=np.float64).tolist())
            return {task.name: score_task(task, self._asked) for task in self._tasks}


class _Asked(LanguageModel):
    """Notes what it is asked, or answers with `values`: the harness asks the same again in the same order."""

    requests: list[Any]
    values: Any = None

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self.values is not None:
            return [(next(self.values), False) for _ in requests]
        self.requests = [*getattr(self, "requests", []), *requests]
        return [(0.0, False)] * len(requests)
