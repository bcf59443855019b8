"""One stage of a run: what it reads, what it leaves, and whether what it left still holds.

A stage is finished when its manifest exists; the manifest is written last and says what the stage was made from (the
config fields it depends on, digests of what it reads) and what it left (name, size, digest of every output). Same
inputs: nothing to do. Other inputs: the differences are named and the stage runs again.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

from kdscale.config.load import config_differences
from kdscale.config.root import Config
from kdscale.errors import LackOfMemoryError, RunFolderError
from kdscale.files import atomic_path, read_own_json, remove_tree, write_json
from kdscale.runs.digests import digest_file, digest_tree
from kdscale.runs.folder import (
    CARD,
    DATA,
    PLAN,
    RESPONSES,
    WEIGHTS,
    Artifact,
    Manifest,
    RunFolder,
    StageInputs,
    fits,
    now,
)
from kdscale.runs.lineage import present
from kdscale.runtime.progress import Reporter
from kdscale.runtime.versions import versions
from kdscale.units import format_duration

_LINE = 160  # characters of a reason to run a stage again
Facts = Mapping[str, Any]
ModelRole = Literal["teacher_folder", "teacher", "model_to_prune", "model_to_learn_from"]


class InnerRunner(Protocol):
    """Brings stages of a run inside another run up to date; returns whether there was anything to do."""

    def __call__(
        self, outer: StageContext, config: Config, stages: tuple[str, ...], shared: Mapping[str, Path]
    ) -> bool:
        """`shared`: outputs of the outer run's stages, by name, that the inner run takes as its own."""


@dataclass(frozen=True)
class StageContext:
    """What every stage is given."""

    config: Config
    run: RunFolder
    teacher_folder: Path  # as the config names it
    reporter: Reporter
    pruned_from: Path | None = None  # the student of the step before, where there is one
    corrected: Path | None = None  # the corrected teacher, where the config asks for one
    run_inner: InnerRunner | None = None  # set by the runner; a stage that runs other stages calls it
    accept_changes: bool = False  # whether checkpoints of other inputs may be deleted
    ranks: int = 1  # how many processes share the stage that runs; this is one of them
    merged: Path | None = None  # the teacher with its adapters, where the config names some

    @property
    def teacher(self) -> Path:
        """The teacher that the stages work with: with its adapters merged, as soon as they are."""
        return present(self.merged) or self.teacher_folder

    @property
    def model_to_prune(self) -> Path:
        """The model that this run prunes."""
        correct = self.config.correct
        corrected = self.corrected if correct is not None and correct.use == "prune_and_distill" else None
        return self.pruned_from or corrected or self.teacher

    def shared_text(self) -> dict[str, Path]:
        """The text of the run, and the answers in it, as runs inside this one take them over."""
        answers = {RESPONSES.path: self.run.responses} if self.config.responses is not None else {}
        return {DATA.path: self.run.data, **answers}

    @property
    def model_to_learn_from(self) -> Path:
        """The model whose distribution the student learns."""
        previous = self.pruned_from if self.config.distill.teacher == "previous" else None
        return previous or self.corrected or self.teacher


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One row of the registry. Paths are artifacts of the run folder; a stage reads and writes nothing else there."""

    name: str
    title: str  # shown while it runs
    run: Callable[[StageContext], Facts]  # does the work; returns a few facts worth showing
    help: str = ""  # of the command that brings a run up to this stage; "": there is none, or it has a text of its own
    # the work on the device, which processes of its own do: `processes` of them, a field of the config, or one
    run_rank: Callable[[StageContext], None] | None = None
    processes: str = ""
    config: tuple[str, ...] = ()  # dotted config fields, or whole sections, that the result depends on
    without: tuple[str, ...] = ()  # dotted fields in them that it does not depend on, as another stage has them
    depends_on: Callable[[StageContext], Facts] | None = None  # what of the config matters, where that is no field
    model: ModelRole | None = None  # the larger model that it reads
    model_files: tuple[str, ...] = WEIGHTS  # globs of what it reads of that model
    # brings the files that it copies from a model, and nothing is computed from, up to date: from where, and where to
    copies: Callable[[StageContext], tuple[Path, Path]] | None = None
    reads: tuple[Artifact, ...] = ()
    writes: tuple[Artifact, ...]
    resumes_from: tuple[Artifact, ...] = ()  # what a killed try leaves for the next; useless once the inputs changed
    resumable: bool = False  # has a folder work/<name> to resume from, removed when the stage is finished
    hand_editable: bool = False  # an output changed by hand is kept, and stages after it see the change
    disk_bytes: Callable[[StageContext, int], int] | None = None  # what it writes in all, by student parameters
    disk_folder: Callable[[StageContext], Path] | None = None  # where it writes that; None: in the run folder
    only_with: str = ""  # a dotted config field; where it is null, a run has no such stage
    not_with: str = ""  # one; where it is not null, a run has no such stage
    in_steps: bool = False  # each step on the way to the final student runs it too
    # the config field that makes it distil in runs of its own, on one host; "" where it does not
    distils_by_itself: Callable[[Config], str] | None = None
    across_job: bool = False  # its processes are the ranks of the whole job, on all hosts
    memory: tuple[str, ...] = ()  # dotted config fields that lower what it needs of it, the first to try first
    watches_itself: bool = False  # its ranks have watchdogs of their own
    check_before: Callable[[Config, RunFolder], None] | None = None  # before any work, where it has yet to run
    check_after: Callable[[Config, RunFolder], None] | None = None  # whether later stages can use what it left
    gate: Callable[[Config, RunFolder], None] | None = None  # whether its result is good enough, when all is written


@contextmanager
def explain_lack_of_memory(stage: Stage) -> Iterator[None]:
    """Raise LackOfMemoryError for what Python or torch raise within the block where memory does not suffice."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:  # torch's is a RuntimeError
        from kdscale.runtime.device import is_lack_of_memory

        if not is_lack_of_memory(error):
            raise
        what = str(error).strip().partition("\n")[0][:300]
        settings = f"try others for {', '.join(stage.memory)}, or " if stage.memory else ""
        raise LackOfMemoryError(
            f"out of memory in the stage {stage.name} ({stage.title})",
            got=what or type(error).__name__,
            hint=f"{settings}end other programs; what was finished is kept, and the same command goes on",
        ) from error


