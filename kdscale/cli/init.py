"""`kdscale init`: asks what a run needs, or takes it from options, and writes a config that says no more than that."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdscale.errors import ConfigError, KdscaleError, raise_together

if TYPE_CHECKING:
    from kdscale.config.root import Config
    from kdscale.prune.plan import Plan

_DEFAULT_TARGET, _DEFAULT_TEXT = "50%", "builtin:classics"
_PLAIN = re.compile(r"[\w./~%:-]+")  # what YAML may take unquoted; parsing it decides


def init_command(
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model to make smaller: a folder, or hf:org/name.")
    ] = None,
    target_params: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Parameters to be left: 4B, or a share such as 50%.")
    ] = None,
    target_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Or at most this on disk: 8GiB, or a share such as 50%.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Text: a file, folder or glob, hf:NAME, or builtin:NAME. Repeatable."),
    ] = None,
    run_dir: Annotated[str | None, typer.Option(metavar="DIR", help="Where the run goes. Default: runs/NAME.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The config to write. Default: NAME.yaml, a name that is free.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file that --out names.")] = False,
) -> None:
    """Write a config: asks for the teacher, the size, the text and the run folder, or takes them from options.

    Every answer is checked as it comes. The config holds what was asked; every other field has its default.
    """
    if target_params and target_bytes:
        raise ConfigError("kdscale init", expected="--target-params or --target-bytes", got="both")
    if out is not None:
        _check_out(out, force)
    size = {"target_params": target_params, "target_bytes": target_bytes}
    given = {name: text for name, text in size.items() if text is not None}
    missing = [
        ("--teacher MODEL", teacher),
        ("--target-params SIZE or --target-bytes SIZE", given),
        ("--data PATH", data),
    ]
    unknown = [option for option, value in missing if not value]
    if unknown and not (sys.stdin is not None and sys.stdin.isatty()):
        expected = f"{', '.join(unknown)}, as there is no terminal to ask at"
        raise ConfigError("kdscale init", expected=expected, got="none of them" if len(unknown) > 1 else "not given")
    draft = _Draft()
    _check_together(draft, {"set_teacher": teacher, "set_target": given, "set_text": data, "set_run_dir": run_dir})
    _ask(draft.set_teacher, teacher, "Teacher, a folder or hf:org/name", _teacher_here())
    if given and draft.plan is None:  # the size was given, the teacher asked for
        draft.set_target(given)
    _ask(draft.set_target, given, "How small: 50% or 4B of its parameters, or 8GiB on disk", _DEFAULT_TARGET)
    typer.echo(f"  {draft.in_short()}")
    _ask(draft.set_text, data, "Text, a .txt or .jsonl file or a folder of them, or hf:NAME", _DEFAULT_TEXT)
    draft.name = (_as_name(out.stem) if out is not None else "") or _free_name(draft)
    default = f"runs/{draft.name}"
    if unknown:
        _ask(draft.set_run_dir, run_dir, "Run folder", default)
    elif run_dir is None:
        draft.set_run_dir(default)
    file = out or Path(f"{draft.name}.yaml")
    _write(file, draft)
    _say_what_next(file)


@dataclass
class _Draft:
    """The answers so far. Each `set_` method raises KdscaleError when the answer cannot be used, and keeps nothing."""

    name: str = "init"
    tree: dict[str, Any] = field(default_factory=dict)
    folder: Path = Path()  # of the teacher, or of its config.json alone
    plan: Plan | None = None

    def config(self, **answers: Any) -> Config:
        """The config with these answers; those that are still missing stand in as something valid."""
        from kdscale.config.load import build_config

        missing = {
            "run_dir": "runs/init", "teacher": {"path": "teachers"}, "prune": {"target_params": _DEFAULT_TARGET},
        }  # fmt: skip
        return build_config({"name": self.name, **missing, **self.tree, **answers}, "this answer")

    def set_teacher(self, answer: str) -> None:
        """A folder that a run can use, or the name of a hub model with a config that kdscale knows."""
        from kdscale.families import load_family
        from kdscale.pipeline.checks import check_teacher
        from kdscale.weights import read_config, resolve_teacher

        config = self.config(teacher={"path": answer})
        if answer.startswith("hf:"):  # its weights come with the first command that needs them
            folder = resolve_teacher(config.teacher, config_only=True)
            load_family(read_config(folder), answer)
        else:
            folder = check_teacher(config)
        self.folder, self.tree["teacher"] = folder, {"path": answer}

    def set_target(self, answer: str | dict[str, str]) -> None:
        """A size that some shape reaches; axes beside the default ones are opened only where that needs them."""
        from kdscale.pipeline.checks import plan_shapes

        target = answer if isinstance(answer, dict) else _target(answer)
        axes = self.config(prune=target).prune.axes
        tries: list[dict[str, Any]] = [target]
        tries += [{**target, "axes": [*axes, *more]} for more in (("hidden",), ("hidden", "layers"))]
        failure: KdscaleError | None = None
        for prune in tries:
            try:
                (self.plan,) = plan_shapes(self.config(prune=prune), self.folder)
            except KdscaleError as error:
                failure = error
            else:
                self.tree["prune"] = prune
                return
        assert failure is not None
        raise failure

    def set_text(self, answer: str | list[str]) -> None:
        """Sources of text that exist."""
        from kdscale.pipeline.checks import check_sources

        data = {"sources": [{"path": path} for path in ([answer] if isinstance(answer, str) else answer)]}
        check_sources(self.config(data=data))
        self.tree["data"] = data

    def set_run_dir(self, answer: str) -> None:
        """A folder that can be made, and holds no other run."""
        from kdscale.pipeline.checks import check_run_dir
        from kdscale.runs.folder import RunFolder

        path = Path(self.config(run_dir=answer).run_dir)
        check_run_dir(path)
        if RunFolder(path).config.exists():
            raise ConfigError("run_dir", expected="a folder without a run", got=f"{path}, which holds one")
        self.tree["run_dir"] = answer

    def in_short(self) -> str:
        """What the size means: `134.5 M → 68.2 M parameters, by cutting ffn, heads`."""
        from kdscale.units import format_count

        assert self.plan is not None
        before, after = self.plan.teacher_params.total, self.plan.student_params.total
        cut = [
            axis for axis, size in self.plan.student.model_dump().items() if size != getattr(self.plan.teacher, axis)
        ]
        return f"{format_count(before, 4)} → {format_count(after, 4)} parameters, by cutting {', '.join(cut)}"


def _check_together(draft: _Draft, given: dict[str, Any]) -> None:
    """Take over what options gave, by the method that takes it. Raises all that is wrong at once."""
    from kdscale.pipeline.checks import attempt

    errors: list[KdscaleError] = []
    for method, value in given.items():
        if value and (method != "set_target" or "teacher" in draft.tree):  # a size is that of a known teacher
            attempt(errors, getattr(draft, method), value)
    raise_together(errors)


def _ask(use: Callable[[Any], None], given: Any, question: str, default: str | None) -> None:
    """Ask until an answer can be used, unless an option gave one."""
    from kdscale.pipeline.checks import attempt

    while not given:
        errors: list[KdscaleError] = []
        attempt(errors, use, typer.prompt(question, default=default).strip())
        if not errors:
            return
        typer.echo(f"error: {errors[0]}")


def _target(answer: str) -> dict[str, str]:
    """The field of `prune` that an answer means. Raises ConfigError when it means none."""
    from kdscale.units import BUDGET_FIELDS, parse_budget

    for name in ("target_params", "target_bytes"):
        try:
            parse_budget(answer, BUDGET_FIELDS[name])
        except ValueError:
            continue
        return {name: answer}
    raise ConfigError(
        "the size", expected="a share such as 50%, parameters such as 4B or 135M, or a size on disk such as 8GiB",
        got=repr(answer[:80]),
    )  # fmt: skip


def _teacher_here() -> str | None:
    """A folder under teachers/ that may be meant."""
    return next((str(path.parent) for path in sorted(Path("teachers").glob("*/config.json"))), None)


def _as_name(text: str) -> str:
    """`text` as the name of a config: letters, digits, `.`, `_` and `-`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:80]


