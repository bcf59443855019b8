"""Tasks as questions to masked candidates (`prune.search.score: task`): what ties pruning and evaluation together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdscale.config.root import Config

if TYPE_CHECKING:
    from kdscale.eval.downstream.harness import PreparedTask
    from kdscale.prune.search.questions import QuestionBatch, Questions

FIELD = "prune.search.tasks"
Tokens = tuple[int, ...]


def task_files(config: Config) -> dict[str, str]:
    """The digests of the files of local tasks, by the names of the files."""
    from kdscale.eval.downstream.local_tasks import local_files
    from kdscale.runs.digests import digest_file

    return {name: digest_file(file) for name, file in local_files(config.prune.search.tasks).items()}


def prepared_tasks(config: Config) -> list[PreparedTask]:
    """The tasks with the items that candidates are asked.

    Raises ConfigError without the library and for a task without answers to choose from, and what reading tasks raises.
    """
    from kdscale.eval.downstream.harness import ScoreSettings, prepare
    from kdscale.eval.downstream.token_requests import require_choices

    search = config.prune.search
    tasks = prepare(search.tasks, ScoreSettings(limit=search.task_items, seed=config.seed, field=FIELD))
    require_choices(tasks, FIELD)
    return tasks


def questions(config: Config, teacher: Path) -> Questions:
    """The questions to candidates that are cut from `teacher`, in its tokens."""
    import torch

    from kdscale.eval.downstream.token_requests import TokenRequests
    from kdscale.models.loading import load_tokenizer, model_on_meta
    from kdscale.prune.search.questions import Questions

    code = config.teacher.trust_remote_code
    model = model_on_meta(teacher, dtype=torch.float32, trust_remote_code=code)
    asked = TokenRequests(model, load_tokenizer(teacher, trust_remote_code=code), prepared_tasks(config))
    row = config.importance.seq_len * config.importance.micro_batch
    return Questions(question_batches(asked.texts, asked.answers, row), len(asked.answers), asked.judge)


def question_batches(
    texts: Sequence[Tokens], answers: Sequence[tuple[int, Tokens]], tokens: int
) -> list[QuestionBatch]:
    """Texts in their order, up to `tokens` of them in a row, with the places where the answers' tokens are scored."""
    import torch

    from kdscale.prune.search.questions import QuestionBatch

    of_text: list[list[int]] = [[] for _ in texts]
    for number, (text, _) in enumerate(answers):
        of_text[text].append(number)
    batches: list[QuestionBatch] = []
    first = 0
    while first < len(texts):
        ids: list[int] = []
        positions: list[int] = []
        scored: list[tuple[int, int, int]] = []
        end = first
        while end < len(texts) and (end == first or len(ids) + len(texts[end]) <= tokens):
            ids += texts[end]
            positions += range(len(texts[end]))
            for number in of_text[end]:
                answer = answers[number][1]
                places = range(len(ids) - len(answer), len(ids))
                scored += [(place, token, number) for place, token in zip(places, answer, strict=True)]
            end += 1
        places_N, labels_N, answers_N = torch.tensor(scored).T
        batches.append(QuestionBatch(torch.tensor([ids]), torch.tensor([positions]), places_N, labels_N, answers_N))
        first = end
    return batches
