"""The stage responses: the teacher answers prompts; what filters leave becomes a source of text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdscale.config.data import RESPONSES_SOURCE
from kdscale.config.responses.settings import ResponsesConfig
from kdscale.config.root import Config
from kdscale.pipeline.spawn import join_ranks, own_rank, ranks_of, run_on_ranks
from kdscale.pipeline.stage import Facts, StageContext
from kdscale.runs.folder import KEPT_RESPONSES, RunFolder

if TYPE_CHECKING:
    from kdscale.responses.journal import Journal
    from kdscale.responses.prompts import Prompt, Prompts

_SECTION = "responses.endpoint"
_TEMPLATE_FILES = ("tokenizer*.json", "chat_template*")
_JOURNAL, _REWARDS = "journal", "rewards"  # folders in responses/


def what_matters(context: StageContext) -> Facts:
    """The settings that the answers depend on, the prompts' files, and the teacher where it is the run's own."""
    from kdscale.responses.prompts import Prompts
    from kdscale.runs.digests import digest_tree
    from kdscale.weights import checkpoint_identity

    settings = _settings(context.config)
    facts: dict[str, Any] = {"responses": settings.decisive(), "prompts": Prompts(settings).digests()}
    if settings.teacher == "local":
        facts |= {
            "teacher": {**checkpoint_identity(context.teacher), **digest_tree(context.teacher, _TEMPLATE_FILES)},
            "chat_template": context.config.data.chat_template,
            "seed": _seed(context.config),
        }
    return facts


def check_before(config: Config, run: RunFolder) -> None:
    """Raises DataError for what is no prompt, ConfigError when the endpoint's library or key is missing."""
    del run
    from kdscale.responses.prompts import Prompts

    settings = _settings(config)
    for _ in Prompts(settings):  # every line is read
        pass
    if settings.teacher == "endpoint":
        from kdscale.responses.client import check_library

        check_library(_SECTION)
        settings.endpoint.key(_SECTION)


def answer_prompts(context: StageContext) -> Facts:
    """Have every prompt answered that is not in the journal, and keep what the filters leave."""
    from kdscale.files import remove_leftovers
    from kdscale.responses.filters import Tools, make_filters
    from kdscale.responses.journal import Journal
    from kdscale.responses.keep import write_kept
    from kdscale.responses.limits import Budget
    from kdscale.responses.prompts import Prompts

    settings, folder = _settings(context.config), context.run.responses
    if all(source.path != RESPONSES_SOURCE for source in context.config.data.all_sources):
        context.reporter.say(
            f'  note: no source of the data reads the answers; that would be {{path: "{RESPONSES_SOURCE}"}}'
        )
    if settings.teacher == "endpoint":
        _ask_endpoint(context)
    else:
        run_on_ranks("responses", answer_rank, context, ranks_of(context.config, "responses.processes"))
    remove_leftovers(folder)
    journal = Journal(folder / _JOURNAL)
    tools = Tools(settings, _token_counter(context.teacher), folder / _REWARDS, context.reporter)
    names = [entry.name for entry in settings.filters]
    filters = list(zip(names, make_filters(settings.filters, tools), strict=True))
    summary = write_kept(Prompts(settings), key_function(context), journal, filters, context.run.at(KEPT_RESPONSES))
    return {**summary.facts(), "spent": Budget(settings.limits, journal.usage).in_words()}


def _ask_endpoint(context: StageContext) -> None:
    from kdscale.responses.asking import RequestPolicy, ask_all
    from kdscale.responses.chat import question_of
    from kdscale.responses.journal import Journal
    from kdscale.responses.prompts import Prompts

    settings = _settings(context.config)
    prompts, key = Prompts(settings), key_function(context)
    journal = Journal(context.run.responses / _JOURNAL, "answers", context.reporter.say)
    try:
        total, done = _count(prompts, key, journal)
        with context.reporter.bar("answer prompts", total, "prompt", done=done) as bar:
            questions = (question_of(prompt, settings) for prompt in prompts)
            ask_all(questions, journal, RequestPolicy.of(settings), bar)
    finally:
        journal.close()


def answer_rank(context: StageContext) -> None:
    """Answer this rank's share of the prompts with the run's own teacher."""
    from kdscale.models.loading import load_model
    from kdscale.responses.journal import Journal
    from kdscale.responses.local import LocalTeacher, answer_share
    from kdscale.responses.prompts import Prompts
    from kdscale.runtime.device import resolve_dtype

    settings, rank = _settings(context.config), own_rank(context)
    device, trust = join_ranks(context), context.config.teacher.trust_remote_code
    tokenizer = _tokenizer(context)
    prompts, key = Prompts(settings), _local_key(context, tokenizer)
    journal = Journal(context.run.responses / _JOURNAL, f"answers-{rank}", context.reporter.say)
    try:
        total, done = _count(prompts, key, journal)
        if done == total:
            return
        model = load_model(
            context.teacher, dtype=resolve_dtype(settings.dtype, device), device=device, trust_remote_code=trust
        )
        teacher = LocalTeacher(model, tokenizer, settings.sampling, _seed(context.config))
        # each rank shows its own part
        with context.reporter.bar("answer prompts", (total - done) / context.ranks, "prompt") as bar:
            pairs = ((key(prompt), prompt) for prompt in prompts)
            answer_share(teacher, pairs, journal, settings.micro_batch, bar, rank=rank, ranks=context.ranks)
    finally:
        journal.close()


def key_function(context: StageContext) -> Callable[[Prompt], str]:
    """The key under which the answers to a prompt are in the journal."""
    from kdscale.responses.chat import question_of

    settings = _settings(context.config)
    if settings.teacher == "endpoint":
        return lambda prompt: question_of(prompt, settings).key
    return _local_key(context, _tokenizer(context))


def _local_key(context: StageContext, tokenizer: Any) -> Callable[[Prompt], str]:
    from kdscale.responses.local import local_key

    return local_key(_settings(context.config), _seed(context.config), context.teacher, tokenizer.chat_template)


def _tokenizer(context: StageContext) -> Any:
    """The teacher's tokenizer, with the chat template of the config where it names one."""
    from kdscale.data.readers.chat import chat_template
    from kdscale.models.loading import load_tokenizer

    tokenizer: Any = load_tokenizer(context.teacher, context.config.teacher.trust_remote_code)
    tokenizer.chat_template = chat_template(context.config.data, tokenizer).text
    return tokenizer


def _count(prompts: Prompts, key: Callable[[Prompt], str], journal: Journal) -> tuple[int, int]:
    """How many different prompts there are, and how many of them are answered."""
    keys = {key(prompt) for prompt in prompts}
    return len(keys), sum(one in journal for one in keys)


def _token_counter(teacher: Path) -> Callable[[str], int]:
    """How many tokens the teacher's tokenizer makes of a text; it is read when it is first asked."""
    from functools import cache

    from kdscale.models.tokenizer.tokenizing import BatchEncoder

    @cache
    def encoder() -> BatchEncoder:
        return BatchEncoder((teacher / "tokenizer.json").read_bytes())

    return lambda text: len(encoder().encode([text])[0].ids)


def _seed(config: Config) -> int:
    sampling = _settings(config).sampling
    return config.seed if sampling.seed is None else sampling.seed


def _settings(config: Config) -> ResponsesConfig:
    assert config.responses is not None, "a run without the section has no such stage"
    return config.responses