def _free_name(draft: _Draft) -> str:
    """`llama-3.1-8b-to-4b`, or `llama-3.1-8b-to-4b-2` where a file or a run has that name."""
    from kdscale.units import compact_count

    assert draft.plan is not None
    path = draft.tree["teacher"]["path"].removeprefix("hf:")
    teacher = _as_name(Path(path).name) or _as_name(draft.folder.resolve().name) or "teacher"
    name = f"{teacher}-to-{compact_count(draft.plan.student_params.total)}".lower()
    number = 1
    while (
        Path(f"{(numbered := name if number == 1 else f'{name}-{number}')}.yaml").exists()
        or Path("runs", numbered).exists()
    ):
        number += 1
    return numbered


def _check_out(out: Path, force: bool) -> None:
    """Raises ConfigError when the config cannot be written to `out`, or something is there."""
    try:
        is_file_to_be, exists = not out.is_dir() and out.parent.is_dir(), out.exists()
    except (OSError, ValueError) as error:  # a name that is too long, a NUL
        raise ConfigError("--out", expected="the name of a file", got=str(error)[:200]) from error
    if not is_file_to_be:
        raise ConfigError("--out", expected="a file in a folder that exists", got=str(out))
    if exists and not force:
        raise ConfigError(f"--out {out} exists", expected="a new file", hint="--force overwrites it")


