"""What `kdscale families` lists."""

from __future__ import annotations

import pytest

from kdscale.cli.models import families_command
from kdscale.families import cuttable_axes, family_files, supported_types


def test_an_axis_is_cut_alone_or_with_the_one_that_it_follows() -> None:
    axes = {data.name: cuttable_axes(data) for data in family_files()}
    assert axes["llama"] == dict.fromkeys(("hidden", "ffn", "heads", "kv_heads", "layers"), "alone")
    assert axes["mixtral"]["experts"] == "alone"
    assert (axes["gpt2"]["hidden"], axes["gpt2"]["kv_heads"], axes["gpt2"]["ffn"]) == ("heads", "heads", "alone")
    assert (axes["deepseek_v3"]["heads"], axes["deepseek_v3"]["kv_heads"]) == ("kv_heads", "heads")
    assert (axes["olmoe"]["heads"], axes["olmoe"]["kv_heads"]) == ("hidden", "alone")


def test_every_model_type_is_listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    families_command()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {name for row in rows for name in row} >= {*supported_types(), "granitemoehybrid_moe"}
    assert ["gpt2", "heads", "yes", "hidden", "heads", "yes"] in [row[:6] for row in rows]
