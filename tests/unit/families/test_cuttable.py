"""What `kdscale families` lists; what is cut with another axis; what a layer's cache keeps."""

from __future__ import annotations

import numpy as np
import pytest

from kdscale.cli.models import families_command
from kdscale.families import Dims, cuttable_axes, family_files, load_family, supported_types
from tests.unit.families.small_configs import small_config


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
    rows = [line.replace(",", "").split() for line in capsys.readouterr().out.splitlines()]
    assert {name for row in rows for name in row} >= {*supported_types(), "granitemoehybrid_moe"}
    assert ["gpt2", "heads", "yes", "hidden", "heads", "yes"] in [row[:6] for row in rows]


def test_axes_that_follow_another_keep_its_share_and_stay_as_round_as_they_are() -> None:
    dims = Dims(
        hidden=8, ffn=1408, heads=1, kv_heads=1, head_dim=8, layers=1, vocab=8, dense_ffn=10944, shared_ffn=2816
    )
    assert (dims.resized(ffn=704).dense_ffn, dims.resized(ffn=704).shared_ffn) == (5472, 1408)
    assert dims.resized(ffn=1024).dense_ffn == 7936  # 7959.3, in steps of 64
    assert dims.resized(ffn=1).dense_ffn == 64
    assert dims.resized(hidden=4).dense_ffn == 10944
    counted = dims.followers({"ffn": np.array([704, 1024, 1, 1408])})["dense_ffn"]
    assert counted.tolist() == [5472, 7936, 64, 10944]


def test_kv_cache_counts_keys_and_values_of_all_layers() -> None:
    config = small_config("llama")  # 3 layers, 2 kv heads of 8 dimensions
    assert load_family(config, "config.json").cached_numbers(config) == 2 * 3 * 2 * 8
    config = small_config("gemma4_text")  # one layer of 2 kv heads of 256, two of one of 20
    assert load_family(config, "config.json").cached_numbers(config) == 2 * (2 * 256 + 2 * 20)
