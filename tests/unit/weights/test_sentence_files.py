"""The files of sentence-transformers, as its older and its newer versions write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kdscale.errors import CheckpointError
from kdscale.weights.sentence_files import fit_pooling, pooling_of

OLD, NEW = "sentence_transformers.models.", "sentence_transformers.sentence_transformer.modules."
E5: dict[str, Any] = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
BGE: dict[str, Any] = {
    "word_embedding_dimension": 32,
    "pooling_mode_cls_token": True,
    "pooling_mode_mean_tokens": False,
}
SIX: dict[str, Any] = {"embedding_dimension": 32, "pooling_mode": "cls", "include_prompt": True}


def saved(folder: Path, pooling: dict[str, Any], kinds: tuple[str, ...], prefix: str = OLD) -> Path:
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [{"path": path, "type": prefix + kind} for path, kind in zip(paths, kinds, strict=False)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize(("pooling", "prefix", "way"), [(E5, OLD, "mean"), (BGE, OLD, "cls"), (SIX, NEW, "cls")])
def test_the_way_of_pooling_is_read_and_a_students_width_is_written(tmp_path, pooling, prefix, way) -> None:
    folder = saved(tmp_path, pooling, ("Transformer", "Pooling", "Normalize"), prefix)
    assert pooling_of(folder) == way
    fit_pooling(folder, 24)
    written = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert written == {key: 24 if key.endswith("dimension") else value for key, value in pooling.items()}
    assert pooling_of(folder) == way


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"pooling_mode": "lasttoken"}, "'lasttoken'"),
        ({"pooling_mode": ["mean", "cls"]}, r"\['mean', 'cls'\]"),
        ({"pooling_mode": None}, "none of them"),
        ({"pooling_mode": None, "pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
    ],
)
def test_other_ways_of_pooling_are_refused_by_name(tmp_path, changes, got) -> None:
    folder = saved(tmp_path, {**SIX, **changes}, ("Transformer", "Pooling"), NEW)
    with pytest.raises(CheckpointError, match=f"pooling_mode\n.*\n.*{got}"):
        pooling_of(folder)


def test_a_matrix_behind_the_pooling_is_refused(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="Dense"):
        pooling_of(saved(tmp_path, E5, ("Transformer", "Pooling", "Dense")))
