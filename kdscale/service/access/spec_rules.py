"""What a run's config may say: fields that name code, files, servers or places to write are for admins outside limits.

Every field of the config that can hold any text is in RULES or in PLAIN; one that is in neither is refused, and a test
fails. Runs are configs within configs (steps, corrections, trainings on a grid): those are checked as they will run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from kdscale.config.data import RESPONSES_SOURCE
from kdscale.config.distill.targets import TEACHER_TOKEN
from kdscale.config.load import build_config
from kdscale.config.root import Config
from kdscale.service.access.identity import Actor
from kdscale.service.access.places import (
    Wrong,
    wrong_address,
    wrong_hub_name,
    wrong_key,
    wrong_to_read,
    wrong_to_write,
)
from kdscale.service.problems import Problem, clean
from kdscale.service.settings import ServiceSettings

Rule = Callable[[Any, BaseModel, ServiceSettings], Wrong]  # of the value, its section, the service's settings
_ADMIN = "a token with the scope admin"


def _read(text: str, _: BaseModel, settings: ServiceSettings, *, hub: bool = False) -> Wrong:
    if text.startswith("builtin:") or text == RESPONSES_SOURCE:
        return None
    if hub and text.startswith("hf:"):
        return wrong_hub_name(text.removeprefix("hf:"))
    return wrong_to_read(text, settings)


def _written(text: str, _: BaseModel, settings: ServiceSettings) -> Wrong:
    return wrong_to_write(text, settings)


def _task(text: str, _: BaseModel, settings: ServiceSettings) -> Wrong:
    plain = text.isascii() and text.replace("-", "_").isidentifier() and not Path(text).is_dir()
    return None if plain or text.partition(":")[0] == "builtin" else wrong_to_read(text, settings)


def _address(text: str, _: BaseModel, settings: ServiceSettings) -> Wrong:
    return None if text == "" else wrong_address(text, settings)


def _key_variable(text: str, section: BaseModel, settings: ServiceSettings) -> Wrong:
    return wrong_key(text, getattr(section, "base_url", ""), settings)


def _below_address(text: str, _: BaseModel, __: ServiceSettings) -> Wrong:
    odd = text.startswith("/") or ".." in text or "//" in text
    return ("a path below base_url, without .. and //", "give the path alone") if odd else None


def _run_dir(text: str, _: BaseModel, settings: ServiceSettings) -> Wrong:
    """The service chooses the run folder; what a config says of it is replaced, and must be harmless until then."""
    if text.startswith(f"{settings.runs}/") and ".." not in text:
        return None
    harmless = not text.startswith(("/", "~")) and ".." not in text
    return None if harmless else ("a name, which the service replaces by a folder of its own", "leave it as it was")


def _admins_alone(value: Any, _: BaseModel, __: ServiceSettings) -> Wrong:
    return (_ADMIN, "leave it out") if value else None


_MODEL = _DATA = partial(_read, hub=True)
RULES: Mapping[str, Rule] = {
    "Config.run_dir": _run_dir,
    # the code of a checkpoint would run here
    "TeacherConfig.trust_remote_code": _admins_alone,
    "TeacherConfig.path": _MODEL,
    "TeacherConfig.adapters": _read,
    "TeacherEntry.path": _MODEL,
    "StudentConfig.path": _MODEL,
    "SourceConfig.path": _DATA,
    "DataConfig.chat_template": _read,
    "PromptSourceConfig.path": _read,
    "PairSourceConfig.path": _read,
    "PairsConfig.path": _read,
    "CrowsPairsConfig.path": _read,
    "StereoSetConfig.path": _read,
    "BbqConfig.path": _read,
    "WinogenderConfig.path": _read,
    "ScorerConfig.words": _read,
    "ScorerConfig.path": _below_address,
    "RewardConfig.path": _below_address,
    "DownstreamConfig.tasks": _task,
    "SearchConfig.tasks": _task,
    "ServedConfig.urls": _address,
    "ServedConfig.token_file": _read,
    "EndpointConfig.base_url": _address,
    "EndpointConfig.key_variable": _key_variable,
    "TargetsConfig.path": _written,
    "VllmConfig.weights": _written,
    "ZeroConfig.nvme_path": _written,
    "MlflowConfig.uri": _address,
    # shows the run to whoever may see the space, with the service's own key
    "TrackioConfig.space": _admins_alone,
}

# Words that nobody opens, runs or connects to.
PLAIN = frozenset({
    "Config.name", "StepConfig.name", "TeacherConfig.revision", "TeacherEntry.revision", "TeacherEntry.name",
    "StudentConfig.revision", "SourceConfig.class_field",
    "TeacherEntry.tags", "SourceConfig.field", "SourceConfig.source_field", "SourceConfig.split", "SourceConfig.tag",
    "BlendConfig.weights", "PromptSourceConfig.field", "EndpointConfig.model", "EndpointConfig.allow_http",
    "ResponsesConfig.system", "OnPolicyConfig.system", "ResponsesConfig.request", "FilterConfig.name",
    "RefusalsConfig.patterns",
    "VoteConfig.pattern", "RewardConfig.score_field", "MeasureConfig.name", "MeasureConfig.label", "BiasConfig.fail_if",
    "ScorerConfig.text_field", "ScorerConfig.score_field", "EvalConfig.prompts", "CodecConfig.name", "FormConfig.name",
    "ObjectiveConfig.name", "TokenDivergenceConfig.divergence", "SourceSettings.teacher_placement",
    "TargetsConfig.teacher_placement", "DistillConfig.gradient_checkpointing", "ZeroConfig.extra", "SearchConfig.score",
    "PruneConfig.target_params", "PruneConfig.target_bytes", "PruneConfig.target_kv_bytes", "PruneConfig.target_decode",
    "PruneConfig.target_prefill", "PruneConfig.ffn_method", "PruneConfig.head_method", "PruneConfig.hidden_method",
    "PruneConfig.layer_method", "PruneConfig.ssm_method", "LoraConfig.targets", "WandbConfig.project",
    "WandbConfig.entity", "WandbConfig.tags",
    "MlflowConfig.experiment", "TrackioConfig.project",
    # parts of configs that are made of them, and checked as such
    "StepConfig.prune", "StepConfig.distill", "ShortTraining.distill",
})  # fmt: skip


def refused_fields(config: Mapping[str, Any] | Config, actor: Actor, settings: ServiceSettings) -> list[Problem]:
    """What this actor may not say in a config, one problem for each field; nothing for admins.

    Raises ConfigError for what is no config.
    """
    if actor.is_admin:
        return []
    whole = config if isinstance(config, Config) else build_config(dict(config), "the config")
    found: dict[tuple[str, str], Problem] = {}
    for prefix, inner in _configs(whole):
        token = f"{whole.run_dir}/{TEACHER_TOKEN}" if prefix else None  # what a training beside the run is given
        for field, value, rule, section in _ruled(inner, ""):
            if value == token or (field, str(value)) in found:
                continue
            if (wrong := rule(value, section, settings)) is not None:
                found[field, str(value)] = Problem(
                    403, "scope", "this token may not set this", field=f"{prefix}{field}", expected=wrong[0],
                    got=clean(str(value))[:200], hint=wrong[1],
                )  # fmt: skip
    return list(found.values())


def _configs(config: Config) -> Iterator[tuple[str, Config]]:
    """The config and those that are made of it, each with what goes before its fields in messages."""
    yield "", config
    for index, step in enumerate(config.steps):
        for prefix, inner in _configs(config.step(index)):
            yield f"steps ({step.name}): {prefix}", inner
    if (correction := config.correction()) is not None:
        yield "correct: ", correction
    for form in config.quantize.trained if config.quantize is not None else ():
        yield f"quantize.forms ({form.label}): ", config.training_on_grid(form)


def _ruled(section: BaseModel, prefix: str) -> Iterator[tuple[str, Any, Rule, BaseModel]]:
    """Every value below a section that a rule is for: its dotted field, the value, the rule, its section."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        rule = rule_of(type(section), name)
        for index, item in _items(value):
            where = f"{prefix}{name}" if index is None else f"{prefix}{name}.{index}"
            if isinstance(item, BaseModel):
                yield from _ruled(item, f"{where}.")
            elif rule is not None and item is not None:
                yield where, item, rule, section
        if rule is None and holds_any_text(field.annotation) and not _is_plain(type(section), name):
            yield f"{prefix}{name}", value, _admins_alone, section


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, tuple | list):
        return list(enumerate(value))
    return list(value.items()) if isinstance(value, dict) else [(None, value)]


def rule_of(model: type[BaseModel], name: str) -> Rule | None:
    """The rule for a field of a section, which may be one of a class it derives from."""
    return next((RULES[key] for key in _keys(model, name) if key in RULES), None)


def _is_plain(model: type[BaseModel], name: str) -> bool:
    return any(key in PLAIN for key in _keys(model, name))


def _keys(model: type[BaseModel], name: str) -> list[str]:
    return [f"{base.__name__}.{name}" for base in model.__mro__]


def holds_any_text(annotation: Any) -> bool:
    """Whether a field of this type may hold a text of any content: a path, an address, a command."""
    if annotation in (str, Any, object):
        return True
    if get_origin(annotation) is Literal:
        return False
    return any(holds_any_text(inner) for inner in get_args(annotation))
