"""MkDocs hook: fills in what the pages take from the code, so that it cannot fall behind.

On the pages of the config and of a service's settings each row `| `field` | meaning |` gets the field's default and the
values it allows. Elsewhere `<!-- generated: NAME -->` becomes the table NAME of `TABLES`. tests/unit/test_docs.py uses
the same functions.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
FIELD_ROW = re.compile(r"^\| (`[a-z_.]+`(?:, `[a-z_.]+`)*) \| (.*) \|$")
MARKER = re.compile(r"<!-- generated: ([a-z-]+) -->")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by MkDocs for every page: the page's text with defaults and tables filled in."""
    if page.file.src_uri in FIELDS_OF:
        markdown = with_defaults(markdown, FIELDS_OF[page.file.src_uri]())
    return MARKER.sub(lambda match: TABLES[match[1]](), markdown)


def config_fields() -> dict[str, FieldInfo]:
    """Every field of the config by its dotted name; fields of the sections in a list carry the list's name."""
    from kdscale.config.distill.objectives import OBJECTIVES
    from kdscale.config.evaluation.bias import MEASURES
    from kdscale.config.quantize import FORMS
    from kdscale.config.responses.filters import FILTERS
    from kdscale.config.root import Config
    from kdscale.config.target_store import CODECS

    fields = dict(_fields(Config, ""))
    tables = {
        "distill.objectives.": OBJECTIVES, "targets.codec.": CODECS, "responses.filters.": FILTERS,
        "quantize.forms.": FORMS, "bias.measures.": MEASURES,
    }  # fmt: skip
    for prefix, table in tables.items():
        for settings in table.values():
            fields |= _fields(settings, prefix)
    return fields


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if section is None or get_origin(field.annotation) is tuple:
            yield f"{prefix}{name}", field
        if section is not None:
            yield from _fields(section, f"{prefix}{name}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, alone, in a list or as `Section | None`; none where it may be a number too."""
    alternatives = get_args(annotation)
    if float in alternatives:
        return None
    for candidate in (annotation, *alternatives):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def documented_fields(markdown: str) -> list[str]:
    """The dotted names in the first column of the config page's tables."""
    rows = (FIELD_ROW.match(line) for line in markdown.splitlines())
    return [name for row in rows if row for name in re.findall(r"`([a-z_.]+)`", row[1])]


def service_fields() -> dict[str, FieldInfo]:
    """Every setting of a service by its dotted name."""
    from kdscale.service.settings import ServiceSettings

    return {name: field for name, field in _fields(ServiceSettings, "") if name != "home"}


FIELDS_OF: dict[str, Callable[[], dict[str, FieldInfo]]] = {
    "reference/config.md": config_fields,
    "reference/service-settings.md": service_fields,
}


def with_defaults(markdown: str, known: dict[str, FieldInfo]) -> str:
    """A page of fields with a column of defaults, and the allowed words after each meaning."""
    lines = []
    for line in markdown.splitlines():
        row = FIELD_ROW.match(line)
        if row:
            fields = [known[name] for name in re.findall(r"`([a-z_.]+)`", row[1])]
            defaults = list(dict.fromkeys(_default(field) for field in fields))
            allowed = list(dict.fromkeys(word for field in fields for word in _words(field.annotation)))
            tail = f" One of {', '.join(f'`{word}`' for word in allowed)}." if allowed else ""
            lines.append(f"| {row[1]} | {', '.join(defaults)} | {row[2]}{tail} |")
        else:
            lines.append(
                {"| field | meaning |": "| field | default | meaning |", "|---|---|": "|---|---|---|"}.get(line, line)
            )
    return "\n".join(lines)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return _plain(field.get_default(call_default_factory=True))


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, int):
        return f"{value:,}" if value >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return f"{len(value)} texts" if len(str(value)) > 99 else f"[{', '.join(_plain(item) for item in value)}]"
    # a section in a list is shown by the field that tells it from others
    return getattr(value, "path", None) or getattr(value, "name", None) or str(value)


def _words(annotation: Any) -> Iterable[str]:
    """The words of every Literal in an annotation."""
    if get_origin(annotation) is Literal:
        return [word for word in get_args(annotation) if isinstance(word, str)]
    return [word for inner in get_args(annotation) if inner is not None for word in _words(inner)]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def commands() -> str:
    """Every command of `kdscale`: what it does, its arguments and its options."""
    return "\n\n".join(_command(name, command) for name, command in command_objects().items())


