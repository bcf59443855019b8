"""Model families as data: one JSON file per family. Nothing here imports torch.

The files of this folder are always known; the environment variable KDSCALE_FAMILIES names further folders (separated as
in PATH).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from kdscale.errors import CheckpointError, ConfigError
from kdscale.families.config_values import is_about
from kdscale.families.cuttable import cuttable_axes
from kdscale.families.dims import Dims, ParamCount
from kdscale.families.family import Family
from kdscale.families.limits import check_numbers
from kdscale.families.nested_family import NestedFamily, language_config, text_type
from kdscale.families.schema import FamilyData, Sites
from kdscale.families.schema.nested_file import NestedData
from kdscale.families.tensor_specs import TensorSpec
from kdscale.files import read_json

__all__ = [
    "Dims",
    "Family",
    "ParamCount",
    "Sites",
    "TensorSpec",
    "cuttable_axes",
    "decoder_types",
    "dropped_heads",
    "family_files",
    "gguf_data",
    "gguf_families",
    "head_kind",
    "load_family",
    "nested_data",
    "nested_types",
    "read_families",
    "supported_types",
]

FOLDERS = "KDSCALE_FAMILIES"
_File = TypeVar("_File", FamilyData, NestedData)


def load_family(config_dict: dict[str, Any], where: str) -> Family:
    """Return the family of a config.json, by its `model_type`; `where` names that file in errors.

    A model of several modalities has the family of its language model, in its place (NestedFamily). Raises
    CheckpointError when the type is not supported (the message lists those that are), when the model is of no
    architecture of the family, when a field has a value that the family file does not describe, or when the weights are
    quantised.
    """
    model_type = config_dict.get("model_type")
    by_type, nested = _families(), nested_data(config_dict)
    if nested is not None:
        _check_architecture(config_dict, where, nested.architectures)
        model_type = text_type(nested, config_dict, where)
    if not isinstance(model_type, str) or model_type not in by_type:
        raise _unknown_type(config_dict, where, sorted(by_type), None if nested is None else model_type)
    own = config_dict if nested is None else language_config(nested, config_dict)
    data = _file_about(by_type[model_type], own, where)
    if nested is None:
        _check_architecture(config_dict, where, data.architectures)
    if config_dict.get("quantization_config") is not None:
        raise CheckpointError(
            f"{where}: quantization_config",
            expected="unquantised weights (float32, float16 or bfloat16)",
            got="a quantised checkpoint",
            hint="use the original checkpoint, or dequantise it and save it again without quantization_config",
        )
    check_numbers(config_dict, where)
    for rule in data.requires:
        value = own.get(rule.field, rule.one_of[0] if rule.absent is None else rule.absent)
        if value not in rule.one_of:
            raise CheckpointError(
                f"{where}: {rule.field}",
                expected=" or ".join(map(json.dumps, rule.one_of)),
                got=repr(value) if rule.field in own else f"no such field, which stands for {value!r}",
                hint=rule.why,
            )
    return Family(data, where, config_dict) if nested is None else NestedFamily(data, where, config_dict, nested)


def _file_about(files: tuple[FamilyData, ...], config: dict[str, Any], where: str) -> FamilyData:
    """The file that is about this config; a single one whatever it says, since `requires` tells what it lacks."""
    return next((data for data in files if is_about(data, config, where)), files[0])


def nested_data(config_dict: dict[str, Any]) -> NestedData | None:
    """What is known of a model of several modalities with this config.json; None for any other model."""
    model_type = config_dict.get("model_type")
    return _nested().get(model_type) if isinstance(model_type, str) else None


def _check_architecture(config_dict: dict[str, Any], where: str, expected: tuple[str, ...]) -> None:
    names = config_dict.get("architectures")
    if names is not None and (not isinstance(names, list) or not set(map(str, names)) & set(expected)):
        raise CheckpointError(f"{where}: architectures", expected="[" + ", ".join(expected) + "]", got=repr(names))


def _unknown_type(config_dict: dict[str, Any], where: str, known: list[str], inner: Any) -> CheckpointError:
    """The error for a type without a family; `inner`: the language model's, of a known model of several modalities."""
    got = repr(config_dict.get("model_type"))[:200] if "model_type" in config_dict else "no such field"
    field, hint = "model_type", "docs/how-to/add-a-family.md says how to add a family"
    if inner is not None:
        field, got = "the language model's model_type", repr(inner)[:200]
    elif isinstance(nested := config_dict.get("text_config"), dict):
        inner = nested.get("model_type")
        got += f", a model of several modalities around a language model ({inner!r} in text_config)"
        if isinstance(inner, str) and inner in known:
            class_name = _families()[inner][0].architectures[0]
            hint = f"save its language model alone, as {class_name}, and give that folder, or write a file about it "
            hint += "(docs/how-to/prune-a-multimodal-model.md)"
    return CheckpointError(f"{where}: {field}", expected="one of " + ", ".join(known), got=got, hint=hint)