def belongs_to(stage: Stage, config: Config) -> bool:
    """Whether a run with this config has the stage."""
    plain = config.resolved()
    if stage.not_with and _lookup(plain, stage.not_with) is not None:
        return False
    return not stage.only_with or _lookup(plain, stage.only_with) is not None


def inputs_of(stage: Stage, context: StageContext) -> dict[str, Any]:
    """Everything the stage's result depends on, as plain values that can be compared and shown."""
    plain = context.config.resolved()
    made_from: dict[str, Any] = {"config": {name: _lookup(plain, name) for name in stage.config}, "files": {}}
    if stage.depends_on is not None:
        made_from["derived"] = dict(stage.depends_on(context))
    if stage.model is not None:
        made_from["files"]["teacher"] = digest_tree(getattr(context, stage.model), _files_read(stage, context))
    for artifact in stage.reads:
        made_from["files"][artifact.path] = digest_tree(context.run.at(artifact), artifact.only)
    return _decisive(stage, made_from)


def _decisive(stage: Stage, made_from: dict[str, Any]) -> dict[str, Any]:
    """What the result depends on alone: not on how many processes share the work, up to rounding."""
    config = made_from["config"]
    for dotted in (stage.processes, *stage.without):
        section, _, field = dotted.rpartition(".")
        if field in config.get(section, {}):
            config = {**config, section: {key: value for key, value in config[section].items() if key != field}}
    return {key: value for key, value in {**made_from, "config": config}.items() if value or key != "derived"}


def _files_read(stage: Stage, context: StageContext) -> tuple[str, ...]:
    """Globs of the model's files that the stage reads; its code too, where the config allows that to run."""
    return (*stage.model_files, *(["*.py"] if context.config.teacher.trust_remote_code else []))


def _lookup(plain: dict[str, Any], dotted: str) -> Any:
    value: Any = plain
    for part in dotted.split("."):
        value = value[part]
    return value


def manifest_path(stage: Stage, run: RunFolder) -> Path:
    """Where the manifest of a finished stage is."""
    return run.stages / f"{stage.name}.json"


def read_manifest(stage: Stage, run: RunFolder) -> dict[str, Any] | None:
    """The manifest of a finished stage; None where there is none, or one that is damaged, which is set aside."""
    manifest: dict[str, Any] | None = read_own_json(manifest_path(stage, run), fits(Manifest))
    return manifest and {**manifest, "made_from": _decisive(stage, manifest["made_from"])}


