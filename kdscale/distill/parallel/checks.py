"""Which models ranks can share by tensor or by sequence, and which can be trained on a grid or by adapters.

Checks of config.json, before any work and without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdscale.config.distill.lora import LoraConfig
from kdscale.errors import ConfigError
from kdscale.families import Dims, Family, load_family
from kdscale.families.linear_maps import READ_AXES, AdaptedMap, adapted_maps
from kdscale.weights import read_config

# Roles of the linears whose output, or whose input, tensor-parallel ranks share; attention is shared by kv heads.
SLICED_OUTPUT, SLICED_INPUT = ("q", "k", "v", "gate", "up"), ("o", "down")
HEAD_NORMS = ("q_norm", "k_norm")
_OUTSIDE_LAYERS = ("embed", "final_norm", "head", "head_bias")


def unshareable_tensor(family: Family, config: dict[str, Any]) -> str | None:
    """The first tensor that keeps ranks from sharing the layers of a model, or None.

    Ranks can share separate q, k, v, o, gate, up and down projections; norms must be of one head or of all units.
    """
    for name, spec in family.tensors(config).items():
        if spec.layer is None:
            shareable = spec.role in _OUTSIDE_LAYERS
        elif spec.component == "norm":
            shareable = spec.role not in HEAD_NORMS or spec.axes == ("head_dim",)
        else:
            shareable = spec.role.removesuffix("_bias") in SLICED_OUTPUT + SLICED_INPUT
        if not shareable:
            return name
    return None


def check_tensor_parallel(size: int, folders: Mapping[str, Path]) -> None:
    """Check that `size` ranks can share the layers of each model in `folders` (by role: "teacher", "student").

    Raises ConfigError when they cannot, CheckpointError for a family that is not known.
    """
    if size == 1:
        return
    for what, folder in folders.items():
        config = read_config(folder)
        family = load_family(config, str(folder / "config.json"))
        if (name := unshareable_tensor(family, config)) is not None:
            raise ConfigError(
                "distill.tensor_parallel",
                expected=f"a {what} with separate q, k, v, gate and up projections, and norms of one head or all units",
                got=f"{name} of {config['model_type']}",
                hint="other models: tensor_parallel: 1, and zero_stage: 3 for memory",
            )
        check_tensor_dims(size, what, family.dims(config))


def check_tensor_dims(size: int, what: str, dims: Dims) -> None:
    """Raise ConfigError when a model has fewer kv heads, ffn units or tokens than ranks; they need not divide."""
    for name in ("kv_heads", "ffn", "vocab"):
        if getattr(dims, name) < size:
            raise ConfigError(
                "distill.tensor_parallel", expected=f"at most the {what}'s {name}, {getattr(dims, name)}",
                got=str(size), hint="let fewer ranks share a layer",
            )  # fmt: skip


_FIELD = "distill.sequence_parallel"
_GRID = "distill.fake_quantize"


def check_sequence_parallel(ranks: int, seq_len: int, folders: Mapping[str, Path]) -> None:
    """Check that `ranks` ranks can share sequences of `seq_len` in each model, and raise ConfigError otherwise."""
    if ranks == 1:
        return
    if seq_len % ranks:
        raise ConfigError(
            _FIELD, expected=f"a divisor of distill.seq_len ({seq_len})", got=str(ranks), hint="change one of the two"
        )
    for what, folder in folders.items():
        config = read_config(folder)
        family = load_family(config, str(folder / "config.json"))
        if any(spec.component == "mixer" for spec in family.tensors(config).values()):
            raise ConfigError(
                _FIELD, expected=f"a {what} without recurrent mixers", got=str(config["model_type"]),
                hint="sequence_parallel: 1: the state of a mixer runs through the whole sequence",
            )  # fmt: skip
        if any(spec.role == "sinks" for spec in family.tensors(config).values()):
            raise ConfigError(
                _FIELD, expected=f"a {what} without attention sinks", got=str(config["model_type"]),
                hint="sequence_parallel: 1: each rank has the sinks of all heads",
            )  # fmt: skip
        check_sequence_dims(ranks, what, family.dims(config))


def check_sequence_dims(ranks: int, what: str, dims: Dims) -> None:
    """Raise ConfigError when the heads cannot be divided; kv heads are repeated when there are fewer than ranks."""
    if dims.heads % ranks:
        expected = f"a divisor of the {what}'s {dims.heads} query heads"
    elif dims.kv_heads % ranks and ranks % dims.kv_heads:
        expected = f"a divisor or a multiple of the {what}'s {dims.kv_heads} kv heads"
    else:
        return
    raise ConfigError(_FIELD, expected=expected, got=str(ranks), hint="or cut its heads to another number")


def check_fake_quantize(folders: Mapping[str, Path]) -> None:
    """Raises ConfigError for a model whose weights are not those of linear layers: a mixture of experts, or GPT-2."""
    for what, folder in folders.items():
        config = read_config(folder)
        family = load_family(config, str(folder / "config.json"))
        if experts := family.dims(config).experts:
            raise ConfigError(
                _GRID, expected=f"a {what} without experts", got=f"{config['model_type']} with {experts}",
                hint="leave it out: mixtures of experts are not quantised",
            )  # fmt: skip
        if family.transposed("down"):
            raise ConfigError(
                _GRID, expected=f"a {what} whose maps are stored [outputs, inputs]",
                got=f"{config['model_type']}, whose maps are stored the other way round", hint="leave it out",
            )  # fmt: skip


def check_lora(settings: LoraConfig, folder: Path) -> dict[str, AdaptedMap]:
    """The modules that get adapters. Raises ConfigError where a target is no linear map of the model's layers."""
    config = read_config(folder)
    return adapted_maps(load_family(config, str(folder / "config.json")), config, settings.targets)


def check_grid_dims(group: int | None, what: str, dims: Dims) -> None:
    """Raise ConfigError when a group does not divide a width that a linear map of the model reads."""
    widths = {axis: dims.axis_size(axis) for axis in READ_AXES}
    if wrong := {axis: width for axis, width in widths.items() if width % (group or 1)}:
        raise ConfigError(
            f"{_GRID}.group", expected=f"a divisor of every width of the {what} that a linear map reads",
            got=f"{group}, but " + ", ".join(f"{axis} is {width}" for axis, width in wrong.items()),
            hint=f"take another group, or prune.multiple_of: {group} for such widths",
        )  # fmt: skip
