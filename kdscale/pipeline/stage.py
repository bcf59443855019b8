"""One stage of a run: what it reads, what it leaves, and whether what it left still holds.

A stage is finished when its manifest exists; the manifest is written last and says what the stage was made from (the
config fields it reads, digests of its inputs) and what it left (name, size, digest of every output). Same inputs:
nothing to do. Other inputs: the differences are named and the stage runs again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kdscale.config.load import config_differences
from kdscale.config.root import Config
from kdscale.files import read_json, remove_tree, write_json
from kdscale.runs.digests import digest_tree
from kdscale.runs.folder import RunFolder, now
from kdscale.runtime.progress import Reporter
from kdscale.runtime.versions import versions

Facts = Mapping[str, Any]


class InnerRunner(Protocol):
    """Brings stages of a run inside another run up to date; returns whether there was anything to do."""

    def __call__(self, outer: Context, config: Config, stages: tuple[str, ...], shared: Mapping[str, Path]) -> bool:
        """`shared`: outputs of the outer run's stages, by name, that the inner run takes as its own."""


@dataclass(frozen=True)
class Context:
    """What every stage is given."""

    config: Config
    run: RunFolder
    teacher: Path
    reporter: Reporter
    pruned_from: Path | None = None  # with steps: the student of the step before; the teacher otherwise
    run_inner: InnerRunner | None = None  # set by the runner; a stage that runs other stages calls it

    @property
    def source(self) -> Path:
        """The model that this run prunes."""
        return self.pruned_from or self.teacher

    @property
    def distilled_from(self) -> Path:
        """The model whose distribution the student learns."""
        return self.source if self.config.distill.teacher == "previous" else self.teacher

    def teacher_of(self, stage: str) -> Path:
        """The larger model that a stage reads."""
        if stage in ("importance", "plan", "prune"):
            return self.source
        return self.distilled_from if stage == "distill" else self.teacher


@dataclass(frozen=True)
class Stage:
    """`work` does the job and returns a few facts worth showing; paths are relative to the run folder."""

    name: str
    title: str
    fields: tuple[str, ...]  # dotted config fields (or whole sections) the result depends on
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    work: Callable[[Context], Facts]
    reads_teacher: bool = False
    scratch: tuple[str, ...] = field(default=())  # kept for resuming; of no use once the inputs have changed
    resumable: bool = False  # has a folder work/<name> to resume from, which goes when the stage is finished
    hand_editable: bool = False  # an output changed by hand is kept, and stages after it see the change
    derived: Callable[[Context], Facts] | None = None  # what of the config really matters, if not a field


def inputs_of(stage: Stage, context: Context) -> dict[str, Any]:
    """Everything the stage's result depends on, as plain values that can be compared and shown."""
    plain = context.config.resolved()
    made_from: dict[str, Any] = {"config": {name: _lookup(plain, name) for name in stage.fields}, "files": {}}
    if stage.derived is not None:
        made_from["derived"] = dict(stage.derived(context))
    if stage.reads_teacher:
        made_from["files"]["teacher"] = digest_tree(context.teacher_of(stage.name))
    for name in stage.inputs:
        made_from["files"][name] = digest_tree(context.run.path / name)
    return made_from


def _lookup(plain: dict[str, Any], dotted: str) -> Any:
    value: Any = plain
    for part in dotted.split("."):
        value = value[part]
    return value


def manifest_path(stage: Stage, run: RunFolder) -> Path:
    return run.stages / f"{stage.name}.json"


def why_stale(stage: Stage, context: Context, made_from: dict[str, Any]) -> list[str] | None:
    """None when the stage is finished and still holds; else the reasons to run it (empty: it never finished)."""
    path = manifest_path(stage, context.run)
    if not path.exists():
        return []
    manifest = read_json(path)
    reasons = _short(config_differences(manifest["made_from"], made_from))
    for name, digests in manifest["outputs"].items():
        found = digest_tree(context.run.path / name) if (context.run.path / name).exists() else {}
        if not found:
            reasons.append(f"{name} is gone")
        elif found != digests and not stage.hand_editable:
            changed = sorted(key for key in {*found, *digests} if found.get(key) != digests.get(key))
            reasons.append(f"{name} was changed after it was made ({', '.join(changed[:3])})")
    return reasons or None


def _short(differences: list[str], width: int = 160) -> list[str]:
    return [line if len(line) <= width else line[: width - 1] + "…" for line in differences]


def run_stage(stage: Stage, context: Context) -> bool:
    """Bring one stage up to date; returns whether there was anything to do."""
    run, reporter = context.run, context.reporter
    made_from = inputs_of(stage, context)
    reasons = why_stale(stage, context, made_from)
    if reasons is None:
        reporter.say(f"✓ {stage.title}: done before{_facts(read_json(manifest_path(stage, run))['facts'])}")
        return False
    for reason in reasons:
        reporter.say(f"  {stage.title} is done again: {reason}")
    _prepare_scratch(stage, run, made_from)
    manifest_path(stage, run).unlink(missing_ok=True)
    run.set_status(stage.name, "running")
    started = time.monotonic()
    reporter.say(f"→ {stage.title}")
    facts = dict(stage.work(context))
    seconds = round(time.monotonic() - started, 1)
    # What a stage was made from is what was there when it began; plan.json edited meanwhile shows up next time.
    write_json(
        manifest_path(stage, run),
        {
            "stage": stage.name,
            "made_from": made_from,
            "outputs": {name: digest_tree(run.path / name) for name in stage.outputs},
            "facts": facts,
            "seconds": seconds,
            "finished": now(),
            "versions": versions(),
        },
    )
    _remove_work(stage, run)
    run.set_status(stage.name, "done", seconds=seconds, facts=facts)
    reporter.say(f"✓ {stage.title}: {seconds:.1f} s{_facts(facts)}")
    return True


def _prepare_scratch(stage: Stage, run: RunFolder, made_from: dict[str, Any]) -> None:
    """Keep what a killed try left for resuming, but only if that try began from the same inputs."""
    if not stage.scratch and not stage.resumable:
        return
    marker = run.stages / f"{stage.name}.started.json"
    before = read_json(marker) if marker.exists() else None
    if before is not None and before != made_from:
        for name in stage.scratch:
            remove_tree(run.path / name)
    if before != made_from:
        _remove_work(stage, run)
    write_json(marker, made_from)


def _remove_work(stage: Stage, run: RunFolder) -> None:
    if stage.resumable and run.work.exists():
        remove_tree(run.work / stage.name)
        if not any(run.work.iterdir()):
            run.work.rmdir()


def _facts(facts: Mapping[str, Any]) -> str:
    return "".join(f" · {name} {value}" for name, value in facts.items())
