"""Model families as data: one JSON file per family. Nothing here imports torch.

The files of this folder are always known; the environment variable KDSCALE_FAMILIES names further folders (separated as
in PATH).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kdscale.errors import CheckpointError, ConfigError
from kdscale.families.dims import Dims, ParamCount
from kdscale.families.family import Family
from kdscale.families.limits import check_numbers
from kdscale.families.schema import FamilyData, Sites
from kdscale.families.tensor_specs import TensorSpec
from kdscale.files import read_json

__all__ = [
    "Dims",
    "Family",
    "ParamCount",
    "Sites",
    "TensorSpec",
    "dropped_heads",
    "gguf_data",
    "gguf_families",
    "load_family",
    "read_families",
    "supported_types",
]

FOLDERS = "KDSCALE_FAMILIES"


def load_family(config_dict: dict[str, Any], where: str) -> Family:
    """Return the family of a config.json, by its `model_type`; `where` names that file in errors.

    Raises CheckpointError when the type is not supported (the message lists those that are), when the model is not a
    causal LM of the family, when a field has a value that the family file does not describe, or when the weights are
    quantised.
    """
    model_type = config_dict.get("model_type")
    by_type = _families()
    if not isinstance(model_type, str) or model_type not in by_type:
        got, hint = repr(model_type)[:200], "docs/how-to/add-a-family.md says how to add a family"
        if isinstance(nested := config_dict.get("text_config"), dict):
            inner = nested.get("model_type")
            got += f", a model of several modalities around a language model ({inner!r} in text_config)"
            if isinstance(inner, str) and inner in by_type:
                hint = f"save its language model alone, as {by_type[inner].architectures[0]}, and give that folder"
        raise CheckpointError(
            f"{where}: model_type",
            expected="one of " + ", ".join(sorted(by_type)),
            got=got if "model_type" in config_dict else "no such field",
            hint=hint,
        )
    data = by_type[model_type]
    names = config_dict.get("architectures")
    if names is not None and (not isinstance(names, list) or not set(map(str, names)) & set(data.architectures)):
        raise CheckpointError(
            f"{where}: architectures", expected="[" + ", ".join(data.architectures) + "]", got=repr(names)
        )
    if config_dict.get("quantization_config") is not None:
        raise CheckpointError(
            f"{where}: quantization_config",
            expected="unquantised weights (float32, float16 or bfloat16)",
            got="a quantised checkpoint",
            hint="use the original checkpoint, or dequantise it and save it again without quantization_config",
        )
    for rule in data.requires:
        if rule.field in config_dict and config_dict[rule.field] not in rule.one_of:
            raise CheckpointError(
                f"{where}: {rule.field}",
                expected=" or ".join(map(json.dumps, rule.one_of)),
                got=repr(config_dict[rule.field]),
                hint=rule.why,
            )
    check_numbers(config_dict, where)
    return Family(data, where, config_dict)


def dropped_heads(model_type: Any) -> dict[str, str]:
    """Glob of tensors that a student does without → what they are; empty for a type without a family."""
    data = _families().get(model_type) if isinstance(model_type, str) else None
    return {} if data is None else {drop.tensors: drop.what for drop in data.drops}


def supported_types() -> list[str]:
    """All model_type values that have a family, sorted."""
    return sorted(_families())


def gguf_families() -> list[str]:
    """The names of the families whose models can be written as GGUF files, sorted."""
    return sorted(data.name for data in gguf_data())


def gguf_data() -> list[FamilyData]:
    """The family files with a GGUF table, each once."""
    return [data for data in {data.name: data for data in _families().values()}.values() if data.gguf is not None]


def read_families(files: Iterable[Path]) -> dict[str, FamilyData]:
    """Read family files into model_type → family. Raises ConfigError naming the file and every field that is wrong."""
    by_type: dict[str, FamilyData] = {}
    for file in sorted(files):
        try:
            data = FamilyData.model_validate(read_json(file, ConfigError, expect=dict))
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in error.errors()]
            raise ConfigError(f"{file} is not a family file", got="; ".join(wrong)) from error
        for model_type in data.model_types:
            if model_type in by_type:
                raise ConfigError(f"{file}: model_types", got=f"{model_type}, which another family file has already")
            by_type[model_type] = data
    return by_type


def _families() -> dict[str, FamilyData]:
    return _read_folders(os.environ.get(FOLDERS, ""))


@cache
def _read_folders(extra: str) -> dict[str, FamilyData]:
    """Read the shipped files and those of the folders in `extra`. Raises ConfigError for a folder that is missing."""
    folders = [Path(__file__).parent, *(Path(name) for name in extra.split(os.pathsep) if name)]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{FOLDERS} names {folder}, which is not a folder")
    return read_families(file for folder in folders for file in folder.glob("*.json"))
