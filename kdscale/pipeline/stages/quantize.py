"""The quantize stage: the distilled student in forms with fewer bits, each a model of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kdscale.config.quantize import FormConfig, Int4Config, QuantizeConfig
from kdscale.config.root import Config
from kdscale.files import read_json, remove_tree, replace_dir, write_json
from kdscale.models.loading import open_teacher
from kdscale.pipeline.calibration import quantization_batches
from kdscale.pipeline.grid_training import start_of_training, train_on_grid, trained_forms, trained_student
from kdscale.pipeline.spawn import RankShare, join_shares, ranks_of, run_on_ranks
from kdscale.pipeline.stage import Facts, StageContext
from kdscale.pipeline.stages import distill
from kdscale.runs.folder import RunFolder
from kdscale.runtime.packages import require_packages
from kdscale.units import format_size

if TYPE_CHECKING:
    from kdscale.families import Family
    from kdscale.quantize.calibrated import LayerErrors
    from kdscale.quantize.forms import Form, Quantized
    from kdscale.weights import Checkpoint

_WORK = "quantize"  # in the run's folder for unfinished work
_FINISHED = "finished"  # the folder of finished forms in it, each with a file of figures beside it
_SCALE_BITS = 1  # a weight's share of a scale of 32 bits in a group of 32; less elsewhere
_EMBEDDING_BYTES = 4
_START_BYTES = 4  # a parameter of what a training begins with, at most


def disk_bytes(context: StageContext, student_params: int) -> int:
    """All forms, and the trainings with what they begin with.

    Of a form: the layers in few bits, the embeddings (no more than the teacher's) as they are.
    """
    teacher, family = open_teacher(context.teacher)
    embedding = min(student_params, family.count_params(teacher.config).embedding)
    forms = _forms(context.config)
    trainings = sum(
        distill.disk_bytes(replace(context, config=context.config.training_on_grid(form)), student_params)
        + (_START_BYTES * student_params if form.starts_from_gptq else 0)
        for form in trained_forms(context.config)
    )
    return trainings + sum(
        embedding * _EMBEDDING_BYTES + (student_params - embedding) * (form.bits + _SCALE_BITS) // 8 for form in forms
    )


def check_before(config: Config, run: RunFolder) -> None:
    """Raises ConfigError without the library, or when the run's student, where it is there, has unfit widths."""
    require_packages("quantize", ("compressed_tensors",), "quantize", "leave the section quantize out")
    if (run.pruned / "config.json").exists():
        check_model(config, run.pruned)
    for form in trained_forms(config):
        distill.check_before(config.training_on_grid(form), run)


def check_model(config: Config, folder: Path) -> None:
    """Raises ConfigError when the model in `folder`, or a student of its family with its widths, has no such forms."""
    from kdscale.families import load_family
    from kdscale.quantize.matrices import check_family, check_widths
    from kdscale.weights import read_config

    model = read_config(folder)
    family = load_family(model, str(folder / "config.json"))
    check_family(family)
    check_widths(family.dims(model), _forms(config))


def quantize(context: StageContext) -> Facts:
    """Write every form; returns their sizes, and how much of plain rounding's error is left."""
    config, run = context.config, context.run
    calibrated = any(form.needs_calibration for form in _forms(config))
    ranks = ranks_of(config, "quantize.processes") if calibrated else 1
    if _missing_starts(config, run):
        run_on_ranks(_WORK, quantize_rank, context, ranks)
    trained = {
        form.label: distill.held_out(train_on_grid(context, form))
        for form in trained_forms(config)
        if _is_unfinished(run, form)
    }
    run_on_ranks(_WORK, quantize_rank, context, ranks)
    facts: dict[str, str] = {}
    for form in _forms(config):
        figures = read_json(run.quantized / f"{form.label}.json")
        share = figures["error_share"]
        kept = "" if share is None else f", error {share:.0%} of plain rounding's"
        learnt = "".join(f", {name} {value}" for name, value in trained.get(form.label, {}).items())
        facts[form.label] = format_size(figures["weight_bytes"]) + kept + learnt
    return facts


def _is_unfinished(run: RunFolder, form: FormConfig) -> bool:
    """Whether no killed try has finished the form."""
    return not (run.work / _WORK / _FINISHED / form.label).exists()


def _missing_starts(config: Config, run: RunFolder) -> list[Int4Config]:
    """The forms whose training cannot begin before a calibration."""
    return [
        form for form in trained_forms(config)
        if form.starts_from_gptq and _is_unfinished(run, form) and not start_of_training(run, form).exists()
    ]  # fmt: skip


def quantize_rank(context: StageContext) -> None:
    """Make what trainings begin with, where that is missing; else the forms, of which the trained ones are trained.

    What a killed try has finished is not made again.
    """
    from kdscale.runtime.ranks import barrier, is_writer

    run, work = context.run, context.run.work / _WORK
    calibrated = any(form.needs_calibration for form in _forms(context.config))
    batches = quantization_batches(context.config, run.data) if calibrated else ()
    tokens, share = sum(batch.input_ids_BS.numel() for batch in batches), join_shares(context, _WORK, batches)
    if missing := _missing_starts(context.config, run):
        for asked in missing:
            _make_start(context, asked, share)
            barrier()
        return
    trained = {form.label: trained_student(context.config, form) for form in trained_forms(context.config)}
    for form in _forms(context.config):
        if _is_unfinished(run, form):
            student, family = open_teacher(trained.get(form.label, run.student))
            _make(context, form, student, family, share, tokens if form.needs_calibration else 0)
        barrier()
    if is_writer():
        replace_dir(work / _FINISHED, run.quantized)


def _make_start(context: StageContext, settings: Int4Config, share: RankShare) -> None:
    """Write the student that the training for a form begins with, into its place."""
    from kdscale.quantize.calibrated import LayerErrors
    from kdscale.quantize.start import StartForm, finish_start

    final = start_of_training(context.run, settings)
    student, family = open_teacher(context.run.student)
    out = _written(context, StartForm(settings), f"{final.name}.part", student, family, share, LayerErrors())
    if out is not None:
        finish_start(student, out, context.config.teacher.trust_remote_code)
        replace_dir(out, final)
        _journal(out).unlink()


def _make(
    context: StageContext, settings: FormConfig, student: Checkpoint, family: Family, share: RankShare, tokens: int
) -> None:
    """Write one form into the folder of finished ones.

    `tokens`: of the text that all ranks together calibrate it on; 0 without calibration.
    """
    from kdscale.eval.sizes import weight_bytes
    from kdscale.packaging.model_card import quantized_card
    from kdscale.quantize.calibrated import LayerErrors
    from kdscale.quantize.forms import make_form
    from kdscale.quantize.write import finish_folder

    config, form, errors = context.config, make_form(settings), LayerErrors()
    out = _written(context, form, settings.label, student, family, share, errors)
    if out is None:
        return
    finished = out.parent / _FINISHED
    figures = {"weight_bytes": weight_bytes(out), "student_bytes": weight_bytes(student.path), "tokens": tokens}
    card = quantized_card(config, settings, figures, student.path)
    finish_folder(student, family, form, out, card, config.teacher.trust_remote_code)
    finished.mkdir(exist_ok=True)
    write_json(finished / f"{settings.label}.json", {**figures, "error_share": errors.share})
    replace_dir(out, finished / settings.label)
    _journal(out).unlink()


def _written(
    context: StageContext,
    form: Form,
    name: str,
    student: Checkpoint,
    family: Family,
    share: RankShare,
    errors: LayerErrors,
) -> Path | None:
    """Write the weights of a form into a folder of this name, which is returned; None on ranks that only calibrate."""
    from kdscale.quantize.write import open_writer, write_weights
    from kdscale.runtime.ranks import is_writer

    share = replace(share, scratch=share.scratch.subfolder(name))
    scratch = share.scratch.folder
    if not is_writer():
        for _ in _layers(context, form, student, family, share, errors) or ():
            pass
        return None
    out = context.run.work / _WORK / name
    with open_writer(student, family, form, out, context.config.prune.max_shard_bytes, _journal(out)) as writer:
        if not writer.written and scratch is not None and scratch.exists():
            remove_tree(scratch)  # the layers that it has done are not in these files
        made = _layers(context, form, student, family, share, errors)
        write_weights(writer, student, family, form, made, share.device, context.reporter)
    return out


def _journal(out: Path) -> Path:
    return out.with_name(f"{out.name}.written.json")


def _layers(
    context: StageContext, form: Form, student: Checkpoint, family: Family, share: RankShare, errors: LayerErrors
) -> Iterable[Mapping[str, Quantized]] | None:
    """The weights of a form that is made by calibration, layer by layer; None where all are simply rounded."""
    from kdscale.quantize.calibrated import calibrated_layers
    from kdscale.quantize.integers import IntegerForm
    from kdscale.runtime.device import resolve_dtype

    if not form.calibrated:
        return None
    settings = form.settings
    assert isinstance(settings, Int4Config)
    assert isinstance(form, IntegerForm)
    return calibrated_layers(
        student, family, settings, form.grid, share.batches,
        dtype=resolve_dtype(_section(context.config).dtype, share.device),
        device=share.device, reporter=context.reporter, scratch=share.scratch, errors=errors,
    )  # fmt: skip


def _section(config: Config) -> QuantizeConfig:
    assert config.quantize is not None, "a run without this section has no such stage"
    return config.quantize


def _forms(config: Config) -> tuple[FormConfig, ...]:
    return _section(config).forms
