"""Tasks with right answers, scored by lm-evaluation-harness (extra `eval`): one score an item, for paired comparison.

`prepare` reads the tasks, draws the items and builds every request, before any model is loaded: what is wrong with a
task is known then, and all models get the same items with the same examples before them. `score` has one loaded model
answer them. The harness is imported by this folder alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from kdscale.errors import ConfigError, DataError, KdscaleError, raise_together
from kdscale.eval.downstream.library import explained, quiet, without_network
from kdscale.eval.downstream.local_tasks import LocalTask, builtin_names, is_local, read_task, task_files
from kdscale.eval.downstream.sets import SETS, HubTask
from kdscale.runtime.packages import require_packages
from kdscale.runtime.progress import Bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The metric of a task that has several, the first that it has: one that does not favour short answers.
METRICS = ("acc_norm", "acc", "exact_match")
FEWSHOT_SEED = 1234  # the harness's own, so that examples are those of published figures
FIELD = "eval.downstream.tasks"


@dataclass(frozen=True)
class ScoreSettings:
    """`limit`: items of each task, drawn by `seed`; None: all. `num_fewshot`: solved examples before each question;
    None: what the task says. `batch_size`: sequences that a model reads at once. `field`: of the config, that names
    the tasks; for messages."""

    limit: int | None = None
    batch_size: int = 8
    num_fewshot: int | None = None
    seed: int = 0
    field: str = FIELD


@dataclass(frozen=True)
class TaskScores:
    """What one model scored on each item of a task; arrays are fp64 [N] in the order of `ids`.

    `margins`: log-likelihood of the right answer less that of the best wrong one, in nats, or nats a character where
    the metric is normalised by length; None where the task has no choices. `chance`: what guessing scores.
    """

    task: str
    metric: str
    ids: tuple[str, ...]
    scores: np.ndarray
    margins: np.ndarray | None = None
    chance: float | None = None
    num_fewshot: int = 0
    available: int = 0  # items that the task has in all


@dataclass
class Part:
    """One task of the harness with the items to score and the requests that they make."""

    task: Any  # lm_eval's
    chosen: list[int]
    instances: list[Any]
    by_item: dict[int, list[Any]] = field(default_factory=dict)


@dataclass
class PreparedTask:
    """A row of the results: one task, or a group of tasks of the harness such as MMLU, whose items count alike."""

    name: str
    metric: str
    parts: list[Part]
    chance: float | None
    num_fewshot: int

    @property
    def requests(self) -> int:
        """How many questions a model is asked."""
        return sum(len(part.instances) for part in self.parts)


class _UnreachableError(DataError):
    """The hub does not answer, and the task's data are not in its cache."""

    def __init__(self, task: str, cause: Exception):
        super().__init__(f"the data of {task} cannot be had", got=" ".join(str(cause).split())[:200])
        self.task = task


def check_library(field: str = FIELD) -> None:
    """Raises ConfigError when the harness is not installed."""
    require_packages(field.rpartition(".")[0], ("lm_eval", "datasets"), "eval", f"leave {field} out")


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] | Sequence[PreparedTask],
    settings: ScoreSettings | None = None,
    bar: Bar | None = None,
) -> dict[str, TaskScores]:
    """The scores of a loaded model on each task: names as `prepare` takes them, or what it returned.

    Ranks of a group share the requests, and each gets all scores: a collective call. `bar` counts requests.
    Raises what `prepare` raises, and DataError where a model's answers give no score.
    """
    settings = settings or ScoreSettings()
    ready = prepare([name for name in tasks if isinstance(name, str)], settings)
    ready += [task for task in tasks if isinstance(task, PreparedTask)]
    from kdscale.eval.downstream.language_model import LanguageModel

    with quiet():
        asked = LanguageModel(model, tokenizer, settings.batch_size, bar)
        return {task.name: score_task(task, asked) for task in ready}


def prepare(names: Sequence[str], settings: ScoreSettings) -> list[PreparedTask]:
    """Read tasks, draw their items and build the requests.

    A name is `builtin`, `builtin:NAME`, a file or folder of tasks, a set of SETS, or a task of the harness. Raises
    ConfigError without the harness, for an unknown name and for what is no task, and DataError for data that cannot be
    had and items without a right answer: everything that is wrong, at once.
    """
    check_library(settings.field)
    prepared: dict[str, PreparedTask] = {}
    problems: list[KdscaleError] = []
    unreachable: list[_UnreachableError] = []
    with quiet(), ExitStack() as rest:
        for make in _makers(names, problems):
            try:
                task = make(settings)
            except _UnreachableError as error:
                if not unreachable:  # what was fetched before is found without it
                    rest.enter_context(without_network())
                unreachable.append(error)
                continue
            except KdscaleError as error:
                problems.append(error)
                continue
            if task.name in prepared:
                problems.append(ConfigError(settings.field, expected="every task once", got=f"{task.name} twice"))
            prepared[task.name] = task
    if unreachable:
        tasks = ", ".join(error.task for error in unreachable)
        hint = "check the network, or fetch them once where there is one (they stay in the hub's cache)"
        problems.append(
            DataError(
                f"the hub cannot be reached for the data of {tasks}", got=unreachable[0].got,
                hint=f"{hint}; builtin tasks need none",
            )
        )  # fmt: skip
    raise_together(problems)
    return list(prepared.values())


