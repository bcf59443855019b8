"""A service with a run that has ended, whose folder has what runs leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdscale.service.database.connection import Database
from kdscale.service.database.runs import NewRun, Run, Runs
from kdscale.service.ids import new_run_id
from kdscale.service.settings import ServiceSettings
from tests.unit.service.conftest import Clock

FILES = {
    "config.yaml": "name: x\n", "service.json": "{}", "student/model.safetensors": "weights",
    "quantized/int8/model.safetensors": "fewer", "checkpoints/step_10/rank0.bin": "state", "work/some": "half",
    "steps/one/checkpoints/step_5/rank0.bin": "state", "steps/one/student/model.safetensors": "weights",
    "logs/metrics.jsonl": "{}\n", "logs/tensorboard/events": "x", "data/tokens.bin": "text", "report/index.html": "<p>",
}  # fmt: skip


@pytest.fixture
def ended(settings: ServiceSettings, database: Database, clock: Clock) -> Callable[..., Run]:
    """Adds a run that ends now."""
    runs, number = Runs(database, clock), iter(range(1, 100))

    def add(state: Any = "succeeded", **fields: Any) -> Run:
        run_id = new_run_id(next(number))
        folder = fields.pop("folder", settings.runs / run_id)
        write_files(folder, FILES)
        write_files(settings.jobs / run_id, {"1/output.log": "words", "1/exit.json": "{}", "state.json": "{}"})
        run = runs.add(NewRun(id=run_id, name="tiny", owner="ada", config={}, folder=folder, **fields))
        runs.move(run.id, "starting")
        return runs.move(run.id, state)

    return add


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
