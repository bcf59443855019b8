"""What the end of a stage's ranks means to whoever started them."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kdscale_launch
from kdscale.errors import Interrupted
from kdscale.pipeline.spawn import run_on_ranks
from kdscale.runtime.exits import exit_code_of


@pytest.mark.parametrize(("code", "job_code"), [(75, 75), (128 + signal.SIGTERM, 143), (128 + signal.SIGINT, 130)])
def test_ranks_have_no_limit_below_their_launchers_and_75_is_theirs_to_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, job_code: int
) -> None:
    jobs: list[Any] = []
    monkeypatch.setattr(kdscale_launch, "run_local", lambda job: jobs.append(job) or code)
    context: Any = SimpleNamespace(
        run=SimpleNamespace(path=tmp_path, logs=tmp_path), teacher=tmp_path, pruned_from=None, corrected=None
    )
    with pytest.raises(Interrupted) as caught:
        run_on_ranks("distill", lambda _: None, context, processes=2, across_job=True)
    assert exit_code_of(caught.value) == job_code
    assert ("before every rank had saved" in str(caught.value)) == (job_code == 143)
    assert jobs[0].grace_seconds == math.inf
