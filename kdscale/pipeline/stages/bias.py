"""The bias stage: bias and safety of teacher, pruned, distilled and quantised student on the same items."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdscale.config.evaluation.bias import BiasConfig, MeasureConfig, RefusalsConfig, ToxicityConfig
from kdscale.config.root import Config
from kdscale.errors import GateError, KdscaleError, raise_together
from kdscale.files import atomic_dir, sha256_file
from kdscale.pipeline.spawn import join_ranks, ranks_of, run_on_ranks
from kdscale.pipeline.stage import Facts, StageContext
from kdscale.runs.bias_results import grown_too_much, read_bias, results_of_run, unseen_limits
from kdscale.runs.digests import digest_tree
from kdscale.runs.folder import BIAS, RunFolder
from kdscale.runs.models import model_title, models_of_run

if TYPE_CHECKING:
    from kdscale.eval.bias.measuring import Task


def what_matters(context: StageContext) -> Facts:
    """The settings that the figures depend on, and the files of items."""
    settings = _settings(context.config)
    facts: dict[str, Any] = {
        "bias": settings.decisive(),
        "items": {entry.key: _files(entry) for entry in settings.measures},
    }
    if _asks_chats(settings):
        template = context.config.data.chat_template
        own = digest_tree(context.teacher, ("chat_template*",))
        facts["chat_template"] = own if template is None else digest_tree(Path(template).expanduser())
    return facts


def check_before(config: Config, run: RunFolder) -> None:
    """Raises, all at once, what is wrong with the items, the scorers and the gate.

    That is DataError for a file that cannot be read, ConfigError for a scorer without key or library and for a teacher
    without the chat template that a measure needs.
    """
    del run
    from kdscale.eval.bias.measures import MEASURES, check_gate
    from kdscale.eval.bias.scoring import check_scorer

    settings = _settings(config)
    problems: list[KdscaleError] = []

    def attempt(check: Callable[[], Any]) -> None:
        try:
            check()
        except KdscaleError as error:
            problems.append(error)

    attempt(lambda: check_gate(settings.fail_if, settings.measures))
    for entry in settings.measures:
        attempt(lambda entry=entry: MEASURES[entry.name].read(entry))  # type: ignore[misc]
        if isinstance(entry, ToxicityConfig):
            attempt(lambda entry=entry: check_scorer(entry))  # type: ignore[misc]
    attempt(lambda: _check_templates(config))
    raise_together(problems)


def _check_templates(config: Config) -> None:
    """Raises ConfigError where refusals are to be measured of a teacher without a chat template."""
    if not _asks_chats(settings := _settings(config)):
        return
    from kdscale.eval.bias.asking import check_template
    from kdscale.weights import resolve_teacher

    try:
        teacher = resolve_teacher(config.teacher)
    except KdscaleError:
        return  # the check of the teacher says so
    tokenizer = _tokenizer(config, teacher)
    for entry in settings.measures:
        check_template(entry, tokenizer)


def measure_bias(context: StageContext) -> Facts:
    """Ask all models on as many processes as the config asks for, and write the figures; returns the verdicts."""
    from kdscale.eval.bias.measuring import summarise_all
    from kdscale.eval.bias.scoring import try_out

    settings = _settings(context.config)
    task = _task(context)
    _check_templates(context.config)  # of a finished stage that is done again, nothing was checked before
    for entry in settings.measures:
        if isinstance(entry, ToxicityConfig):
            try_out(entry, task.work / "scores", context.reporter)
    run_on_ranks("bias", bias_rank, context, ranks_of(context.config, "bias.processes"))
    models = models_of_run(context.run, context.config, context.teacher)
    with atomic_dir(context.run.at(BIAS)) as tmp:
        summarise_all(list(models), task, context.reporter, tmp)
    results = read_bias(context.run.at(BIAS))
    assert results is not None
    for key, measure in results.measures.items():
        for name in results_of_run(results.models):
            context.reporter.say(f"  {key}, {model_title(name).lower()}: {measure.verdicts[name]}")
        if measure.note:
            context.reporter.say(f"  note: {key}: {measure.note}")
    for sentence in unseen_limits(results, settings.fail_if):
        context.reporter.say(f"  note: {sentence}")
    return {key: measure.verdict_of(results_of_run(results.models)[0]) for key, measure in results.measures.items()}


def bias_rank(context: StageContext) -> None:
    """Ask all models this rank's share; the first rank keeps the answers of all."""
    from kdscale.eval.bias.measuring import ask_models

    device = join_ranks(context)
    models = models_of_run(context.run, context.config, context.teacher)
    ask_models(
        models, _task(context), _tokenizer(context.config, context.teacher), context.reporter, device=device,
        trust_remote_code=context.config.teacher.trust_remote_code,
    )  # fmt: skip


def gate(config: Config, run: RunFolder) -> None:
    """Raises GateError when what the run hands on has grown more than bias.fail_if allows.

    Raises ConfigError for a limit on what is no figure.
    """
    settings = _settings(config)
    results = read_bias(run.at(BIAS)) if settings.fail_if else None
    if results is None:
        return
    from kdscale.eval.bias.measures import check_gate

    check_gate(settings.fail_if, settings.measures)  # fail_if may change after check_before
    if found := grown_too_much(results, settings.fail_if):
        raise GateError(
            "bias.fail_if: bias grew more than it may", expected="no more growth than the config allows",
            got="; ".join(map(str, found)), hint=f"everything is measured and written ({run.at(BIAS)})",
        )  # fmt: skip


def _task(context: StageContext) -> Task:
    from kdscale.eval.bias.measuring import Task

    return Task.read(_settings(context.config), context.config.seed, context.run.work / "bias")


def _tokenizer(config: Config, teacher: Path) -> Any:
    """The teacher's tokenizer, with the chat template of the config where it names one."""
    from kdscale.data.readers.chat import ChatTemplate, chat_template
    from kdscale.models.loading import load_tokenizer

    tokenizer: Any = load_tokenizer(teacher, config.teacher.trust_remote_code)
    if _asks_chats(_settings(config)):
        template: ChatTemplate = chat_template(config.data, tokenizer)
        tokenizer.chat_template = template.text
    return tokenizer


def _files(entry: MeasureConfig) -> dict[str, str]:
    """sha256 of each file that the items of a measure come from, by its path."""
    from kdscale.eval.bias.prompts import prompt_files
    from kdscale.eval.bias.readers import files_of
    from kdscale.eval.bias.scoring import words_digest

    section = f"bias.measures: {entry.key}"
    if isinstance(entry, ToxicityConfig):
        return {**prompt_files(entry.prompts, section), **words_digest(entry.scorer)}
    if isinstance(entry, RefusalsConfig):
        return prompt_files([*entry.harmful, *entry.harmless], section)
    return {file.name: sha256_file(file) for file in files_of(entry.path)}  # type: ignore[attr-defined]


def _asks_chats(settings: BiasConfig) -> bool:
    return any(isinstance(entry, RefusalsConfig) for entry in settings.measures)


def _settings(config: Config) -> BiasConfig:
    assert config.bias is not None, "a run without the section has no such stage"
    return config.bias
