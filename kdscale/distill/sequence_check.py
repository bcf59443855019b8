"""Which models sequence-parallel ranks can share, from their config.json alone; before any work. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kdscale.errors import ConfigError
from kdscale.families import Dims, load_family
from kdscale.weights import read_config

_FIELD = "distill.sequence_parallel"


def check_models(ranks: int, seq_len: int, folders: Mapping[str, Path]) -> None:
    """Raises ConfigError for a length or a model that `ranks` ranks cannot share. `folders`: by what is in them."""
    if ranks == 1:
        return
    if seq_len % ranks:
        raise ConfigError(
            _FIELD, expected=f"a divisor of distill.seq_len ({seq_len})", got=str(ranks), hint="change one of the two"
        )
    for what, folder in folders.items():
        config = read_config(folder)
        if config.get("attn_logit_softcapping"):
            raise ConfigError(
                _FIELD, expected=f"a {what} whose attention has no soft-cap", got=str(config.get("model_type")),
                hint="torch's attention cannot do it: sequence_parallel: 1",
            )  # fmt: skip
        check_dims(ranks, what, load_family(config, str(folder / "config.json")).dims(config))


def check_dims(ranks: int, what: str, dims: Dims) -> None:
    """Raises ConfigError when the heads cannot be divided; fewer kv heads than ranks are repeated."""
    if dims.heads % ranks:
        expected = f"a divisor of the {what}'s {dims.heads} query heads"
    elif dims.kv_heads % ranks and ranks % dims.kv_heads:
        expected = f"a divisor or a multiple of the {what}'s {dims.kv_heads} kv heads"
    else:
        return
    raise ConfigError(_FIELD, expected=expected, got=str(ranks), hint="or cut its heads to another number")
