"""Quantised checkpoints of others, read as the plain matrices that they stand for; one row of FORMATS each.

Which matrices are quantised, the files themselves tell: what a quantiser left alone (a head, a list of modules to
ignore) is a plain tensor there, and stays as it is.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdscale.errors import CheckpointError
from kdscale.weights.header import DTYPE_BYTES, TensorEntry
from kdscale.weights.quantised.awq import Awq
from kdscale.weights.quantised.bitsandbytes import BitsAndBytes
from kdscale.weights.quantised.compressed_tensors import CompressedTensors
from kdscale.weights.quantised.float8 import Float8
from kdscale.weights.quantised.format import Format
from kdscale.weights.quantised.gptq import Gptq
from kdscale.weights.quantised.mxfp4 import Mxfp4
from kdscale.weights.quantised.packed import PackedTensor
from kdscale.weights.unreadable import listed

__all__ = ["FIELD", "FORMATS", "Entry", "Quantised", "decoded_entries", "format_of", "without_quantisation"]

FIELD = "quantization_config"
Entry = TensorEntry | PackedTensor

# quant_method in config.json → how its matrices are stored
FORMATS: dict[str, type[Format]] = {
    "gptq": Gptq,
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
    "fp8": Float8,
    "fbgemm_fp8": Float8,
    "bitsandbytes": BitsAndBytes,
    "mxfp4": Mxfp4,
}
# What a quantiser wrote for the inputs of a matrix or for a cache, which the plain model rounds no more
_OF_ACTIVATIONS = (
    "*.input_scale", "*.input_zero_point", "*.input_global_scale", "*.output_scale", "*.activation_scale",
    "*.input_scale_ub", "*.weight_format", "*.k_scale", "*.v_scale", "*.q_scale", "*.prob_scale",
)  # fmt: skip
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Quantised:
    """What a checkpoint's matrices were before they were read: how stored, how many, and in which dtype they come."""

    label: str
    matrices: int
    dtype: str
    bytes_on_disk: int

    @property
    def notice(self) -> str:
        """A sentence for the user."""
        name = next(name for name, short in _DTYPES.items() if short == self.dtype)
        return (
            f"{self.matrices} matrices are stored quantised ({self.label}): each is dequantised to {name} while it is "
            "read"
        )


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the plain model."""
    return {name: value for name, value in config.items() if name != FIELD}


def format_of(config: Mapping[str, Any], where: str) -> Format | None:
    """The format that config.json names; None where it names none.

    Raises CheckpointError for a format, or a setting of it, that cannot be read; it lists the formats that can.
    """
    settings = config.get(FIELD)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if isinstance(settings, dict) and method is None and {"load_in_4bit", "load_in_8bit"} & settings.keys():
        method = "bitsandbytes"  # older versions left the name out
    if not isinstance(method, str) or method not in FORMATS:
        raise CheckpointError(
            f"{where}: {FIELD}",
            expected='"quant_method" one of ' + ", ".join(sorted(FORMATS)),
            got=repr(method)[:200] if isinstance(settings, dict) else repr(settings)[:200],
            hint="use the checkpoint before it was quantised, or dequantise it and save it without quantization_config",
        )
    return FORMATS[method](settings, where, _dtype(config))


def _dtype(config: Mapping[str, Any]) -> str:
    """What the plain model computes with: as config.json says, else bfloat16."""
    inner = config.get("text_config")
    for tree in (config, inner if isinstance(inner, dict) else {}):
        for field in ("dtype", "torch_dtype"):
            if (short := _DTYPES.get(str(tree.get(field)).removeprefix("torch."))) is not None:
                return short
    return "BF16"


def decoded_entries(entries: Mapping[str, TensorEntry], form: Format) -> tuple[dict[str, Entry], Quantised]:
    """Name → entry of the plain model, in file order, from those of the files.

    Raises CheckpointError where the parts of a matrix do not fit, and for a tensor that nothing explains.
    """
    packed, taken = dict[str, PackedTensor](), set[str]()
    for name in entries:
        if (stem := form.stem(name, entries)) is not None:
            plain = form.plain(stem)
            parts = form.find(plain, stem, entries)
            packed[name] = form.packed(plain, parts)
            taken |= {part.name for part in parts.values()}
    plain_names = {name: form.plain(stem) for name in packed if (stem := form.stem(name, entries)) is not None}
    left = {name: entry for name, entry in entries.items() if name not in taken}
    of_activations = {name for name in left if any(fnmatch.fnmatchcase(name, glob) for glob in _OF_ACTIVATIONS)}
    strange = [
        f"{name} in {entry.dtype}"
        for name, entry in left.items()
        if name not in of_activations and entry.dtype not in DTYPE_BYTES
    ]
    twice = sorted({plain for name, plain in plain_names.items() if plain in left})
    if strange or twice:
        raise CheckpointError(
            f"{form.where}: tensors that {form.label} does not explain", expected="floats, or parts of its matrices",
            got=listed([*strange, *(f"{name} beside its quantised parts" for name in twice)]),
            hint="use the checkpoint before it was quantised",
        )  # fmt: skip
    out: dict[str, Entry] = {}
    for name, entry in entries.items():
        if name in packed:
            out[plain_names[name]] = packed[name]
        elif name in left and name not in of_activations:
            out[name] = entry
    on_disk = sum(entry.nbytes for entry in entries.values())
    return out, Quantised(form.label, len(packed), form.dtype, on_disk)