def command_objects() -> dict[str, Any]:
    """Every command of `kdscale` by name, as typer builds it."""
    from kdscale.cli.main import make_app

    group: Any = typer.main.get_command(make_app())
    return dict(_commands(group))


def _commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The commands of a group, and those of the groups in it by both names: `token create`."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def _command(name: str, command: Any) -> str:
    arguments = [item for item in command.params if item.param_type_name == "argument"]
    usage = " ".join(_upper(item) if item.required else f"[{_upper(item)}]" for item in arguments)
    rows = [
        (_flags(item), (item.help or "").replace("|", "\\|") + _default_of_option(item))
        for item in command.params
        if item.name != "help"
    ]
    return "\n".join(
        [
            f"## kdscale {name}",
            "",
            f"    kdscale {name} {usage}",
            "",
            (command.help or "").strip(),
            "",
            table(("option", "meaning"), rows),
        ]
    )


def _flags(item: Any) -> str:
    if item.param_type_name == "argument":
        return f"`{_upper(item)}`"
    takes = "" if item.is_flag else f" {item.metavar or 'VALUE'}"
    return f"`{', '.join(item.opts)}{takes}`".replace("<", "").replace(">", "")


def _upper(argument: Any) -> str:
    return re.sub(r"[{}]", "", argument.metavar or argument.name).upper()


def _default_of_option(item: Any) -> str:
    if item.default is None or isinstance(item.default, bool) or "Default" in (item.help or ""):
        return ""
    # the interpreter differs from machine to machine
    shown = "the Python that runs kdscale" if item.default == sys.executable else f"`{item.default}`"
    return f" Default: {shown}."


def stages() -> str:
    """Every stage of a run, in order."""
    from kdscale.pipeline.stages.registry import STAGES

    def named(artifacts: Iterable[Any]) -> str:
        return ", ".join(f"`{artifact.path}`" for artifact in artifacts)

    rows = [(f"`{stage.name}`", stage.title, named(stage.reads), named(stage.writes)) for stage in STAGES.values()]
    return table(("stage", "what it does", "reads", "writes"), rows)


def exit_codes() -> str:
    """What the exit codes of the commands mean."""
    from kdscale import errors

    classes = sorted(_subclasses(errors.KdscaleError), key=lambda error: error.exit_code)
    rows = [
        (str(error.exit_code), (error.__doc__ or "").splitlines()[0], "yes" if error.worth_retrying else "no")
        for error in classes
    ]
    return table(("code", "meaning", "does `kdscale launch` try again?"), rows)


def _subclasses(cls: Any) -> list[Any]:
    return [found for child in cls.__subclasses__() for found in (child, *_subclasses(child))]


def gpus() -> str:
    """GPUs that `kdscale plan-cluster` knows by name."""
    entries = json.loads((ROOT / "kdscale" / "sizing" / "gpus.json").read_text(encoding="utf-8"))["gpus"]
    return table(("name", "GPU"), [(f"`{name}`", entry["name"]) for name, entry in entries.items()])


def zero_keys() -> str:
    """Keys of DeepSpeed's `zero_optimization` that `distill.zero.extra` takes."""
    from kdscale.config.distill.zero import PASSED_THROUGH

    return ", ".join(f"`{key}`" for key in PASSED_THROUGH)


def objectives() -> str:
    """Every objective that distill.objectives can name, with the figures that it adds to the log."""
    from kdscale.config.distill.objectives import OBJECTIVES

    rows = []
    for name, settings in OBJECTIVES.items():
        terms = [term for row in settings.terms for term in (row, row.exponential) if term]
        figures = ", ".join(f"`{term.name}`: {term.title}" for term in terms)
        rows.append((f"`{name}`", (settings.__doc__ or "").splitlines()[0], figures))
    return table(
        ("objective", "what is minimised", "figures in the log, means over labels (of `preference` over pairs)"), rows
    )


def filters() -> str:
    """Every filter that responses.filters can name."""
    from kdscale.config.responses.filters import FILTERS

    rows = [(f"`{name}`", (settings.__doc__ or "").splitlines()[0]) for name, settings in FILTERS.items()]
    return table(("filter", "what it drops"), rows)


