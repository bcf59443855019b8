"""The run inside the run that trains the student on for a form: what it is given of the outer one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdscale.config.load import load_config
from kdscale.files import write_text
from kdscale.pipeline.grid_training import train_on_grid
from kdscale.pipeline.stage import StageContext
from kdscale.runs.folder import RunFolder
from kdscale.runtime.progress import Reporter


def test_a_training_has_the_answers_that_its_targets_come_from(tmp_path: Path) -> None:
    """Those of `distill.teacher_placement: responses` are read in the folder of the run that trains."""
    forms = "quantize.forms=[{name: int4, method: distilled, start: rtn}]"
    config = load_config(Path("configs/smollm2-135m-to-82m-responses.yaml"), [f"run_dir={tmp_path / 'run'}", forms])
    given: dict[str, Path] = {}

    def run_inner(_context: Any, inner: Any, _stages: Any, shared: dict[str, Path]) -> bool:
        given.update(shared)
        write_text(RunFolder(Path(inner.run_dir)).metrics, "")
        return True

    run = RunFolder(tmp_path / "run")
    run.path.joinpath("logs").mkdir(parents=True)
    context = StageContext(config, run, tmp_path, Reporter(quiet=True), run_inner=run_inner)
    train_on_grid(context, config.quantize.trained[0])  # type: ignore[union-attr]
    assert given == {"data": run.data, "responses": run.responses, "pruned": run.student}
