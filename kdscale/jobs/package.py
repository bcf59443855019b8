"""`kdscale package`: the student of a finished run as a folder to serve and share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdscale.config.root import Config
from kdscale.errors import RunFolderError
from kdscale.files import read_text
from kdscale.models.loading import check_writes_text
from kdscale.packaging.bundle.contents import PROMPT, Extras, check_place, write_package
from kdscale.packaging.bundle.forms import Source, chosen, usual_forms
from kdscale.packaging.origin import origin_of
from kdscale.pipeline.runner import report_so_far
from kdscale.pipeline.stage import changed_outputs, read_manifest
from kdscale.pipeline.stages.registry import STAGES, stages_of
from kdscale.runs.digests import digest_tree
from kdscale.runs.folder import EVAL, QUANTIZED, QUANTIZED_WEIGHTS, STUDENT, STUDENT_CARD, STUDENT_WEIGHTS, RunFolder
from kdscale.runs.models import is_quantized, models_of_run
from kdscale.runtime.progress import Reporter
from kdscale.runtime.signals import signals_as_exceptions

_REPORT = ("report.html", "report.json")


def package_run(
    config: Config, forms: str | None, out: Path | None, reporter: Reporter, *, overrides: Mapping[str, Any],
    replace: bool = False, report: bool = True,
) -> Path:  # fmt: skip
    """Package the student of a run that was evaluated; returns the package's folder, RUN/package by default.

    `overrides`: fields of the card's front matter; `report`: whether the report goes along. Raises RunFolderError for a
    run that is not finished, or whose files were changed since, and what `write_package` raises.
    """
    run = RunFolder(Path(config.run_dir))
    target = out or run.path / "package"
    check_place(target, replace)
    check_finished(config, run)
    check_writes_text(run.student, "kdscale package, whose forms are for engines that write text")
    source = source_of(config, run)
    asked = chosen(source, forms or ",".join(usual_forms(source, reporter)))
    report_so_far(config, reporter)  # the package has the report, and the card the figures, of what there is now
    origin = origin_of(config, run.student).fields()
    if "license" not in {**origin, **overrides}:
        reporter.say("  note: the teacher's licence is not known; name it with --license, as the hub calls it")
    reporter.say(f"→ package {source.name}")
    with run.lock(), signals_as_exceptions():
        card = run.at(STUDENT_CARD)
        prompt = config.eval.prompts[0] if config.eval.prompts else PROMPT
        extras = Extras(
            card=read_text(card) if card.is_file() else f"# {source.name}\n", fields=origin, overrides=overrides,
            files={name: run.report / name for name in _REPORT if report}, prompt=prompt,
        )  # fmt: skip
        write_package(source, asked, extras, target, reporter, replace)
    reporter.say(f"✓ package: {target}")
    return target


def source_of(config: Config, run: RunFolder) -> Source:
    """What of a run can be packaged: the student, and the forms with fewer bits that the run has made of it."""
    folders = models_of_run(run, config, run.path)
    made = {
        name: path for name, path in folders.items() if is_quantized(name) and (path / "config.json").is_file()
    }  # fmt: skip
    return Source(
        name=config.name, student=run.student, quantized=made, own_code=config.teacher.trust_remote_code,
        max_shard_bytes=config.prune.max_shard_bytes,
    )  # fmt: skip


def check_finished(config: Config, run: RunFolder) -> None:
    """Raises RunFolderError for a run without a student or an evaluation, or whose files were changed since."""
    again = f"kdscale run {run.path}"
    distilled, evaluated = (read_manifest(STAGES[name], run) for name in ("distill", "eval"))
    if distilled is None or not (run.student / "config.json").is_file():
        raise RunFolderError(f"{run.path} has no student yet", expected="a finished run", hint=f"{again} makes it")
    if evaluated is None or not run.eval.is_dir():
        raise RunFolderError(
            f"{run.path} has no evaluation yet", expected="figures for the model card", hint=f"{again} measures them"
        )
    packaged = {STUDENT.path, QUANTIZED.path, EVAL.path}
    changes: list[str] = []
    for stage in stages_of(config):
        if packaged & {artifact.path for artifact in stage.writes}:
            manifest = read_manifest(stage, run)
            changes += changed_outputs(run, manifest) if manifest else [f"{stage.title}: not finished"]
    measured = evaluated["made_from"]["files"]
    for weights, others in ((STUDENT_WEIGHTS, "another student"), (QUANTIZED_WEIGHTS, "other quantised forms")):
        if measured.get(weights.path, {}) != digest_tree(run.at(weights), weights.only):
            changes.append(f"the evaluation is of {others}")
    if changes:
        raise RunFolderError(
            f"{run.path} is not as its stages left it", got="; ".join(changes[:8]), hint=f"{again} brings it up to date"
        )