def measures() -> str:
    """Every measure that bias.measures can name, with its figures; the first with an ideal has the verdict."""
    from kdscale.eval.bias.measures import MEASURES

    def figures(measure: Any) -> str:
        return "; ".join(
            f"`{one.name}`: {one.title}" + ("" if one.ideal is None else f" (ideal {one.ideal:g})")
            for one in measure.figures
        )

    rows = [(f"`{name}`", row.data, figures(row), row.paper) for name, row in MEASURES.items()]
    return table(("measure", "data", "figures", "paper"), rows)


def recompute() -> str:
    """What each value of distill.gradient_checkpointing keeps and does again, in bytes and FLOPs of an 8B student."""
    from kdscale.config.distill.recompute import RECOMPUTE
    from kdscale.families import load_family
    from kdscale.sizing.flops import ModelFlops, recomputed_flops
    from kdscale.sizing.job import Job
    from kdscale.sizing.memory import kept_bytes
    from kdscale.sizing.model_shape import ModelShape

    config = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128_256,
        "tie_word_embeddings": False,
    }  # fmt: skip
    shape, row = ModelShape.of(config, load_family(config, "docs")), [8192]
    job, step = Job(shape, shape, 8192, 1, 1), 3 * ModelFlops.of_shape(shape).of_a_token(row)
    rows = [
        (
            f"`{level.name}`", level.kept, level.again, f"{kept_bytes(job, shape, level) / 1000:.1f}",
            f"{recomputed_flops(shape, level, row) / step:.0%}",
        )
        for level in RECOMPUTE.values()
    ]  # fmt: skip
    return table(("value", "kept", "computed again", "kB a token and layer", "FLOPs done again"), rows)


def sources() -> str:
    """Every source of the teacher's targets, and the teacher placements that choose it."""
    from kdscale.config.distill.targets import ANY_NUMBER, SOURCES

    def top_k(number: int) -> str:
        return "any number" if number == ANY_NUMBER else f"up to {number}" if number else "none"

    rows = [
        (
            f"`{row.name}`",
            ", ".join(f"`{placement}`" for placement in row.placements),
            top_k(row.gives.top_k),
            "yes" if row.gives.sampled else "no",
            "yes" if row.gives.full else "no",
            "yes" if row.gives.hidden_layers else "no",
        )
        for row in SOURCES.values()
    ]
    columns = ("source", "`distill.teacher_placement`", "top K", "sampled tokens", "whole vocabulary", "layers")
    return table(columns, rows)


def codecs() -> str:
    """Every codec of a store of targets."""
    from kdscale.config.target_store import CODECS

    def needed(gives: Any) -> str:
        return "any `targets`, at any temperature" if gives.full else "`sampled`" if gives.sampled else "`topk`"

    rows = [
        (f"`{name}`", (row.__doc__ or "").splitlines()[0], needed(row(name=name).gives)) for name, row in CODECS.items()
    ]
    return table(("codec", "what is stored of a position", "`targets` of an objective that reads it"), rows)


def criteria() -> str:
    """Every importance criterion."""
    from kdscale.config.criteria import criteria_table

    return criteria_table().rstrip()


def divergences() -> str:
    """Every divergence between teacher and student."""
    from kdscale_kernels import DIVERGENCES

    rows = [
        (f"`{name}`", row.formula, f"{row.parameter}, default {row.default:g}" if row.parameter else "", row.source)
        for name, row in DIVERGENCES.items()
    ]
    return table(("name", "formula", "parameter", "source"), rows)


def free_settings() -> str:
    """Fields of `distill` that a run may change and go on."""
    from kdscale.config.distill.settings import FREE_SETTINGS

    return ", ".join(f"`{name}`" for name in sorted(FREE_SETTINGS))


def gguf() -> str:
    """The families that can be written as GGUF files, and what llama.cpp needs of them."""
    from kdscale.families import gguf_families, load_family

    def needs(table: Any) -> str:
        found = [f"`{rule.field}` {' or '.join(map(json.dumps, rule.one_of))}" for rule in table.requires]
        found += ["heads · head_dim = hidden"] if table.square_attention else []
        found += [f"no rotary embedding in every {table.no_rope_every}th layer"] if table.no_rope_every else []
        found += [f"no {', '.join(f'`{role}`' for role in table.unread)}"] if table.unread else []
        return "; ".join(found)

    tables_of = {name: load_family({"model_type": name}, "docs").data.gguf for name in gguf_families()}
    rows = [
        (f"`{name}`", f"`{of.architecture}`", ", ".join(("default", *of.rope_scaling)), needs(of))
        for name, of in tables_of.items()
        if of is not None
    ]
    return table(("family", "architecture in llama.cpp", "rope types", "needs"), rows)