def why_stale(stage: Stage, context: StageContext, made_from: dict[str, Any]) -> list[str] | None:
    """None when the stage is finished and still holds; else the reasons to run it (empty: it never finished)."""
    manifest = read_manifest(stage, context.run)
    if manifest is None:
        return []
    return [
        *changed_inputs(manifest["made_from"], made_from),
        *changed_outputs(context.run, manifest, stage.hand_editable),
    ] or None


def changed_inputs(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two results of `inputs_of`: a setting with both values, a file by its name."""
    old, new = ({key: value for key, value in inputs.items() if key != "files"} for inputs in (before, now))
    lines = [str(difference) for difference in config_differences(old, new)]
    files_before, files_now = (_files_of(inputs) for inputs in (before, now))
    for name in sorted({*files_before, *files_now}):
        if name not in files_before:
            lines.append(f"{name} is new")
        elif name not in files_now:
            lines.append(f"{name} is gone")
        elif files_before[name] != files_now[name]:
            lines.append(f"{name} was " + ("edited" if name == PLAN.path else "changed"))
    return [line if len(line) <= _LINE else f"{line[: _LINE - 1]}…" for line in lines]


def _files_of(inputs: Mapping[str, Any]) -> dict[str, str]:
    """Digests by path; an artifact that is a single file is called by its own name."""
    return {
        artifact if PurePosixPath(artifact).name == name else f"{artifact}/{name}": digest
        for artifact, digests in inputs.get("files", {}).items()
        for name, digest in digests.items()
    }


def changed_outputs(run: RunFolder, manifest: Mapping[str, Any], hand_editable: bool = False) -> list[str]:
    """Which outputs are gone or are no longer what the stage left, one line each.

    The card in a model's folder does not count, also where a stage leaves several models: the report stage writes into
    it, and people do.
    """
    reasons = []
    for name, digests in manifest["outputs"].items():
        present = digest_tree(run.path / name) if (run.path / name).exists() else {}
        if (run.path / name).is_dir():
            present, digests = (_without_cards(tree) for tree in (present, digests))  # noqa: PLW2901
        if not present and digests:
            reasons.append(f"{name} is gone")
        elif present != digests and not hand_editable:
            changed = sorted(key for key in {*present, *digests} if present.get(key) != digests.get(key))
            reasons.append(f"{name} was changed after it was made ({', '.join(changed[:3])})")
    return reasons


def _without_cards(tree: Mapping[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in tree.items() if PurePosixPath(name).name != CARD}


def run_stage(stage: Stage, context: StageContext) -> bool:
    """Bring one stage up to date; returns whether there was anything to do."""
    run, reporter = context.run, context.reporter
    made_from = inputs_of(stage, context)
    reasons = why_stale(stage, context, made_from)
    if reasons is None:
        manifest = read_manifest(stage, run)
        assert manifest is not None
        _renew_copies(stage, context, manifest)
        reporter.say(f"✓ {stage.title}: done before{_listed(manifest['facts'])}")
        return False
    for reason in reasons:
        reporter.say(f"  {stage.title} is done again: {reason}")
    _prepare_resuming(stage, context, made_from)
    manifest_path(stage, run).unlink(missing_ok=True)
    run.set_status(stage.name, "running")
    started = time.monotonic()
    reporter.say(f"→ {stage.title}")
    facts = dict(stage.run(context))
    seconds = round(time.monotonic() - started, 1)
    # What a stage was made from is what was there when it began; plan.json edited meanwhile shows up next time.
    write_json(
        manifest_path(stage, run),
        {
            "stage": stage.name,
            "made_from": made_from,
            "outputs": {artifact.path: digest_tree(run.at(artifact)) for artifact in stage.writes},
            "copied": _copied(stage, context),
            "facts": facts,
            "seconds": seconds,
            "finished": now(),
            "versions": versions(),
        },
    )
    _remove_work(stage, run)
    run.set_status(stage.name, "done", seconds=seconds, facts=facts)
    reporter.say(f"✓ {stage.title}: {format_duration(seconds)}{_listed(facts)}")
    return True


def _prepare_resuming(stage: Stage, context: StageContext, made_from: dict[str, Any]) -> None:
    """Keep what a killed try left for resuming, but only if that try began from the same inputs."""
    if not stage.resumes_from and not stage.resumable:
        return
    run = context.run
    marker = run.stages / f"{stage.name}.started.json"
    before = read_own_json(marker, fits(StageInputs))
    before = before and _decisive(stage, before)
    if before is not None and before != made_from:
        if has_progress(stage, run) and not context.accept_changes:
            raise checkpoints_in_the_way(stage, run, changed_inputs(before, made_from))
        for artifact in stage.resumes_from:
            remove_tree(run.at(artifact))
    if before != made_from:
        _remove_stale_work(stage, run)
    write_json(marker, made_from)


def has_progress(stage: Stage, run: RunFolder) -> bool:
    """Whether the first artifact that the stage resumes from holds anything, which a redo would delete."""
    folders = [run.at(artifact) for artifact in stage.resumes_from[:1]]
    return any(any(folder.glob("*")) for folder in folders if not folder.is_symlink())  # what a link leads to stays


def checkpoints_in_the_way(stage: Stage, run: RunFolder, changes: Sequence[str]) -> RunFolderError:
    """The refusal to delete what a stage resumes from, because of `changes` of its inputs."""
    listed = "\n".join(f"  - {change}" for change in [*changes[:8], *(["…"] if len(changes) > 8 else [])])
    return RunFolderError(
        f"{run.at(stage.resumes_from[0])} belongs to other inputs of “{stage.title}”:\n{listed}",
        hint="undo the change, choose another folder with --set run_dir=..., or begin again with --accept-changes, "
        "which deletes it",
    )


def refuse_to_lose_progress(stages: Iterable[Stage], context: StageContext) -> None:
    """Raises RunFolderError, before any work, when changed inputs would cost checkpoints without --accept-changes."""
    changes: list[str] = []
    for stage in stages:
        if changes and has_progress(stage, context.run):
            raise checkpoints_in_the_way(stage, context.run, changes)
        if (manifest := read_manifest(stage, context.run)) is not None:
            changes += changed_inputs(manifest["made_from"], inputs_of(stage, context))


def _copied(stage: Stage, context: StageContext) -> dict[str, str]:
    """Digests of the files beside the weights in the folder that the stage copies from."""
    if stage.copies is None:
        return {}
    source, _ = stage.copies(context)
    weights = {item for pattern in WEIGHTS for item in source.glob(pattern)}
    return {item.name: digest_file(item) for item in sorted(source.iterdir()) if item.is_file() and item not in weights}


def _renew_copies(stage: Stage, context: StageContext, manifest: dict[str, Any]) -> None:
    """Copy again what changed beside the weights of the larger model, such as a chat template: no reason to compute."""
    if stage.copies is None or (copied := _copied(stage, context)) == manifest.get("copied"):
        return
    from kdscale.weights import copy_sidecars

    (source, target), renewed = stage.copies(context), []
    with tempfile.TemporaryDirectory() as folder:
        for config in target.glob("config.json"):  # a width in the copies follows it
            shutil.copyfile(config, Path(folder) / "config.json")
        for name in copy_sidecars(source, Path(folder), code=context.config.teacher.trust_remote_code):
            new = Path(folder) / name
            if not (target / name).is_file() or digest_file(target / name) != digest_file(new):
                with atomic_path(target / name) as tmp:
                    shutil.copyfile(new, tmp)
                renewed.append(name)
    outputs = {artifact.path: digest_tree(context.run.at(artifact)) for artifact in stage.writes}
    write_json(manifest_path(stage, context.run), {**manifest, "outputs": outputs, "copied": copied})
    if renewed:
        context.reporter.say(f"  {target.name}: {', '.join(renewed)} copied again, as the original changed")


def _remove_stale_work(stage: Stage, run: RunFolder) -> None:
    """Remove what a try from other inputs left, but no run in it: its own stages know whether its training still holds.

    They ask before they delete a checkpoint, and a form that is added to others leaves those to be trained as they are.
    """
    folder = run.work / stage.name
    if folder.is_symlink():  # what it leads to stays
        folder.unlink()
    for item in folder.iterdir() if stage.resumable and folder.is_dir() else ():
        if not RunFolder(item).config.is_file():
            remove_tree(item)


def _remove_work(stage: Stage, run: RunFolder) -> None:
    if stage.resumable and run.work.exists():
        remove_tree(run.work / stage.name)
        if not any(run.work.iterdir()):
            run.work.rmdir()


def _listed(facts: Facts) -> str:
    return "".join(f" · {name} {value}" for name, value in facts.items())
