"""Sizes and numbers that no model can have."""

from __future__ import annotations

import pytest

from kdscale.errors import CheckpointError
from kdscale.families import load_family, supported_types
from tests.integration.prune.family_table import tiny_config


@pytest.mark.parametrize("model_type", [*supported_types(), "granitemoehybrid, experts"])
def test_absurd_sizes_are_refused_at_once(model_type: str) -> None:
    dims = load_family(tiny_config(model_type), "config.json").data.dims
    for dim, field in dims.items():
        if field.field is None:
            continue
        for size in (10**12, 10**4000):
            config = {**tiny_config(model_type), field.field: size}
            with pytest.raises(CheckpointError, match="at most") as caught:
                load_family(config, "config.json").tensors(config)
            assert len(str(caught.value)) < 300, dim
    if "experts" in dims:
        config = {**tiny_config(model_type), "num_hidden_layers": 4000, str(dims["experts"].field): 8000}
        with pytest.raises(CheckpointError, match=r"layers \* experts"):
            load_family(config, "config.json").dims(config)