def head_kind(config_dict: dict[str, Any]) -> str:
    """What stands on a config's model: `masked_lm`, `classes` or `none` on an encoder, `causal_lm` on all others."""
    files = _families().get(str(config_dict.get("model_type")), ())
    return next((data.heads[data.architecture_in(config_dict)] for data in files if data.is_encoder), "causal_lm")


def dropped_heads(model_type: Any, layers: int) -> dict[str, str]:
    """Glob of tensors that a student of so many layers does without → what they are; empty for an unknown type."""
    files = _families().get(model_type, ()) if isinstance(model_type, str) else ()
    return {drop.glob(lambda: layers): drop.what for data in files for drop in data.drops}


def supported_types() -> list[str]:
    """All model_type values that have a family, sorted."""
    return sorted(_families())


def nested_types() -> list[str]:
    """All model_type values of models of several modalities whose language model can be pruned, sorted."""
    return sorted(_nested())


def family_files() -> list[FamilyData]:
    """What every known family file says, by the families' names."""
    every = (data for files in _families().values() for data in files)
    return sorted({data.name: data for data in every}.values(), key=lambda data: data.name)


def decoder_types() -> list[str]:
    """Those of models that write text, sorted."""
    return sorted(name for name, files in _families().items() if not files[0].is_encoder)


def gguf_families() -> list[str]:
    """The names of the families whose models can be written as GGUF files, sorted."""
    return [data.name for data in gguf_data()]


def gguf_data() -> list[FamilyData]:
    """The family files with a GGUF table, each once."""
    return [data for data in family_files() if data.gguf is not None]


def read_families(files: Iterable[Path]) -> dict[str, tuple[FamilyData, ...]]:
    """Read family files into model_type → its file, or the two that its configs are divided among (`chosen`).

    Raises ConfigError naming the file and every field that is wrong.
    """
    return _by_type(files, FamilyData, _divide)


def _divide(others: Sequence[FamilyData], data: FamilyData) -> bool:
    """Whether two files of one model type say which configs each is about, by the same question."""
    one, two = others[0].chosen, data.chosen
    if len(others) > 1 or one is None or two is None:
        return False
    return one.question == two.question and one.holds != two.holds


def _by_type(
    files: Iterable[Path], schema: type[_File], may_share: Callable[[Sequence[_File], _File], bool]
) -> dict[str, tuple[_File, ...]]:
    """model_type → the files about it; a further one only where it `may_share` the type with those before it."""
    by_type: dict[str, list[_File]] = {}
    for file, data in _read_files(files, schema):
        for model_type in data.model_types:
            others = by_type.setdefault(model_type, [])
            if others and not may_share(others, data):
                raise ConfigError(f"{file}: model_types", got=f"{model_type}, which another family file has already")
            others.append(data)
    return {model_type: tuple(found) for model_type, found in by_type.items()}


def _read_files(files: Iterable[Path], schema: type[_File]) -> Iterator[tuple[Path, _File]]:
    for file in sorted(files):
        try:
            data = schema.model_validate(read_json(file, ConfigError, expect=dict))
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in error.errors()]
            raise ConfigError(f"{file} is not a family file", got="; ".join(wrong)) from error
        yield file, data


def _families() -> dict[str, tuple[FamilyData, ...]]:
    return _read_folders(os.environ.get(FOLDERS, ""))[0]


def _nested() -> dict[str, NestedData]:
    return _read_folders(os.environ.get(FOLDERS, ""))[1]


@cache
def _read_folders(extra: str) -> tuple[dict[str, tuple[FamilyData, ...]], dict[str, NestedData]]:
    """Read the shipped files and those of the folders in `extra`, and of their folders `nested`.

    Raises ConfigError for a folder that is missing.
    """
    folders = [Path(__file__).parent, *(Path(name) for name in extra.split(os.pathsep) if name)]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{FOLDERS} names {folder}, which is not a folder")
    families = read_families(file for folder in folders for file in folder.glob("*.json"))
    nested_files = (file for folder in folders for file in folder.glob("nested/*.json"))
    nested = {name: data for name, (data,) in _by_type(nested_files, NestedData, lambda *_: False).items()}
    if twice := sorted(set(families) & set(nested)):
        raise ConfigError("model_types of families and of nested models", got=f"{twice[0]} in both")
    return families, nested
