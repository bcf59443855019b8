"""A run that begins with what another one has finished: stages whose inputs are the same are not done again.

    python -m kdscale.pipeline.taking_over SOURCE TARGET

prints the names of the stages that were taken over. TARGET holds the config.yaml of a run that has not begun.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from kdscale.config.load import load_config
from kdscale.config.root import Config
from kdscale.errors import FileError, KdscaleError
from kdscale.files import read_json
from kdscale.pipeline.stage import Stage, StageContext, changed_inputs, changed_outputs, inputs_of, manifest_path
from kdscale.pipeline.stages.registry import stages_of
from kdscale.runs.folder import Manifest, RunFolder, fits
from kdscale.runs.lineage import corrected_teacher, merged_teacher
from kdscale.runtime.progress import Reporter
from kdscale.weights import resolve_teacher

_COPIED_BYTES = 1 << 20  # smaller files are copied: people edit them where they are


def take_over(source: RunFolder, target: RunFolder, config: Config) -> list[str]:
    """Take over what `source` has finished, up to the first stage that `config` would do otherwise; returns the names.

    Large files are links to the same bytes, which nothing ever changes: a stage replaces its files. Reads `source`
    alone, which may be at work. Raises KdscaleError where the teacher is not there.
    """
    taken: list[str] = []
    teacher, corrected = resolve_teacher(config.teacher), corrected_teacher(config, source)
    context = StageContext(
        config, source, teacher, Reporter(quiet=True), corrected=corrected, merged=merged_teacher(config, source)
    )
    for stage in stages_of(config):
        manifest = _manifest(stage, source)
        if manifest is None or (stage.in_steps and config.steps):  # steps have run folders of their own
            break
        try:
            made_from = inputs_of(stage, context)
        except (KdscaleError, OSError):  # what it reads is being made anew
            break
        if changed_inputs(manifest["made_from"], made_from) or changed_outputs(source, manifest, stage.hand_editable):
            break
        for artifact in (*stage.writes, *(one for one in stage.resumes_from if one.path.startswith("logs/"))):
            _place(source.at(artifact), target.at(artifact))
        _place(manifest_path(stage, source), manifest_path(stage, target))
        target.set_status(stage.name, "done", seconds=manifest.get("seconds", 0.0), facts=manifest["facts"])
        taken.append(stage.name)
    return taken


def _manifest(stage: Stage, source: RunFolder) -> dict[str, Any] | None:
    """The manifest of a finished stage; None where there is none that is sound."""
    try:
        manifest: dict[str, Any] = read_json(manifest_path(stage, source), expect=dict)
    except FileError:
        return None
    return manifest if fits(Manifest)(manifest) else None


def _place(source: Path, target: Path) -> None:
    """Make `target` what `source` is: a file, a folder, a link (such as to stored targets), or nothing."""
    if source.is_symlink():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source.resolve(), target_is_directory=source.is_dir())
    elif source.is_dir():
        for item in sorted(source.iterdir()):
            _place(item, target / item.name)
    elif source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy(source, target)


def _link_or_copy(source: Path, target: Path) -> None:
    if source.stat().st_size > _COPIED_BYTES:
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without links
            pass
        else:
            return
    shutil.copy2(source, target)


def main() -> None:
    """Take over as the command line says."""
    source, target = (RunFolder(Path(argument)) for argument in sys.argv[1:3])
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not the answer
    try:
        answer: dict[str, Any] = {"taken": take_over(source, target, load_config(target.config))}
    except KdscaleError as error:
        answer = {"error": error.parts, "exit_code": error.exit_code}
    json.dump(answer, out)
    out.close()


if __name__ == "__main__":
    main()
