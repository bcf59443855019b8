"""The report stage: report.html and report.json, and what was measured in the student's model card."""

from __future__ import annotations

from kdscale.errors import RunFolderError
from kdscale.files import atomic_dir, read_json, read_text, write_text
from kdscale.pipeline.stage import Facts, StageContext, changed_outputs
from kdscale.runs.folder import BIAS, DOWNSTREAM, EVAL, IMPORTANCE, REPAIR, STUDENT_CARD, Manifest, RunFolder, fits

_SHOWN = {artifact.path for artifact in (IMPORTANCE, REPAIR, EVAL, DOWNSTREAM, BIAS)}


def what_matters(context: StageContext) -> Facts:
    """The limits of a gate, which the report shows."""
    return {} if context.config.bias is None else {"bias.fail_if": context.config.bias.fail_if}


def write_report(context: StageContext) -> Facts:
    """Write the report of whatever the run folder holds."""
    from kdscale.report.html import write_report as write

    _check_inputs(context.run)
    for step in sorted(context.run.steps.glob("*")):
        _check_inputs(RunFolder(step))
    with atomic_dir(context.run.report) as tmp:
        write(context.run.path, tmp)
    _renew_card(context)
    return {}


def _renew_card(context: StageContext) -> None:
    """Put what was measured into the student's card, where there is one; what people wrote into it stays."""
    from kdscale.packaging.model_card import with_measurements

    path = context.run.at(STUDENT_CARD)
    if not path.is_file():
        return
    before = read_text(path)
    after = with_measurements(before, context.run.path, context.config.name, str(path))
    if after != before:
        write_text(path, after)


def _check_inputs(run: RunFolder) -> None:
    """Raises RunFolderError or ConfigError for a result that is no longer what its stage left."""
    from kdscale.prune.plan import Plan

    if run.plan.exists():
        Plan.load(run.plan)
    changes: list[str] = []
    for path in sorted(run.stages.glob("*.json")):
        if "." in path.stem:  # of a stage that has begun
            continue
        manifest = read_json(path, RunFolderError, expect=dict)
        if not fits(Manifest)(manifest):
            changes.append(f"stages/{path.name} is damaged")
        else:  # what is gone is left out of the report
            there = {
                name: digests
                for name, digests in manifest["outputs"].items()
                if name in _SHOWN and (run.path / name).exists()
            }
            changes += changed_outputs(run, {"outputs": there})
    if changes:
        raise RunFolderError(
            f"{run.path} holds results that were changed",
            got="; ".join(changes[:8]),
            hint="kdscale run CONFIG makes them again",
        )
