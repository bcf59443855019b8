"""A bench for each engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kdscale.service.engines import programs
from tests.unit.service.engines.benches import BENCHES, Bench, ClusterBench

Benches = Callable[..., Bench]


@pytest.fixture
def make_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Benches]:
    """A bench by the name of its engine; with `spawn`, the stand-ins are programs that are found on PATH."""
    made: list[Bench] = []

    def make(name: str, spawn: bool = False, **own: object) -> Bench:
        bench = BENCHES[name](tmp_path, **own)
        if isinstance(bench, ClusterBench) and spawn:
            monkeypatch.setenv("PATH", f"{bench.tools}{os.pathsep}{os.environ['PATH']}")
        elif isinstance(bench, ClusterBench):
            monkeypatch.setattr(programs, "_run", bench.run)
        made.append(bench)
        return bench

    yield make
    for bench in made:
        bench.close()