def _write(file: Path, draft: _Draft) -> None:
    """Write the config, after it was read back and found to be what was asked."""
    from kdscale.config.load import build_config, parse_yaml
    from kdscale.files import explain_os_errors, write_text

    text = _as_yaml(draft)
    assert build_config(parse_yaml(text, str(file)), str(file)) == draft.config()
    with explain_os_errors(file):
        write_text(file, text)


def _as_yaml(draft: _Draft) -> str:
    """The config with comments. Nothing that the user gave goes into a comment."""
    from kdscale.config.distill.settings import DistillConfig

    tree, defaults = draft.tree, DistillConfig()
    ((target, size),) = ((key, value) for key, value in tree["prune"].items() if key != "axes")
    lines = [
        f"# {draft.in_short()}.",
        "# All other fields have their defaults: docs/reference/config.md lists them, and config.yaml in the run",
        "# folder shows them all as soon as a run has begun. --set KEY=VALUE changes a field for one command.",
        f"name: {_scalar(draft.name)}",
        f"run_dir: {_scalar(tree['run_dir'])}  # everything that the run writes",
        "teacher:",
        f"  path: {_scalar(tree['teacher']['path'])}  # a folder, or hf:org/name",
        "data:",
        "  sources:  # .txt, .jsonl or .jsonl.gz: files, folders or globs; hf:NAME; builtin:classics",
        *(f"    - path: {_scalar(source['path'])}" for source in tree["data"]["sources"]),
        "prune:",
        f"  {target}: {_scalar(size)}  # a share of the teacher's, or a number",
    ]
    if axes := tree["prune"].get("axes"):
        lines.append(f"  axes: [{', '.join(axes)}]  # what may be cut; fewer of them do not reach this size")
    lines += [
        "# Changed most often, at their defaults; the tokens decide how long the training takes and how good it gets:",
        "# distill:",
        *(f"#   {name}: {getattr(defaults, name):_}" for name in ("tokens", "seq_len", "global_batch", "processes")),
    ]
    return "\n".join(lines) + "\n"


def _scalar(text: str) -> str:
    """A text as YAML reads it back: plain where that is possible, else quoted."""
    from kdscale.config.load import parse_yaml

    if _PLAIN.fullmatch(text):
        try:
            if parse_yaml(text, "") == text:
                return text
        except ConfigError:  # such as `-` or `a:`, which mean something to YAML
            pass
    return json.dumps(text)


def _say_what_next(file: Path) -> None:
    import shlex

    from kdscale.escaping import for_terminal

    name = for_terminal(shlex.quote(str(file)))
    typer.echo(f"written: {name}")
    typer.echo(f"next:    kdscale plan {name}   (measures the teacher, chooses the shape and shows it)")
    typer.echo(f"then:    kdscale run {name}")