def _makers(names: Sequence[str], problems: list[KdscaleError]) -> Iterator[Any]:
    """For each task that the names stand for, the function that prepares it."""
    for name in names:
        if is_local(name):
            try:
                yield from (partial(_prepare_file, file) for file in task_files(name))
            except KdscaleError as error:
                problems.append(error)
        else:
            yield from (partial(_prepare_hub_task, one) for one in SETS.get(name, (HubTask(name),)))


def _prepare_file(file: Any, settings: ScoreSettings) -> PreparedTask:
    local = read_task(file)
    return _prepared(local.name, [_build_local(local, file)], settings, HubTask(local.name))


def _build_local(local: LocalTask, file: Any) -> Any:
    """The harness's task of a file."""
    import datasets
    from lm_eval.api.registry import filter_registry, metric_registry
    from lm_eval.api.task import ConfigurableTask

    for entry in local.settings.get("metric_list") or []:
        if entry["metric"] not in metric_registry:
            raise ConfigError(f"{file}: metric_list", expected="a metric of the harness", got=repr(entry["metric"]))
    for entry in local.settings.get("filter_list") or []:
        for step in entry["filter"]:
            if step.get("function") not in filter_registry:
                raise ConfigError(f"{file}: filter_list", expected="a filter of the harness", got=repr(step))

    def splits(**unused: Any) -> Any:
        return datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in local.items.items()})

    with explained(f"{file}", ConfigError):
        return ConfigurableTask(config={**local.settings, "dataset_path": "json", "custom_dataset": splits})


def _prepare_hub_task(wanted: HubTask, settings: ScoreSettings) -> PreparedTask:
    manager = _manager()
    if wanted.name not in manager.all_tasks:
        raise _unknown(wanted.name, manager.all_tasks, settings.field)
    with explained(f"the task {wanted.name} cannot be loaded", DataError):
        try:
            tasks = list(manager.load([wanted.name])["tasks"].values())
        except ConnectionError as error:
            raise _UnreachableError(wanted.name, error) from error
    for task in tasks:
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(
                f"{settings.field}: {wanted.name} runs code that the model writes",
                hint="leave it out; kdscale has no place where such code can do no harm",
            )
    return _prepared(wanted.name, tasks, settings, wanted)


def _unknown(name: str, known: Sequence[str], field: str) -> ConfigError:
    import difflib

    own = [*SETS, "builtin", *(f"builtin:{one}" for one in builtin_names())]
    near = difflib.get_close_matches(name, [*own, *known], n=3)
    return ConfigError(
        f"{field}: {name[:100]!r} is no task",
        expected=f"{', '.join(own)}, a YAML file or a folder of them, or a task of lm-evaluation-harness",
        hint=f"did you mean {' or '.join(near)}?" if near else "lm-eval ls tasks lists the harness's",
    )


