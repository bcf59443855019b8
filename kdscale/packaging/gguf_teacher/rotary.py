"""The rotary embedding of a GGUF file, in transformers' terms; the inverse of what packaging/gguf_metadata writes."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np

from kdscale.errors import CheckpointError
from kdscale.families import Dims
from kdscale.packaging.gguf_teacher.file import GgufFile

FREQUENCIES = "rope_freqs.weight"  # what plain frequencies are divided by
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
VECTORS = {FREQUENCIES, LONG, SHORT}
_CLOSE = 1e-4  # relative, of factors that are stored in fp32

# Llama 3's rule: factors between these two wavelengths, as shares of the length that a model was first trained for.
_LOW, _HIGH = 1.0, 4.0
_LENGTHS = tuple(1 << power for power in range(4, 21))


def rope_parameters(file: GgufFile, usual: Any, dims: Dims) -> dict[str, Any]:
    """`rope_parameters` for config.json; `usual` is what the family's config class has by itself.

    Raises CheckpointError for a scaling that is not known.
    """
    parameters: dict[str, Any] = copy.deepcopy(usual) if isinstance(usual, dict) else {}
    full = parameters.get("full_attention", parameters)
    base = file.number("rope.freq_base", full.get("rope_theta", 10_000.0))
    others = {key: value for key, value in full.items() if key not in ("rope_type", "rope_theta")}
    full.clear()
    full.update({"rope_type": "default", "rope_theta": base, **others})
    if full is not parameters:  # layers that slide have frequencies of their own
        sliding = parameters["sliding_attention"]
        sliding.update({"rope_type": "default"})
        sliding["rope_theta"] = file.number("rope.freq_base_swa", sliding.get("rope_theta", base))
    rotated = int(file.number("rope.dimension_count", dims.head_dim) or 0)
    if rotated != dims.head_dim:
        full["partial_rotary_factor"] = rotated / dims.head_dim
    else:
        full.pop("partial_rotary_factor", None)
    full.update(_scaling(file, full, rotated))
    return parameters


def _scaling(file: GgufFile, rope: dict[str, Any], rotated: int) -> dict[str, Any]:
    kind = file.get(f"{file.architecture}.rope.scaling.type", "none")
    if FREQUENCIES in file.names:
        return _llama3(file, float(rope["rope_theta"]), rotated)
    if LONG in file.names:
        return _longrope(file)
    if kind == "linear":
        return {"rope_type": "linear", "factor": file.number("rope.scaling.factor", 1.0)}
    if kind == "yarn":
        return _yarn(file)
    if kind != "none":
        raise CheckpointError(
            f"{file.path}: {file.architecture}.rope.scaling.type", expected="none, linear or yarn", got=repr(kind)[:100]
        )
    return {}


def _yarn(file: GgufFile) -> dict[str, Any]:
    factor = file.number("rope.scaling.factor", 1.0) or 1.0
    out: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": file.size("rope.scaling.original_context_length"),
        "beta_fast": file.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": file.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    # llama.cpp multiplies by what YaRN suggests, and that is what transformers takes by itself
    if (attention := file.number("rope.scaling.attn_factor", 1.0)) != 1.0:
        out["attention_factor"] = float(f"{(attention or 1.0) * (1 + 0.1 * math.log(factor) if factor > 1 else 1):.6g}")
    return out


def _longrope(file: GgufFile) -> dict[str, Any]:
    long, short = ([float(f"{value:.7g}") for value in file.tensor(name)] for name in (LONG, SHORT))
    out: dict[str, Any] = {
        "rope_type": "longrope",
        "long_factor": long,
        "short_factor": short,
        "original_max_position_embeddings": file.size("rope.scaling.original_context_length"),
    }
    if (attention := file.number("rope.scaling.attn_factor")) is not None:
        out["attention_factor"] = attention
    return out


def _llama3(file: GgufFile, base: float, rotated: int) -> dict[str, Any]:
    """The settings whose factors are those of the file. Raises CheckpointError where there are none.

    The file has factors only; of the settings that make them, the two wavelengths are Llama 3's own.
    """
    factors = file.tensor(FREQUENCIES).astype(np.float64)
    factor = float(f"{factors.max():.6g}")
    frequencies = base ** (-np.arange(0, rotated, 2) / rotated)
    for length in _LENGTHS:
        made = _llama3_factors(frequencies, factor, length)
        if made.shape == factors.shape and np.allclose(made, factors, rtol=_CLOSE):
            return {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": _LOW, "high_freq_factor": _HIGH,
                "original_max_position_embeddings": length,
            }  # fmt: skip
    raise CheckpointError(
        f"{file.path}: {FREQUENCIES}", expected="factors by Llama 3's rule, with its wavelengths 1 and 4",
        got=f"others, up to {factor:g}",
    )  # fmt: skip


def _llama3_factors(frequencies: np.ndarray, factor: float, length: int) -> np.ndarray:
    """What plain frequencies are divided by (Llama 3.1's `apply_scaling`)."""
    turns = length * frequencies / (2 * math.pi)
    smooth = np.clip((turns - _LOW) / (_HIGH - _LOW), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - smooth) / factor + smooth))