def nested() -> str:
    """The models of several modalities whose language model can be pruned."""
    from kdscale.families import nested_data, nested_types

    rows = []
    for name in nested_types():
        data = nested_data({"model_type": name})
        assert data is not None
        own = next(iter(data.text_types.values()), data.text_type)
        inner = f"`{own}`" if data.text_types else f"as its config says; `{own}` where it does not"
        axes = "all but hidden" if data.hidden_fixed else "all"
        together = "; hidden and heads together" if any(rule.dim == "hidden" for rule in data.constraints) else ""
        rows.append((f"`{data.architectures[0]}`", f"`{data.name}`", inner, axes + together))
    return table(("model", "`model_type`", "family of the language model", "axes beside the family's own limits"), rows)


def readers() -> str:
    """Every format that text is read from."""
    from kdscale.config.data import READERS

    rows = []
    for name, reader in READERS.items():
        files = ", ".join(f"`{suffix}`" for suffix in reader.suffixes) or f"`{reader.scheme}…`"
        rows.append((name, files, reader.help))
    return table(("format", "files", "what is read"), rows)


def service_metrics() -> str:
    """What GET /metrics of the service has."""
    from kdscale.service.operations.metric_table import METRICS

    rows = [
        (f"`{name}`", row.kind, ", ".join(f"`{label}`" for label in row.labels), row.help)
        for name, row in METRICS.items()
    ]
    return table(("metric", "type", "labels", "what it says"), rows)


def api_routes() -> str:
    """Every request that the service's API answers."""
    from kdscale.service.api.description import describe, scopes_of
    from kdscale.service.app import ROUTERS

    scopes = scopes_of(ROUTERS)
    rows = []
    for path, operations in describe(ROUTERS)["paths"].items():
        for method, operation in operations.items():
            named = [one for one in operation.get("parameters", []) if one["in"] != "path"]
            parameters = ", ".join(f"`{one['name']}`" for one in named)
            rows.append(
                (f"`{method.upper()} {path}`", scopes.get((method, path), ""), operation["description"], parameters)
            )
    return table(("request", "scope", "what it does", "parameters and headers"), rows)


def api_bodies() -> str:
    """The members of each body that the API takes."""
    from kdscale.service.api.description import describe
    from kdscale.service.app import ROUTERS

    tree, lines = describe(ROUTERS), []
    for path, operations in tree["paths"].items():
        for operation in operations.values():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if body is None:
                continue
            name = body["schema"]["$ref"].rpartition("/")[2]
            members = tree["components"]["schemas"][name]["properties"]
            examples = {key: (member.get("examples") or [None])[0] for key, member in members.items()}
            shown = ", ".join(
                f"`{key}`" + ("" if value is None else f" (`{json.dumps(value)}`)") for key, value in examples.items()
            )
            lines.append((f"`POST {path}`", shown))
    return table(("request", "members of the body, with examples"), lines)


def api_problems() -> str:
    """The types of problems that errors of ours become."""
    from kdscale.service.problems import STATUSES

    rows = [
        (f"`urn:kdscale:problem:{name}`", str(status), (error.__doc__ or "").splitlines()[0])
        for error, (status, name) in STATUSES.items()
    ]
    return table(("type", "status", "when"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "readers": readers,
    "service-metrics": service_metrics,
    "api-routes": api_routes,
    "api-bodies": api_bodies,
    "api-problems": api_problems,
    "gguf": gguf,
    "nested": nested,
    "criteria": criteria,
    "objectives": objectives,
    "filters": filters,
    "measures": measures,
    "recompute": recompute,
    "sources": sources,
    "codecs": codecs,
    "commands": commands,
    "stages": stages,
    "divergences": divergences,
    "exit-codes": exit_codes,
    "free-settings": free_settings,
    "gpus": gpus,
    "zero-keys": zero_keys,
}
