"""The quantize stage on a tiny run: all forms, what eval and report make of them, resuming, ranks, what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kdscale.config.load import dump_config, load_config
from kdscale.errors import ConfigError
from kdscale.eval.summary import gap_closed
from kdscale.files import read_json, write_text
from kdscale.pipeline.checks import plan_shapes
from kdscale.pipeline.runner import run_until
from kdscale.pipeline.spawn import run_on_ranks
from kdscale.pipeline.stage import StageContext, run_stage
from kdscale.pipeline.stages.quantize import check_before, quantize_rank
from kdscale.pipeline.stages.registry import STAGES
from kdscale.quantize import calibrated
from kdscale.report.facts import gather
from kdscale.runs.folder import RunFolder
from kdscale.runtime.progress import Reporter

QUIET = Reporter(quiet=True)
FORMS = "[{name: int8}, {name: int4, method: rtn}, {name: int4}, {name: fp8}]"
LABELS = ["int8", "int4_rtn_g32", "int4_gptq_g32", "fp8"]


@pytest.fixture
def context(tiny_config: Path, kdscale_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> StageContext:
    """A run with text, whose students are the teacher."""
    for name, value in kdscale_environment.items():
        monkeypatch.setenv(name, value)
    more = [
        "runtime.threads=1", "eval.efficiency=false", "eval.prompts=[]", f"quantize.forms={FORMS}",
        "quantize.seq_len=64", "quantize.micro_batch=2", "quantize.calibration_tokens=512", "quantize.dtype=float32",
    ]  # fmt: skip
    config = load_config(tiny_config, more)
    run, teacher = RunFolder(Path(config.run_dir)), Path(config.teacher.path)
    run_until(config, "data", QUIET)
    write_text(run.config, dump_config(config))
    for student in (run.pruned, run.student):
        shutil.copytree(teacher, student)
    return StageContext(config, run, teacher, QUIET)


def test_the_forms_are_models_of_the_run_and_its_result_stays_the_distilled_one(context: StageContext) -> None:
    run = context.run
    assert run_stage(STAGES["quantize"], context)
    assert sorted(path.name for path in run.quantized.iterdir() if path.is_dir()) == sorted(LABELS)
    assert not run.work.exists()
    facts = read_json(run.stages / "quantize.json")["facts"]
    assert list(facts) == LABELS and "of plain rounding's" in facts["int4_gptq_g32"]
    assert 0 < read_json(run.quantized / "int4_gptq_g32.json")["error_share"] < 0.8
    assert "made by GPTQ" in (run.quantized / "int4_gptq_g32" / "README.md").read_text()
    assert not run_stage(STAGES["quantize"], context), "nothing to do"

    assert run_stage(STAGES["eval"], context)
    models = read_json(run.eval / "eval.json")["models"]
    assert list(models) == ["teacher", "pruned", "distilled", *LABELS]
    assert {m["size"]["parameters"] for m in models.values()} == {models["teacher"]["size"]["parameters"]}
    assert models["int4_gptq_g32"]["size"]["weight_bytes"] < models["int8"]["size"]["weight_bytes"]
    divergence = {name: models[name]["quality"]["kl_to_teacher"] for name in LABELS}
    assert divergence["int8"] < divergence["int4_gptq_g32"] < divergence["int4_rtn_g32"]
    reported = gather(run.path)
    assert reported["verdict"].count("→") <= 1 and not reported["worsened"]
    assert gap_closed(dict.fromkeys(models, 1.0)) is None


def test_a_killed_stage_keeps_finished_forms_and_goes_on_within_one(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, walked = context.run, []
    once = replace(context, run=RunFolder(run.path.with_name("once")))
    shutil.copytree(run.path, once.run.path)
    run_on_ranks("quantize", quantize_rank, once, 1)

    class Killed(BaseException):
        pass

    original = calibrated.layer_matrices

    def counted(config, family, layer):
        walked.append(layer)
        if walked == [0, 1, 2]:
            raise Killed
        return original(config, family, layer)

    monkeypatch.setattr(calibrated, "layer_matrices", counted)
    with pytest.raises(Killed):
        run_on_ranks("quantize", quantize_rank, context, 1)
    finished = run.work / "quantize" / "finished"
    assert sorted(path.name for path in finished.iterdir() if path.is_dir()) == ["int4_rtn_g32", "int8"]
    assert not run.quantized.exists()
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    run_on_ranks("quantize", quantize_rank, context, 1)
    assert walked == [0, 1, 2, 2, 3]
    for path, time in before.items():
        assert (run.quantized / path.relative_to(finished)).stat().st_mtime_ns == time
    for label in LABELS:
        made, expected = (folder.quantized / label / "model.safetensors" for folder in (run, once.run))
        assert made.read_bytes() == expected.read_bytes()
        made, expected = (read_json(folder.quantized / f"{label}.json") for folder in (run, once.run))
        assert made == expected and (made["tokens"] == 512) == (label == "int4_gptq_g32")


@pytest.mark.slow
def test_ranks_find_what_one_finds_up_to_rounding(context: StageContext) -> None:
    files = []
    for ranks in (1, 2):
        run_on_ranks("quantize", quantize_rank, context, ranks)
        files.append(load_file(context.run.quantized / "int4_gptq_g32" / "model.safetensors"))
        assert read_json(context.run.quantized / "int4_gptq_g32.json")["tokens"] == 512
        shutil.rmtree(context.run.quantized)
        shutil.rmtree(context.run.work)
    alone, shared = files
    same = [(alone[name] == shared[name]).float().mean() for name in alone if name.endswith("_packed")]
    assert len(same) == 28 and sum(same) / len(same) > 0.9


def test_widths_that_no_group_divides_are_refused_before_any_work(context: StageContext, tiny_config: Path) -> None:
    more = ["quantize.forms=[{name: int4, group: 64}]"]
    config = load_config(tiny_config, more)
    with pytest.raises(ConfigError, match="int4_gptq_g64: hidden is 96, the nearest multiples are 64 and 128"):
        check_before(config, context.run)
    with pytest.raises(ConfigError, match=r"hidden is 96 \(nearest: 64 and 128\)"):
        plan_shapes(config, context.teacher)
    # a plan that has yet to be made has widths that the group divides: the ffn step is 32 without one
    asked = ["prune.ffn=null", "prune.heads=null", "prune.target_params=60%", "prune.axes=[ffn,hidden,heads]"]
    (plan,) = plan_shapes(load_config(tiny_config, [*more, *asked]), context.teacher)
    student = plan.student
    assert (student.hidden % 64, student.ffn % 64, student.heads * student.head_dim % 64) == (0, 0, 0)
    with pytest.raises(ConfigError, match=r"prune\.multiple_of \(32\) must be a multiple of 64"):
        load_config(tiny_config, [*more, "prune.multiple_of=32"])