@cache
def _manager() -> Any:
    """The harness's own tasks; to find them takes it ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _prepared(name: str, tasks: Sequence[Any], settings: ScoreSettings, wanted: HubTask) -> PreparedTask:
    """The tasks of one row, with their items drawn and their requests built."""
    own = settings if settings.num_fewshot is not None else replace(settings, num_fewshot=wanted.shots)
    parts = [_part(task, own) for task in tasks]
    metrics = list(tasks[0].aggregation())
    metric = wanted.metric or next((one for one in METRICS if one in metrics), metrics[0])
    if not all(metric in task.aggregation() for task in tasks):
        raise ConfigError(f"the task {name} has no metric {metric}", got=", ".join(metrics))
    guesses = [guess for part in parts for guess in _guesses(part)]
    items = sum(len(part.chosen) for part in parts)
    chance = float(np.mean(guesses)) if len(guesses) == items and metric.startswith("acc") else None
    shots = int(tasks[0].get_config("num_fewshot") or 0)
    return PreparedTask(name, metric, parts, chance, shots)


def _part(task: Any, settings: ScoreSettings) -> Part:
    where = f"the task {task.task_name}"
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise ConfigError(where, expected="answers that are right or wrong", got="a perplexity, which eval measures")
    if settings.num_fewshot is not None and task.get_config("num_fewshot") != 0:  # 0 means never, to the harness
        task.set_config(key="num_fewshot", value=settings.num_fewshot)
    available = len(task.eval_docs)
    chosen = list(range(available))
    if settings.limit is not None and settings.limit < available:
        chosen = sorted(random.Random(f"{settings.seed} {task.task_name}").sample(chosen, settings.limit))
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    with explained(f"{where}: an item cannot be put as a question", DataError):
        # of each item the harness asks whether it is in a list
        task.build_all_requests(samples=chosen if len(chosen) < available else None)
        part = Part(task, chosen, list(task.instances))
        for instance in part.instances:
            part.by_item.setdefault(chosen[instance.doc_id], []).append(instance)
        faults = [fault for number in chosen if (fault := _fault(part, number))]
    if faults:
        more = f" and {len(faults) - 3:,} more" if len(faults) > 3 else ""
        raise DataError(f"{where}: items without a right answer", got="; ".join(faults[:3]) + more)
    return part


def _fault(part: Part, number: int) -> str | None:
    """What is wrong with an item; None when it has a right answer."""
    task, item = part.task, part.by_item[number]
    if any(len(request.args) > 1 and request.args[1] == "" for request in item):
        return f"item {number} has an empty answer"
    if not has_choices(task):
        return None
    choices = task.doc_to_choice(item[0].doc)
    right = _right_answers(task, item[0].doc)
    if len(choices) < 2:
        return f"item {number} has {len(choices)} choice"
    if not right or not all(0 <= answer < len(choices) for answer in right):
        return f"item {number} has {len(choices)} choices and the answer {_answer_of(task, item[0].doc)!r:.60}"
    return None


def has_choices(task: Any) -> bool:
    """Whether the items of a task of the harness are choices between given answers."""
    return task.OUTPUT_TYPE == "multiple_choice" and not callable(task.get_config("process_results"))


def _answer_of(task: Any, item: Any) -> Any:
    return task.doc_to_text(item) if task.multiple_input else task.doc_to_target(item)


def _right_answers(task: Any, item: Any) -> list[int]:
    """Numbers of the right choices, as the harness finds them; −1 for an answer that is none of them."""
    answer, choices = _answer_of(task, item), task.doc_to_choice(item)
    answers = answer if isinstance(answer, list) else [answer]
    return [one if isinstance(one, int) else choices.index(one) if one in choices else -1 for one in answers]


def _guesses(part: Part) -> Iterator[float]:
    """For each item, what a guess among its choices scores; nothing for a task without choices."""
    if has_choices(part.task):
        for item in part.by_item.values():
            choices = len(part.task.doc_to_choice(item[0].doc))
            yield len(set(_right_answers(part.task, item[0].doc))) / choices


def score_task(prepared: PreparedTask, model: Any) -> TaskScores:
    """One model's scores on the items of a task; `model` answers the harness's requests."""
    ids: list[str] = []
    scores: list[float] = []
    margins: list[float | None] = []
    for part in prepared.parts:
        _answer(part, model)
        task = part.task
        prefix = "" if len(prepared.parts) == 1 else f"{task.task_name}/"
        key = next(iter(part.instances[0].filtered_resps))
        for number in part.chosen:
            requests = sorted(part.by_item[number], key=lambda request: request.idx)
            results = task.process_results(requests[0].doc, [request.filtered_resps[key] for request in requests])
            ids.append(f"{prefix}{number}")
            scores.append(_as_score(results, prepared, ids[-1]))
            margins.append(_margin(task, requests, prepared.metric))
    whole = np.array(margins, dtype=np.float64) if all(margin is not None for margin in margins) else None
    return TaskScores(
        task=prepared.name, metric=prepared.metric, ids=tuple(ids), scores=np.array(scores, dtype=np.float64),
        margins=whole, chance=prepared.chance, num_fewshot=prepared.num_fewshot,
        available=sum(len(part.task.eval_docs) for part in prepared.parts),
    )  # fmt: skip


def _answer(part: Part, model: Any) -> None:
    """Have the model answer all requests of a task, as the harness's evaluator does."""
    kinds: dict[str, list[Any]] = {}
    for instance in part.instances:
        instance.resps, instance.filtered_resps = [], {}
        kinds.setdefault(instance.request_type, []).extend([instance] * (instance.repeats or 1))
    for kind, requests in kinds.items():
        for instance, answer in zip(requests, getattr(model, kind)(requests), strict=True):
            instance.resps.append(answer)
    part.task._instances = part.instances
    part.task.apply_filters()


def _as_score(results: Mapping[str, Any], prepared: PreparedTask, item: str) -> float:
    value = results.get(prepared.metric)
    if not isinstance(value, bool | int | float | np.number) or not np.isfinite(value):
        raise DataError(
            f"the task {prepared.name}, item {item}: {prepared.metric} is no score of a single item",
            expected="a finite number", got=f"{value!r:.80}",
        )  # fmt: skip
    return float(value)


def _margin(task: Any, requests: Sequence[Any], metric: str) -> float | None:
    """How much likelier the right choice is than the best wrong one; None where there are no such two."""
    if not has_choices(task):
        return None
    item = requests[0].doc
    choices, right = task.doc_to_choice(item), set(_right_answers(task, item))
    values = np.array([request.resps[0][0] for request in requests[: len(choices)]], dtype=np.float64)
    if metric == "acc_norm":
        values = values / [len(choice) for choice in choices]
    wrong = [value for number, value in enumerate(values) if number not in right]
    return max(values[sorted(right)]) - max(wrong) if wrong else None
