"""What can be packaged: a run that is finished, and as its stages left it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdscale.config.load import build_config
from kdscale.config.root import Config
from kdscale.errors import RunFolderError
from kdscale.files import remove_tree, write_json, write_text
from kdscale.jobs.package import check_finished, source_of
from kdscale.runs.digests import digest_tree
from kdscale.runs.folder import STUDENT_WEIGHTS, RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    write_text(run.student / "config.json", "{}")
    write_text(run.student / "model.safetensors", "weights")
    write_text(run.eval / "eval.json", "{}")
    weights = digest_tree(run.student, STUDENT_WEIGHTS.only)
    leaves(run, "distill", {"student": digest_tree(run.student)}, {})
    leaves(run, "eval", {"eval": digest_tree(run.eval)}, {"student": weights})
    return run


def leaves(run: RunFolder, stage: str, outputs: Any, read: Any) -> None:
    made_from = {"config": {}, "files": read}
    write_json(run.stages / f"{stage}.json", {"made_from": made_from, "outputs": outputs, "facts": {}})


def config(run: RunFolder, **fields: Any) -> Config:
    tree = {"name": "t", "run_dir": str(run.path), "teacher": {"path": "t"}, "prune": {"ffn": 64}, **fields}
    return build_config(tree, "here")


def test_a_finished_run_can_be_packaged(run: RunFolder) -> None:
    write_text(run.student / "README.md", "people may edit it")
    check_finished(config(run), run)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("student", "no student yet"),
        ("stages/distill.json", "no student yet"),
        ("eval", "no evaluation yet"),
        ("stages/eval.json", "no evaluation yet"),
        ("student/model.safetensors", r"student was changed after it was made \(model\.safetensors\)"),
    ],
)
def test_what_is_missing_is_named_with_what_makes_it(run: RunFolder, gone: str, message: str) -> None:
    remove_tree(run.path / gone)
    with pytest.raises(RunFolderError, match=message) as caught:
        check_finished(config(run), run)
    assert caught.value.hint.startswith(f"kdscale run {run.path}")


def test_figures_of_another_student_are_not_its_card(run: RunFolder) -> None:
    write_text(run.student / "model.safetensors", "other weights")
    leaves(run, "distill", {"student": digest_tree(run.student)}, {})
    with pytest.raises(RunFolderError, match="evaluation is of another student"):
        check_finished(config(run), run)


def test_figures_of_other_forms_are_not_in_its_card(run: RunFolder) -> None:
    """The forms were made after the evaluation."""
    write_text(run.quantized / "int8" / "model.safetensors", "weights")
    leaves(run, "quantize", {"quantized": digest_tree(run.quantized)}, {})
    with pytest.raises(RunFolderError, match="evaluation is of other quantised forms"):
        check_finished(config(run, quantize={"forms": [{"name": "int8"}]}), run)


def test_forms_that_the_run_has_made_can_be_packaged_too(run: RunFolder) -> None:
    quantize = {"forms": [{"name": "int8"}, {"name": "fp8"}]}
    write_text(run.quantized / "int8" / "config.json", "{}")
    source = source_of(config(run, quantize=quantize), run)
    assert list(source.quantized) == ["int8"] and source.student == run.student
